"""Empty batches, rows without elements, integers at their ends: defined alike on each backend."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import flow_sde, grpo_loss, initial_noise, log_prob, ode, sde_step, window
from flowgrpo_kernels.backends import dispatch, triton
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)
LAST, FIRST = 2**63 - 1, -(2**63)


@pytest.fixture(params=["reference", "native", "triton"])
def each(request):
    """Runs a test on every backend that CPU tensors can have."""
    interpreted = request.param != "triton" or triton.interpreting()
    if not (interpreted and dispatch.backends()[request.param]["available"]):
        pytest.skip(f"{request.param} does not run here")
    with dispatch.use_backend(request.param):
        yield request.param


def all_ops(rows: int, shape: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Every public op, with guidance, KL and Guard, and the gradients."""
    b = oracle.batch(rows, shape)
    v, u = b.velocity.requires_grad_(), b.uncond.requires_grad_()
    with torch.no_grad():
        x_prev, lp = sde_step(v, b.sample, TRANSITIONS, 3, seeds=b.seeds)
    guided = {"uncond_velocity": u, "guidance_scale": 2.0, "uncond_grad": True}
    score = log_prob(v, b.sample, x_prev, TRANSITIONS, b.step, **guided)
    (dv,) = torch.autograd.grad(score.sum(), v)
    out = grpo_loss(
        v, b.sample, x_prev, lp, b.advantages, TRANSITIONS, b.step, ref_velocity=b.ref,
        kl_weight=0.1, old_velocity=b.old, row_weight=b.weight, **guided,
    )  # fmt: skip
    out.loss.backward()
    named = {name: value.detach() for name, value in out._asdict().items()}
    noise = initial_noise(b.seeds, shape)
    return named | {"x": x_prev, "lp": lp, "dv": dv, "grad": v.grad, "du": u.grad, "noise": noise}


@pytest.mark.parametrize("shape", [(3, 5), (0,), (2, 0), (1025,), (2, 4097)], ids=str)
def test_empty_batch(each, shape):
    results = all_ops(0, shape)
    for name in ("loss", "policy_loss", "kl", "clip_fraction"):
        assert results[name].shape == () and results[name].item() == 0
    for name in ("x", "dv", "grad", "du", "noise"):
        assert results[name].shape == (0, *shape)
    for name in ("lp", "log_prob", "ratio"):
        assert results[name].shape == (0,)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(0,), (2, 0)], ids=str)
def test_rows_without_elements(each, shape):
    """Means over nothing are 0, so log_prob is -c0; everything is finite."""
    results = all_ops(3, shape)
    assert all(torch.isfinite(value).all() for value in results.values())
    assert results["lp"].eq(-TRANSITIONS.table[3, 4]).all() and results["kl"].item() == 0
    for name in ("x", "dv", "grad", "du", "noise"):
        assert results[name].shape == (3, *shape)


def test_a_quiet_row_takes_nothing_from_noise(each):
    """Where C = 0 noise may hold anything; elsewhere it is what it is."""
    transitions, b = window(TRANSITIONS, ode(oracle.SIGMAS), [5]), oracle.batch(3, (2, 2100))
    noise = b.old.clone()
    noise[0, 0, 5], noise[0, 1, 7], noise[2, 1, 9] = float("inf"), float("nan"), float("nan")
    step = torch.tensor([2, 5, 5])
    x, lp = sde_step(b.velocity, b.sample, transitions, step, noise=noise)
    expected, score = sde_step(b.velocity, b.sample, transitions, step, noise=b.old)
    assert torch.equal(x[:2], expected[:2]) and torch.equal(lp[:2], score[:2])
    assert x[2, 1, 9].isnan() and x[2].isnan().sum() == 1 and lp[2].isnan()


@pytest.mark.slow
def test_steps_do_not_wrap(each):
    """Numbers that are rows of the table in 32 bits only are outside it."""
    step = torch.tensor([3, 3 + 2**32, FIRST + 3, LAST, -1, TRANSITIONS.num_steps])
    b = oracle.batch(len(step), (3, 5))
    plain = (b.velocity, None, 1.0, b.sample)
    out, lp = torch.zeros_like(b.sample), torch.zeros(len(step))
    dispatch.op("sde_step")(*plain, TRANSITIONS.table, step, b.seeds, None, out, lp)
    score = dispatch.op("log_prob")(*plain, b.old, TRANSITIONS.table, step)
    loss = (b.old, lp, b.advantages, TRANSITIONS.table, step, *[None] * 5, 0.0, 0.1, 0.1, 5.0)
    *_, ratio, _, dv, _ = dispatch.op("grpo_loss_gradient")(*plain, *loss, 1.0, False)
    for value in (lp, score, ratio):
        assert value.isnan().tolist() == [False] + [True] * 5
    for value in (out, dv):
        assert value.flatten(1).isnan().all(1).tolist() == [False] + [True] * 5
        assert torch.isfinite(value[0]).all()


def test_seeds_of_all_64_bits(each):
    """The noise of the first and last seeds is the reference's, and differs between them."""
    seeds = torch.tensor([0, -1, LAST, FIRST, 2**32])
    noise = initial_noise(seeds, (70,))
    with dispatch.use_backend("reference"):
        assert torch.equal(noise, initial_noise(seeds, (70,)))
    assert len({tuple(row.tolist()) for row in noise}) == len(seeds)
