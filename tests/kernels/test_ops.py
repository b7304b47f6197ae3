"""The ops as torch ops: opcheck, torch.compile without graph breaks or recompiles."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounterWithBackend

from flowgrpo_kernels import (
    flow_sde,
    grpo_loss,
    initial_noise,
    log_prob,
    nft_loss,
    sde_step,
    transition_rows,
)
from flowgrpo_kernels.backends import dispatch
from support.kernels import oracle

TRANSITIONS = flow_sde(oracle.SIGMAS)


def arguments(dtype=torch.float32):
    """Positional arguments of each op."""
    b = oracle.batch(3, (2, 3, 5), dtype)
    x_prev = torch.randn(3, 2, 3, 5).to(dtype)
    guided = (b.velocity, b.uncond, 2.0, b.sample)
    plain = (b.velocity, None, 1.0, b.sample)
    table, step, old = TRANSITIONS.table, b.step, torch.zeros(3)
    loss = (old, b.advantages, table, step, b.ref, None, b.old, b.weight, None, 0.1, 0.1, 0.2, 5.0)
    buffers = (torch.zeros_like(b.sample), torch.zeros(3))
    moments = (3, 2, 3, 5)
    pair = torch.tensor([0.9, 0.5, 0.2]), torch.tensor([0.5, 0.2, 0.1])
    level = torch.tensor(0.7, dtype=torch.float64)
    n = oracle.nft_batch(3, (2, 3, 5), dtype)
    nft = (n.sample, n.x0, n.old, n.sigma, n.optimality, n.ref)
    rest = (None, n.weight, None, 0.7, 1e-5, 0.2)
    plain_nft = (n.velocity, None, 1.0, *nft, *rest)
    guided_nft = (n.velocity, n.uncond, 2.0, *nft, n.uncond, *rest[1:])
    return {
        "sde_step": (*plain, table, step, b.seeds, None, *buffers),
        "sde_step guided": (*guided, table, step, None, torch.randn_like(b.sample), *buffers),
        "log_prob": (*plain, x_prev, table, step),
        "log_prob guided": (*guided, x_prev, table, step),
        "log_prob_backward": (torch.randn(3), *plain, x_prev, table, step, False),
        "log_prob_backward guided": (torch.randn(3), *guided, x_prev, table, step, True),
        "grpo_loss_forward": (*plain, x_prev, *loss),
        "grpo_loss_forward guided": (*guided, x_prev, *loss),
        "grpo_loss_gradient": (*plain, x_prev, *loss, 0.3, False),
        "grpo_loss_gradient guided": (*guided, x_prev, *loss, 1.0, True),
        "grpo_loss_backward": (
            torch.tensor(1.0), torch.randn(3, 3), *guided, x_prev, table, step,
            b.ref, b.uncond, b.old, True,
        ),
        "nft_loss_forward": plain_nft,
        "nft_loss_forward guided": guided_nft,
        "nft_loss_gradient": (*plain_nft, 0.3, False),
        "nft_loss_gradient guided": (*guided_nft, 1.0, True),
        "nft_loss_backward": (
            torch.tensor(1.0), torch.randn(3, 3), n.velocity, n.uncond, 2.0, n.sample, n.x0, n.old,
            n.sigma, n.ref, n.uncond, 0.7, True,
        ),
        "initial_noise": (b.seeds, [2, 3], torch.bfloat16),
        "sde_step mean": (
            *plain, table, step, b.seeds, None, *buffers, torch.zeros(moments), torch.zeros(moments)
        ),
        "log_prob_mean": (*guided, x_prev, table, step, True),
        "log_prob_mean_backward": (
            torch.randn(3), torch.randn(moments), None, *guided, x_prev, table, step, True
        ),
        "transition_rows": (*pair, level, pair[0][1], None, 3, 0, 3, 0.0),
    }  # fmt: skip


def checks():
    """Each op in both dtypes: without guidance in float32 and with it in bfloat16, where it takes
    any, or all alike."""
    names = list(arguments())
    for case in names:
        pair = f"{case.removesuffix(' guided')} guided" in names
        if not pair or not case.endswith(" guided"):
            yield case, torch.float32
        if not pair or case.endswith(" guided"):
            yield case, torch.bfloat16


@pytest.mark.parametrize(("case", "dtype"), checks(), ids=str)
def test_opcheck(case, dtype):
    name = case.split()[0]
    result = torch.library.opcheck(dispatch.op(name), arguments(dtype)[case])
    assert set(result.values()) == {"SUCCESS"} and len(result) == 4


def rollout(sample, velocity, step, seeds):
    return sde_step(velocity, sample, TRANSITIONS, step, seeds=seeds)


def update(velocity, sample, x_prev, old, advantages, step, ref):
    return grpo_loss(
        velocity * 1.5, sample, x_prev, old, advantages, TRANSITIONS, step,
        ref_velocity=ref, kl_weight=0.1,
    )  # fmt: skip


def forward_process(velocity, sample, x0, old, sigma, optimality, ref):
    return nft_loss(
        velocity * 1.5, sample, x0, old, sigma, optimality, ref_velocity=ref, kl_weight=0.1
    )


def score(velocity, sample, x_prev, step):
    return log_prob(velocity * 1.5, sample, x_prev, TRANSITIONS, step).sum()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, None])
def test_compile_without_recompiling(dynamic):
    """One graph serves every step, seed, advantage and velocity; results are the eager ones."""
    torch._dynamo.reset()
    counters = [CompileCounterWithBackend("aot_eager") for _ in range(3)]
    functions = (rollout, update, score)
    compiled = [
        torch.compile(f, backend=c, fullgraph=True, dynamic=dynamic)
        for f, c in zip(functions, counters, strict=True)
    ]
    for i in range(5):
        b = oracle.batch(3, (2, 3, 5))
        step, seeds = torch.tensor([i, i + 1, i + 3]), b.seeds + i
        with torch.no_grad():
            got, expected = (f(b.sample, b.velocity, step, seeds) for f in (compiled[0], rollout))
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])
        grads = []
        for f in (compiled[1], update):
            v = b.velocity.clone().requires_grad_()
            out = f(v, b.sample, got[0], got[1], b.advantages * i, step, b.ref)
            out.loss.backward()
            grads.append((out.loss.detach(), out.ratio, v.grad))
        assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))
        grads = []
        for f in (compiled[2], score):
            v = b.velocity.clone().requires_grad_()
            f(v, b.sample, got[0], step).backward()
            grads.append(v.grad)
        assert torch.equal(*grads)
    assert [c.frame_count for c in counters] == [1, 1, 1]


@pytest.mark.slow
def test_compile_of_rows_and_means():
    """Rows made of tensors and a score with its mean, in one graph."""
    torch._dynamo.reset()

    def f(velocity, sample, x_prev, sigma, level):
        made = transition_rows("flow_sde", sigma, sigma / 2, level, sigma_max=0.9)
        lp, mean = log_prob(velocity * 1.5, sample, x_prev, made, torch.arange(3), return_mean=True)
        return lp.sum() + (mean * x_prev).sum()

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    b, grads = oracle.batch(3, (2, 3, 5)), []
    for call in (compiled, f):
        v = b.velocity.clone().requires_grad_()
        call(v, b.sample, b.old, torch.tensor([0.8, 0.5, 0.3]), torch.full((3,), 0.7)).backward()
        grads.append(v.grad)
    assert torch.equal(*grads)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, None])
def test_compile_of_nft_loss(dynamic):
    """One graph serves every velocity, sigma and optimality; results are the eager ones."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(forward_process, backend=counter, fullgraph=True, dynamic=dynamic)
    for i in range(4):
        b = oracle.nft_batch(3, (2, 3, 5))
        rest = (b.sample, b.x0, b.old, b.sigma / (i + 1), b.optimality * i / 4, b.ref)
        results = []
        for f in (compiled, forward_process):
            v = b.velocity.clone().requires_grad_()
            out = f(v, *rest)
            (2 * out.loss).backward()
            results.append((*(x.detach() for x in out), v.grad))
        assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compile_fills_a_trajectory():
    """Writing into a slice of a buffer works inside a compiled function."""
    torch._dynamo.reset()

    def loop(latents, scores, velocity, seeds, steps):
        for i in range(3):
            sde_step(
                velocity, latents[i], TRANSITIONS, steps[i], seeds=seeds,
                out=latents[i + 1], log_prob_out=scores[i],
            )  # fmt: skip
        return latents, scores

    b = oracle.batch(3, (2, 3, 5))
    steps = torch.arange(3)
    results = []
    for f in (loop, torch.compile(loop, backend="aot_eager", fullgraph=True)):
        latents, scores = torch.zeros(4, *b.sample.shape), torch.zeros(3, 3)
        latents[0] = initial_noise(b.seeds, (2, 3, 5))
        with torch.no_grad():
            results.append(f(latents, scores, b.velocity, b.seeds, steps))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert results[0][0][1:].ne(0).any(1).all()
