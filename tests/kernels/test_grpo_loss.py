"""grpo_loss forward and backward against the float64 oracle: clip, KL, Guard, weights, guidance."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import grpo_loss, log_prob, sde_step
from support.kernels import oracle


def replay(kind="flow_sde", shape=(3, 24, 24), dtype=torch.float32, rows=6, kl="std_dev"):
    """A step stored under b.old, replayed under b.velocity; old log_probs so that clips occur."""
    b = oracle.batch(rows, shape, dtype)
    transitions = oracle.make(kind, kl=kl)
    x_prev, _ = sde_step(b.old, b.sample, transitions, b.step, seeds=b.seeds)
    lp = log_prob(b.velocity, b.sample, x_prev, transitions, b.step)
    offsets = torch.tensor([0.0, 3e-3, -3e-3, 0.4, -0.4, 1e-5])[torch.arange(rows) % 6]
    return b, transitions, x_prev, lp + offsets


def compare(backend_loss, v, exact, exact_v, tolerance=2e-5):
    assert oracle.error(backend_loss, exact) < 5e-6
    backend_loss.backward()
    exact.backward()
    rows = exact_v.grad.flatten(1)
    scale = rows.abs().amax().clamp_min(1e-30)
    assert ((v.grad.double().flatten(1) - rows).abs() / scale).max() < tolerance


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("clip", [1e-3, (1e-3, 5e-3), 1e-4, (0.2, 0.4)], ids=str)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_against_float64(backend, kind, clip, beta):
    b, transitions, x_prev, old = replay(kind)
    v, exact_v = b.velocity.clone().requires_grad_(), b.velocity.double().requires_grad_()
    ref = b.ref if beta else None
    result = grpo_loss(
        v, b.sample, x_prev, old, b.advantages, transitions, b.step,
        ref_velocity=ref, kl_weight=beta, clip_range=clip, row_weight=b.weight,
    )  # fmt: skip
    exact = oracle.loss(
        kind, 0.7, b.step, exact_v, b.sample, x_prev, old, b.advantages, ref=ref, beta=beta,
        clip=clip if isinstance(clip, tuple) else (clip, clip), weight=b.weight,
    )  # fmt: skip
    total = result.policy_loss + beta * result.kl
    torch.testing.assert_close(result.loss.detach(), total, rtol=1e-6, atol=1e-9)
    compare(result.loss, v, exact, exact_v)


@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
@pytest.mark.parametrize("kl", ["std_dev", "gaussian"])
def test_shapes_and_kl_conventions(backend, shape, kl):
    b, transitions, x_prev, old = replay("flow_sde", shape, kl=kl)
    v, exact_v = b.velocity.clone().requires_grad_(), b.velocity.double().requires_grad_()
    args = (b.sample, x_prev, old, b.advantages)
    result = grpo_loss(v, *args, transitions, b.step, ref_velocity=b.ref, kl_weight=0.3)
    exact = oracle.loss(
        "flow_sde", 0.7, b.step, exact_v, *args, ref=b.ref, beta=0.3, kl=kl
    )  # fmt: skip
    compare(result.loss, v, exact, exact_v)


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde"])
@pytest.mark.parametrize("kl", ["std_dev", "gaussian"])
def test_guard(backend, kind, kl):
    b, transitions, x_prev, old = replay(kind, kl=kl)
    v, exact_v = b.velocity.clone().requires_grad_(), b.velocity.double().requires_grad_()
    options = {"ref_velocity": b.ref, "kl_weight": 0.1}
    result = grpo_loss(
        v, b.sample, x_prev, old, b.advantages, transitions, b.step,
        old_velocity=b.old, clip_range=1e-3, **options,
    )  # fmt: skip
    exact = oracle.loss(
        kind, 0.7, b.step, exact_v, b.sample, x_prev, old, b.advantages,
        ref=b.ref, beta=0.1, clip=(1e-3, 1e-3), old=b.old, kl=kl,
    )  # fmt: skip
    compare(result.loss, v, exact, exact_v)


def test_ties_follow_torch(backend):
    """On the boundary itself the gradient of torch.maximum(..., clamp) is whole; beyond it none."""
    b, transitions, x_prev, _ = replay(shape=(4,), rows=6)
    lp = log_prob(b.velocity, b.sample, x_prev, transitions, b.step)
    bound = torch.tensor([1.25, 1.25, 0.75, 0.75, 1.5, 0.5])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    old = lp - bound.log()
    ratio = (lp - old).exp()
    high, low = float(ratio[0]) - 1, 1 - float(ratio[2])
    v = b.velocity.clone().requires_grad_()
    result = grpo_loss(
        v, b.sample, x_prev, old, advantages, transitions, b.step, clip_range=(low, high)
    )
    result.loss.backward()
    assert v.grad[:4].abs().sum(1).gt(0).all() and v.grad[4:].eq(0).all()
    assert result.clip_fraction.item() == pytest.approx(2 / 6)


def test_weights(backend):
    """Weight 0 silences a row, even a NaN one; the KL has its own weight when given."""
    b, transitions, x_prev, old = replay(rows=4)
    keep = torch.tensor([1.0, 0.0, 1.0, 0.0])
    advantages = torch.where(keep == 0, float("nan"), b.advantages)
    args = (b.sample, x_prev, old)
    options = {"ref_velocity": b.ref, "kl_weight": 0.5}
    v = b.velocity.clone().requires_grad_()
    result = grpo_loss(v, *args, advantages, transitions, b.step, row_weight=keep, **options)
    result.loss.backward()
    half = v.detach()[::2].clone().requires_grad_()
    rows = [x[::2] for x in (*args, advantages)]
    alone = grpo_loss(half, *rows, transitions, b.step[::2], ref_velocity=b.ref[::2], kl_weight=0.5)
    alone.loss.backward()
    # Two rows of four: the mean is over all four.
    torch.testing.assert_close(result.loss * 2, alone.loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(v.grad[::2] * 2, half.grad, rtol=1e-6, atol=0)
    assert v.grad[1::2].eq(0).all()

    own = {"row_weight": b.weight, "kl_row_weight": torch.ones(4)}
    split = grpo_loss(b.velocity, *args, b.advantages, transitions, b.step, **own, **options)
    plain = grpo_loss(b.velocity, *args, b.advantages, transitions, b.step, **options)
    weighted = grpo_loss(
        b.velocity, *args, b.advantages, transitions, b.step, row_weight=b.weight, **options
    )
    assert torch.equal(split.kl, plain.kl) and not torch.equal(weighted.kl, plain.kl)
    assert torch.equal(split.policy_loss, weighted.policy_loss)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_guided_gradients(backend, dtype):
    b, transitions, x_prev, old = replay(shape=(3, 5, 7), dtype=dtype)
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    rest = (b.sample, x_prev, old, b.advantages, transitions, b.step)
    options = {"kl_weight": 0.2, "clip_range": 0.5}
    guided = grpo_loss(
        v, *rest, uncond_velocity=u, guidance_scale=4.0, uncond_grad=True,
        ref_velocity=b.ref, ref_uncond_velocity=b.old, **options,
    )  # fmt: skip
    combine = lambda c, n: n.float() + (c.float() - n.float()) * 4.0  # noqa: E731
    c = combine(b.velocity, b.uncond).requires_grad_()
    plain = grpo_loss(c, *rest, ref_velocity=combine(b.ref, b.old), **options)
    assert torch.equal(guided.loss, plain.loss) and torch.equal(guided.ratio, plain.ratio)
    guided.loss.backward()
    plain.loss.backward()
    assert torch.equal(v.grad, (c.grad * 4.0).to(dtype))
    assert torch.equal(u.grad, (c.grad * -3.0).to(dtype))


def test_gradcheck():
    """All terms at once in float64, away from the clip's kinks."""
    b, transitions, x_prev, old = replay(shape=(2, 3), rows=3)
    d = b.to(torch.float64)

    def function(v, u):
        return grpo_loss(
            v, d.sample, x_prev.double(), old.double(), d.advantages, transitions, b.step,
            uncond_velocity=u, guidance_scale=1.5, uncond_grad=True, ref_velocity=d.ref,
            kl_weight=0.4, old_velocity=d.old, row_weight=d.weight, clip_range=0.9,
        ).loss  # fmt: skip

    inputs = (d.velocity.requires_grad_(), d.uncond.requires_grad_())
    assert torch.autograd.gradcheck(function, inputs, fast_mode=False)


