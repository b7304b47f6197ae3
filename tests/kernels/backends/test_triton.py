"""The Triton kernels in Triton's interpreter, bit for bit against the reference.

The interpreter takes about a third of a second a program, so every case has one or two rows, and
the cases share out dtypes, switches and sizes. Bits equal to the reference carry its other tests
over.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch

from flowgrpo_kernels import (
    grpo_loss,
    initial_noise,
    log_prob,
    ode,
    reference,
    sde_step,
    transition_rows,
)
from flowgrpo_kernels.backends import dispatch, triton
from flowgrpo_kernels.compat.steps import score, take_step
from flowgrpo_kernels.grpo_loss import grpo_loss_totals_kernel
from flowgrpo_kernels.row_laws import LAWS
from flowgrpo_kernels.transition_rows import transition_rows_op
from support.kernels import oracle

pytestmark = pytest.mark.skipif(
    not (triton.interpreting() and dispatch.backends()["triton"]["available"]),
    reason="needs Triton and TRITON_INTERPRET=1",
)
PAIRS = list(itertools.product(oracle.DTYPES, oracle.DTYPES))


def both(function):
    """function() on Triton and on the reference."""
    with dispatch.use_backend("triton"):
        mine = function()
    with dispatch.use_backend("reference"):
        return mine, function()


def same(function):
    mine, theirs = both(function)
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    return mine


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sample_dtype"), PAIRS, ids=str)
def test_step_and_score_in_every_dtype(dtype, sample_dtype):
    """One guided row: x', log_prob, its replay, and both gradients."""
    b = oracle.batch(1, (3, 5, 7), dtype, sample_dtype)
    transitions = oracle.make("flow_sde")

    def run():
        guided = {"uncond_velocity": b.uncond, "guidance_scale": 3.5}
        out, lp = sde_step(b.velocity, b.sample, transitions, 3, seeds=b.seeds, **guided)
        v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
        guided = {"uncond_velocity": u, "guidance_scale": 3.5, "uncond_grad": True}
        replay = log_prob(v, b.sample, out, transitions, 3, **guided)
        assert torch.equal(replay, lp)
        (replay * 0.7).sum().backward()
        return out, lp, v.grad, u.grad

    same(run)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4096,), (4097,), (2, 5000), (1,), (64,)], ids=str)
def test_sizes(shape):
    """Full blocks, several blocks, a tail of one element, one element."""
    b = oracle.batch(2, shape)
    transitions = oracle.make("cps")

    def run():
        out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
        v = b.velocity.clone().requires_grad_()
        replay = log_prob(v, b.sample, out, transitions, b.step)
        replay.sum().backward()
        return out, lp, replay.detach(), v.grad

    out, lp, replay, _ = same(run)
    assert torch.equal(lp, replay) and torch.isfinite(out).all()


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(3, 5, 7), (4097,)], ids=str)
def test_mean_and_x0(shape):
    """Of the step and of the score, with the gradient of all three."""
    b = oracle.batch(1, shape, torch.bfloat16, torch.float32)
    transitions, g = oracle.make("flow_sde"), torch.randn(1, *shape)

    def run():
        mean, x0 = torch.empty_like(b.sample), torch.empty_like(b.sample)
        out, lp = sde_step(
            b.velocity, b.sample, transitions, 3, seeds=b.seeds, mean_out=mean, x0_out=x0
        )
        v = b.velocity.clone().requires_grad_()
        replay = log_prob(v, b.sample, out, transitions, 3, return_mean=True, return_x0=True)
        (dv,) = torch.autograd.grad(replay, v, (b.weight, g, -g))
        for one, two in zip(replay, (lp, mean, x0), strict=True):
            assert torch.equal(one, two)
        return out, lp, mean, x0, dv

    same(run)


@pytest.mark.slow
def test_storage_of_another_dtype():
    """x' in bfloat16 of a float32 sample, as drop-ins store it; scored as it is stored."""
    b, table = oracle.batch(1, (3, 5, 7)), oracle.make("flow_sde").table
    result = same(lambda: take_step(
        b.velocity, b.sample, table, b.step, seeds=b.seeds, storage=torch.bfloat16, with_x0=True
    ))  # fmt: skip
    assert result[0].dtype == torch.bfloat16
    replay = same(lambda: score(b.velocity, b.sample, result[0], table, b.step)[:3])
    assert torch.equal(replay[1], result[1])


