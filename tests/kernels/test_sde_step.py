"""sde_step against the float64 oracle, and its buffers, steps, layouts and shapes."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import Transitions, cps, flow_sde, log_prob, ode, philox, sde_step
from support.kernels import oracle


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps", "ode"])
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_against_float64(backend, kind, shape):
    b = oracle.batch(3, shape)
    transitions = oracle.make(kind)
    noise = torch.randn(3, *shape)
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, noise=noise)
    if kind == "ode":
        dt = -transitions.column("abs_dt").double()[b.step].view(-1, *[1] * len(shape))
        exact = b.sample.double() + dt * b.velocity.double()
        assert lp.eq(0).all()
    else:
        drift_x, drift_v, c, _, _ = oracle.rows(kind, 0.7, b.step, out.ndim)
        exact = drift_x * b.sample.double() + drift_v * b.velocity.double() + c * noise.double()
        exact_lp = oracle.log_prob(kind, 0.7, b.step, b.velocity, b.sample, out)
        assert lp.dtype == torch.float32
        # The oracle's coefficients are not rounded to float32: that alone moves log_prob by 1e-6.
        assert oracle.error(lp, exact_lp) < 4e-6
    assert oracle.error(out, exact) < 1e-6


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("shape", [(16, 64, 64), (3, 24, 24), (4, 3, 6, 10)], ids=str)
def test_accuracy_of_log_prob(backend, kind, shape):
    """Within 1e-6 of the float64 run on the same rounded inputs and table."""
    b = oracle.batch(4, shape)
    transitions = oracle.make(kind)
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    d = b.to(torch.float64)
    exact = log_prob(d.velocity, d.sample, out.double(), transitions, b.step)
    assert oracle.error(lp, exact) < oracle.LOG_PROB_TOLERANCE


def test_seeded_noise_is_philox(backend):
    """Seeds draw the documented stream: noise= with those normals gives the same bits."""
    b = oracle.batch(5, (3, 5, 7))
    transitions = flow_sde(oracle.SIGMAS)
    noise = philox.normals(b.seeds, b.step, 105).view_as(b.sample)
    drawn = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    given = sde_step(b.velocity, b.sample, transitions, b.step, noise=noise)
    assert torch.equal(drawn[0], given[0]) and torch.equal(drawn[1], given[1])


def test_cat_draws_the_same_noise(backend):
    b = oracle.batch(4)
    sde, both = (
        flow_sde(oracle.SIGMAS),
        Transitions.cat(ode(oracle.SIGMAS), flow_sde(oracle.SIGMAS)),
    )
    plain = sde_step(b.velocity, b.sample, sde, b.step, seeds=b.seeds)
    moved = sde_step(b.velocity, b.sample, both, b.step + 9, seeds=b.seeds)
    assert torch.equal(plain[0], moved[0]) and torch.equal(plain[1], moved[1])


def test_mixed_steps_equal_single_steps(backend):
    b = oracle.batch(6)
    transitions = flow_sde(oracle.SIGMAS)
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    for i, step in enumerate(b.step.tolist()):
        rows = slice(i, i + 1)
        for form in (step, torch.tensor(step), torch.tensor([step])):
            one = sde_step(b.velocity[rows], b.sample[rows], transitions, form, seeds=b.seeds[rows])
            assert torch.equal(one[0], out[rows]) and torch.equal(one[1], lp[rows])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("sample_dtype", oracle.DTYPES, ids=str)
def test_dtype_pairs(backend, dtype, sample_dtype):
    """Inputs are widened exactly; the result is the float32 result rounded once."""
    b = oracle.batch(2, (3, 9, 11), dtype, sample_dtype)
    transitions = cps(oracle.SIGMAS)
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    wide, _ = sde_step(b.velocity.float(), b.sample.float(), transitions, b.step, seeds=b.seeds)
    assert out.dtype == sample_dtype and torch.equal(out, wide.to(sample_dtype))
    assert lp.dtype == torch.float32 and torch.isfinite(lp).all()


def test_guidance(backend):
    b = oracle.batch(3)
    transitions = flow_sde(oracle.SIGMAS)
    guided = {"uncond_velocity": b.uncond, "guidance_scale": 4.5}
    out = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds, **guided)
    combined = b.uncond + (b.velocity - b.uncond) * 4.5
    plain = sde_step(combined, b.sample, transitions, b.step, seeds=b.seeds)
    assert torch.equal(out[0], plain[0]) and torch.equal(out[1], plain[1])


def test_given_buffers(backend):
    """A trajectory buffer is filled in place, and nothing outside the slice is touched."""
    b = oracle.batch(3)
    transitions = flow_sde(oracle.SIGMAS)
    latents, scores = torch.full((4, *b.sample.shape), 7.0), torch.full((4, 3), 7.0)
    args = (b.velocity, b.sample, transitions, b.step)
    out, lp = sde_step(*args, seeds=b.seeds, out=latents[2], log_prob_out=scores[1])
    assert out.data_ptr() == latents[2].data_ptr() and lp.data_ptr() == scores[1].data_ptr()
    fresh = sde_step(*args, seeds=b.seeds)
    assert torch.equal(latents[2], fresh[0]) and torch.equal(scores[1], fresh[1])
    assert latents[[0, 1, 3]].eq(7).all() and scores[[0, 2, 3]].eq(7).all()


def test_memory_layout_does_not_matter(backend):
    """Elements are counted in the order of the shape, not of the memory."""
    b = oracle.batch(3, (4, 6, 10))
    transitions = flow_sde(oracle.SIGMAS)
    plain = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    wide = torch.randn(6, 4, 6, 10)
    wide[::2] = b.sample
    last = b.velocity.to(memory_format=torch.channels_last)
    strided = sde_step(last, wide[::2], transitions, b.step, seeds=b.seeds)
    assert torch.equal(plain[0], strided[0]) and torch.equal(plain[1], strided[1])


def test_odd_sizes(backend):
    transitions = flow_sde(oracle.SIGMAS)
    for shape in ((0, 3, 4), (2, 0), (1, 1), (2, 1023), (1, 1025), (1, 4095), (1, 8193)):
        v, x = torch.randn(shape), torch.randn(shape)
        out, lp = sde_step(v, x, transitions, 3, seeds=torch.arange(shape[0]))
        assert out.shape == shape and lp.shape == shape[:1] and torch.isfinite(lp).all()
        assert torch.isfinite(out).all()
    assert lp.shape == (1,)
    _, lp = sde_step(torch.zeros(2, 0), torch.zeros(2, 0), transitions, 3, seeds=torch.arange(2))
    assert torch.equal(lp, -transitions.column("c0")[3].expand(2))


def test_quiet_rows_keep_bad_values_visible(backend):
    """An ODE row's log_prob is 0 even where x' is NaN; x' shows the NaN."""
    x = torch.tensor([[1.0, float("nan")], [1.0, 2.0]])
    out, lp = sde_step(torch.ones(2, 2), x, ode(oracle.SIGMAS), 0)
    assert lp.tolist() == [0, 0] and out.isnan().tolist() == [[False, True], [False, False]]