def test_outputs(backend):
    b, transitions, x_prev, old = replay()
    v = b.velocity.clone().requires_grad_()
    result = grpo_loss(v, b.sample, x_prev, old, b.advantages, transitions, b.step)
    torch.testing.assert_close(result.ratio, (result.log_prob - old).exp(), rtol=1e-6, atol=0)
    assert result.loss.requires_grad and not any(x.requires_grad for x in result[1:])
    assert result.kl.item() == 0 and result.loss.shape == () and result.ratio.shape == (6,)
    outside = (result.ratio - 1).abs() > 1e-4
    assert result.clip_fraction.item() == pytest.approx(outside.float().mean().item())
    (3 * result.loss).backward()
    tripled, v.grad = v.grad, None
    grpo_loss(v, b.sample, x_prev, old, b.advantages, transitions, b.step).loss.backward()
    torch.testing.assert_close(tripled, 3 * v.grad, rtol=1e-6, atol=0)


def test_a_weight_of_a_term_that_is_not_there(backend):
    """Without ref_velocity there is no KL, whatever its weight is."""
    b, transitions, x_prev, old = replay(shape=(2, 3), rows=2)
    weight = torch.tensor([float("nan"), 1.0])
    args = (b.velocity, b.sample, x_prev, old, b.advantages, transitions, b.step)
    out = grpo_loss(*args, kl_row_weight=weight)
    assert out.kl == 0 and torch.isfinite(out.loss)


def test_empty_and_nan(backend):
    b, transitions, x_prev, old = replay(shape=(2, 3), rows=2)
    empty = [x[:0] for x in (b.velocity, b.sample, x_prev, old, b.advantages)]
    v = empty[0].requires_grad_()
    result = grpo_loss(v, *empty[1:], transitions, b.step[:0])
    result.loss.backward()
    assert result.loss.item() == 0 and result.ratio.shape == (0,) and v.grad.shape == (0, 2, 3)
    # A NaN that is not silenced reaches the loss and the gradient.
    v = b.velocity.requires_grad_()
    advantages = torch.tensor([float("nan"), 1.0])
    result = grpo_loss(v, b.sample, x_prev, old, advantages, transitions, b.step)
    result.loss.backward()
    assert result.loss.isnan() and v.grad[0].isnan().all() and torch.isfinite(v.grad[1]).all()