@pytest.mark.slow
def test_transition_rows():
    """Every law and flag in float64, poisoned rows, and a score without noise."""
    s = torch.tensor([1.0, 1.0, 0.9, 0.5, 0.3, 0.2, 0.2, 0.7], dtype=torch.float64)
    p = torch.tensor([0.9, 0.0, 0.5, 0.3, 0.0, 0.1, 0.3, 0.1], dtype=torch.float64)
    a = torch.tensor([0.7, 1.3, 0.0, 2.0, 1.0, 0.3, 0.5, math.nan], dtype=torch.float64)
    step = torch.arange(8)
    for law, name in enumerate(LAWS):
        for flags in (3, 12) if law != 2 else (0, 15):
            args = (s, p, a, s[2], step if flags == 3 else None, 8, law, flags, 0.0)
            mine, theirs = both(lambda args=args: transition_rows_op(*args))
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0, equal_nan=True, msg=name)
            assert mine[:, 0].isnan().tolist() == [False] * 6 + [True] * 2
    args = (s.float()[:1], p.float()[:1], a[:1].float(), s[2].float(), None, 1, 0, 3, 1e-5)
    same(lambda: (transition_rows_op(*args),))
    b, quiet = oracle.batch(1, (3, 5)), transition_rows("ode", s[3:4], p[3:4], score_quiet=True)
    same(lambda: (log_prob(b.velocity, b.sample, b.old, quiet, 0),))


@pytest.mark.slow
def test_noise():
    b = oracle.batch(2, (5, 7))
    given = torch.randn(2, 5, 7).bfloat16()
    args = (b.velocity, b.sample)
    same(lambda: sde_step(*args, oracle.make("dance_sde"), 2, noise=given))
    same(lambda: sde_step(*args, ode(oracle.SIGMAS), b.step))
    for dtype in oracle.DTYPES:
        same(lambda dtype=dtype: (initial_noise(b.seeds, (3, 5, 7), dtype=dtype),))
    same(lambda: (initial_noise(b.seeds[:1], (4100,)),))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guided", "guard", "shape", "dtype"),
    # Every two of them together.
    [
        (False, False, (3, 5, 7), torch.float32),
        (True, True, (3, 5, 7), torch.float32),
        (True, False, (4100,), torch.bfloat16),
        (False, True, (4100,), torch.bfloat16),
    ],
    ids=str,
)
def test_loss(guided, guard, shape, dtype):
    """All of the loss, its exp included."""
    b = oracle.batch(2, shape, dtype)
    transitions = oracle.make("flow_sde")
    with dispatch.use_backend("reference"):
        x_prev, old = sde_step(b.old, b.sample, transitions, b.step, seeds=b.seeds)
    half = {"ref_uncond_velocity": b.old, "guidance_scale": 2.0, "uncond_grad": True}

    def run():
        v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
        result = grpo_loss(
            v, b.sample, x_prev, old + 0.01, b.advantages, transitions, b.step,
            ref_velocity=b.ref, kl_weight=0.3, clip_range=(1e-3, 0.5),
            row_weight=b.weight if guard else None, old_velocity=b.old if guard else None,
            **({"uncond_velocity": u, **half} if guided else {}),
        )  # fmt: skip
        result.loss.backward()
        grads = (v.grad, u.grad) if guided else (v.grad,)
        return [x.detach() for x in result], grads

    (mine, grads), (theirs, expected) = both(run)
    for got, exact in zip((*mine, *grads), (*theirs, *expected), strict=True):
        torch.testing.assert_close(got, exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
def test_programs_of_a_block_choose_no_bit(monkeypatch):
    """sde_step gives a block to four programs or to one, by how many blocks there are."""
    b = oracle.batch(1, (2, 4096), torch.bfloat16, torch.float32)
    transitions, programs = oracle.make("flow_sde"), []
    module, launched = importlib.import_module("flowgrpo_kernels.sde_step"), triton.launch

    def launch(kernel, count, *args, **constants):
        programs.append(count)
        launched(kernel, count, *args, **constants)

    monkeypatch.setattr(triton, "launch", launch)
    results = []
    for few in (module.FEW_BLOCKS, 0):
        monkeypatch.setattr(module, "FEW_BLOCKS", few)
        with dispatch.use_backend("triton"):
            results.append(sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds))
    assert programs == [8, 1, 2, 1]
    with dispatch.use_backend("reference"):
        expected = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
    for got in results:
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("count", [1, 2, 3, 32, 33, 128, 129, 1000, 1024, 1025, 2100])
def test_second_passes(count):
    """Sums over the blocks of a row and over the rows of a batch, in the order of the contract."""
    quarters = torch.randn(count, 4) * 10.0 ** torch.randint(-3, 4, (count, 4))
    pairs = quarters[:, 0::2] + quarters[:, 1::2]
    expected = reference.ordered_sum((pairs[:, 0] + pairs[:, 1])[None])
    one, table = torch.zeros(1, dtype=torch.int64), oracle.make("flow_sde").table
    lp = torch.empty(1)
    sizes = (4096 * count, table.shape[0], 1, count)
    launch = triton.finish_kernel[(1,)]
    launch(quarters, lp, table, one, *sizes, **triton.second_pass(count))
    c, k, c0 = table[0, 2:5]
    assert c > 0 and torch.equal(lp[0], -(k * (expected[0] / (4096 * count))) - c0)

    terms = torch.randn(3, count) * 10.0 ** torch.randint(-3, 4, (3, count))
    expected = reference.ordered_sum(terms)
    loss, policy, kl, fraction = (torch.empty(()) for _ in range(4))
    launch = grpo_loss_totals_kernel[(1,)]
    launch(terms, loss, policy, kl, fraction, 0.25, count, REF=True, **triton.ONE_WARP)
    means = expected / count
    assert torch.equal(torch.stack((policy, kl, fraction)), means)
    assert torch.equal(loss, means[0] + 0.25 * means[1])