def test_a_buffer_between_the_rows_of_sample_is_not_read_as_sample(backend):
    """sample is rows of a trajectory [B, T, ...], and out lies over the second of them."""
    transitions, seeds = flow_sde(oracle.SIGMAS), torch.arange(2)
    trajectory, v = torch.randn(2, 4, 5000), torch.randn(2, 5000)
    sample, out = trajectory[:, 1], trajectory.view(-1)[5 * 5000 : 7 * 5000].view(2, 5000)
    expected, _ = sde_step(v, sample.clone(), transitions, 2, seeds=seeds)
    sde_step(v, sample, transitions, 2, seeds=seeds, out=out)
    assert torch.equal(out, expected)


def test_a_buffer_written_again_is_refused_by_the_backward_that_saved_it(backend):
    """Backends write through pointers; autograd has to know, or the gradient is of other data."""
    b, transitions = oracle.batch(3), flow_sde(oracle.SIGMAS)
    out, lp = torch.zeros_like(b.sample), torch.zeros(3)
    call = dict(seeds=b.seeds, out=out, log_prob_out=lp)
    sde_step(b.velocity, b.sample, transitions, 2, **call)
    v = b.velocity.clone().requires_grad_()
    score = log_prob(v, b.sample, out, transitions, 2).sum()
    weighted = (v.flatten(1).sum(1) * lp).sum()
    sde_step(b.velocity, b.sample, transitions, 3, **call)
    for value in (score, weighted):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            value.backward()
