"""Bit-for-bit properties (design rules 1 and 2), in every storage dtype and on every backend."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import Transitions, grpo_loss, log_prob, ode, sde_step
from flowgrpo_kernels.backends import dispatch
from support.kernels import oracle

pytestmark = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
SHAPES = ((3, 24, 24), (3, 5, 7), (2, 5000), (1,))


def stepped(kind, shape, dtype, rows=5, **guided):
    b = oracle.batch(rows, shape, dtype)
    transitions = oracle.make(kind)
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds, **guided)
    return b, transitions, out, lp


@pytest.mark.parametrize("kind", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_three_ops_one_log_prob(backend, dtype, kind, shape):
    """Round, then score: a stored x' is scored to the same bits, and the on-policy ratio is 1.0."""
    b, transitions, out, lp = stepped(kind, shape, dtype)
    assert torch.equal(lp, log_prob(b.velocity, b.sample, out, transitions, b.step))
    args = (b.velocity, b.sample, out, lp, b.advantages, transitions, b.step)
    plain = grpo_loss(*args, ref_velocity=b.ref, kl_weight=0.1)
    assert torch.equal(plain.log_prob, lp) and plain.ratio.eq(1.0).all()
    assert plain.clip_fraction.item() == 0
    if kind != "cps":
        guard = grpo_loss(*args, old_velocity=b.velocity)
        assert guard.ratio.eq(1.0).all()


def test_guided_on_policy_ratio(backend, dtype):
    rows = 5
    uncond = oracle.batch(rows, (3, 5, 7), dtype).uncond
    guided = {"uncond_velocity": uncond, "guidance_scale": 4.5}
    b, transitions, out, lp = stepped("flow_sde", (3, 5, 7), dtype, rows, **guided)
    result = grpo_loss(b.velocity, b.sample, out, lp, b.advantages, transitions, b.step, **guided)
    assert torch.equal(result.log_prob, lp) and result.ratio.eq(1.0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_do_not_see_the_batch(backend, dtype, shape):
    b, transitions, out, lp = stepped("flow_sde", shape, dtype, 6)
    velocity = b.velocity.clone().requires_grad_()
    log_prob(velocity, b.sample, out, transitions, b.step).sum().backward()
    for rows in ([4], [5, 0, 4], [2, 2, 2, 2, 2, 2, 2, 4]):
        v, x = b.velocity[rows], b.sample[rows]
        got = sde_step(v, x, transitions, b.step[rows], seeds=b.seeds[rows])
        assert torch.equal(got[0], out[rows]) and torch.equal(got[1], lp[rows])
        v = v.clone().requires_grad_()
        log_prob(v, x, out[rows], transitions, b.step[rows]).sum().backward()
        assert torch.equal(v.grad, velocity.grad[rows])


def test_run_to_run(backend, dtype):
    first, second = (stepped("flow_sde", (2, 5000), dtype) for _ in range(2))
    assert torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])


@pytest.mark.parametrize("kind", ["flow_sde", "cps"])
def test_backends_agree_bit_for_bit(backend, dtype, kind):
    """The contract of reference.py: samples, log_probs and gradients are the same bits."""
    if backend == "reference":
        pytest.skip("the others are compared with it")
    for shape in (*SHAPES, (8195,), (16, 17, 33)):
        b, transitions, out, lp = stepped(kind, shape, dtype)

        def gradient(b=b, out=out, transitions=transitions):
            v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
            score = log_prob(
                v, b.sample, out, transitions, b.step,
                uncond_velocity=u, guidance_scale=3.0, uncond_grad=True,
            )  # fmt: skip
            (score * b.weight).sum().backward()
            return score.detach(), v.grad, u.grad

        mine = gradient()
        with dispatch.use_backend("reference"):
            _, _, ref_out, ref_lp = stepped(kind, shape, dtype)
            theirs = gradient()
        assert torch.equal(out, ref_out) and torch.equal(lp, ref_lp)
        for got, expected in zip(mine, theirs, strict=True):
            assert torch.equal(got, expected)


def test_quiet_rows(backend, dtype):
    """An ODE row beside SDE rows: log_prob, KL and gradient exactly 0, the others unchanged."""
    b = oracle.batch(4, (3, 5, 7), dtype)
    both = Transitions.cat(oracle.make("flow_sde"), ode(oracle.SIGMAS))
    step = b.step + torch.tensor([0, 9, 0, 9])
    out, lp = sde_step(b.velocity, b.sample, both, step, seeds=b.seeds)
    assert lp[1::2].eq(0).all() and lp[0::2].ne(0).all()
    v = b.velocity.clone().requires_grad_()
    result = grpo_loss(
        v, b.sample, out, lp, b.advantages, both, step,
        ref_velocity=b.ref, kl_weight=0.5, old_velocity=b.old,
    )  # fmt: skip
    result.loss.backward()
    assert v.grad[1::2].eq(0).all() and v.grad[0::2].abs().sum() > 0
    assert torch.isfinite(result.loss)


@pytest.mark.parametrize("guard", [False, True])
def test_rows_without_a_gradient_have_none_whatever_they_hold(backend, dtype, guard):
    """A quiet row and a row of weight 0: gradient 0 beside NaN and infinite latents, NaN scores."""
    b = oracle.batch(4, (3, 5, 7), dtype)
    both = Transitions.cat(oracle.make("flow_sde"), ode(oracle.SIGMAS))
    step = b.step + torch.tensor([0, 9, 0, 9])
    out, lp = sde_step(b.velocity, b.sample, both, step, seeds=b.seeds)

    def gradients(bad: bool) -> list[torch.Tensor]:
        """Of log_prob with upstream gradient 0 in row 2, and of the loss with row 2 of weight 0."""
        v = b.velocity.clone()
        sample, ref, old, score, adv = (
            x.clone() for x in (b.sample, b.ref, b.old, lp, b.advantages)
        )
        if bad:
            v[1, 0], sample[1, 1], ref[1, 1] = float("nan"), float("inf"), float("-inf")
            v[2], ref[2, 0], old[2, 1] = float("inf"), float("nan"), float("nan")
            score[1:3], adv[1:3] = float("nan"), float("nan")
        one, two = v.clone().requires_grad_(), v.clone().requires_grad_()
        weight = torch.tensor([1.0, 1.0, 0.0, 1.0])
        log_prob(one, sample, out, both, step).backward(weight)
        grpo_loss(
            two, sample, out, score, adv, both, step, ref_velocity=ref, kl_weight=0.5,
            row_weight=weight, old_velocity=old if guard else None,
        ).loss.backward()  # fmt: skip
        return [one.grad, two.grad]

    for good, bad in zip(gradients(False), gradients(True), strict=True):
        assert good[1:].eq(0).all() and good[0].ne(0).any()
        assert torch.equal(good, bad)