@pytest.mark.slow
def test_on_policy_ratio():
    b = oracle.batch(2, (3, 5, 7), torch.bfloat16)
    transitions = oracle.make("flow_sde")
    with dispatch.use_backend("triton"):
        out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds)
        args = (b.velocity, b.sample, out, lp, b.advantages, transitions, b.step)
        assert grpo_loss(*args, old_velocity=b.velocity).ratio.eq(1.0).all()
        # The same row in another batch.
        one = sde_step(b.velocity[1:], b.sample[1:], transitions, b.step[1:], seeds=b.seeds[1:])
        assert torch.equal(one[0], out[1:]) and torch.equal(one[1], lp[1:])


@pytest.mark.slow
def test_edges():
    """Empty batch, no elements, a step outside the table, NaN advantages, weight 0, ties."""
    b = oracle.batch(3, (4,))
    transitions = oracle.make("flow_sde")
    step = torch.tensor([3, 9, -1])

    def unknowable():
        out, lp = torch.zeros(3, 4), torch.zeros(3)
        dispatch.op("sde_step")(
            b.velocity, None, 1.0, b.sample, transitions.table, step, b.seeds, None, out, lp
        )
        return out.isnan(), lp.isnan()

    assert same(unknowable)[1].tolist() == [False, True, True]

    def weighted():
        v = b.velocity.clone().requires_grad_()
        result = grpo_loss(
            v, b.sample, b.old, torch.zeros(3), torch.tensor([9.0, float("nan"), 0.0]),
            transitions, 2, row_weight=torch.tensor([1.0, 0.0, 1.0]), clip_range=0.0,
        )  # fmt: skip
        result.loss.backward()
        return result.log_prob.detach(), result.clip_fraction, v.grad.eq(0)

    same(weighted)

    def empty():
        none, nothing = b.velocity[:0].clone().requires_grad_(), torch.zeros(2, 0)
        rows = (b.sample[:0], b.old[:0], torch.zeros(0), torch.zeros(0))
        result = grpo_loss(none, *rows, transitions, step[:0])
        result.loss.backward()
        _, lp = sde_step(nothing, nothing, transitions, 3, seeds=b.seeds[:2])
        return (
            result.loss.detach(),
            none.grad,
            lp,
            log_prob(nothing, nothing, nothing, transitions, 3),
        )

    same(empty)
