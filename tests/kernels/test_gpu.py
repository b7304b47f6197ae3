"""On a GPU: the kernels give the reference's bits, never synchronise, and can be captured."""

from __future__ import annotations

import oracle
import pytest
import torch

from flowgrpo_kernels import _ops, flow_sde, grpo_loss, initial_noise, log_prob, sde_step

pytestmark = pytest.mark.gpu
SHAPES = ((3, 24, 24), (16, 64, 64), (3, 5, 7), (4097,), (4, 3, 6, 10), (1,))


@pytest.fixture(autouse=True)
def _on_triton():
    with _ops.use_backend("triton"):
        yield


def cuda(b: oracle.Batch) -> oracle.Batch:
    return oracle.Batch(*(value.cuda() for value in vars(b).values()))


def micro_step(b, transitions, loss=True):
    """Sample, replay and loss with gradients; every result."""
    guided = {"uncond_velocity": b.uncond, "guidance_scale": 3.0}
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds, **guided)
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    guided = {"uncond_velocity": u, "guidance_scale": 3.0, "uncond_grad": True}
    score = log_prob(v, b.sample, out, transitions, b.step, **guided)
    (score * b.weight).sum().backward()
    exact = [out, lp, score.detach(), v.grad.clone(), u.grad.clone()]
    v.grad = u.grad = None
    result = grpo_loss(
        v, b.sample, out, lp + 0.01, b.advantages, transitions, b.step, ref_velocity=b.ref,
        kl_weight=0.1, old_velocity=b.old, row_weight=b.weight, **guided,
    )  # fmt: skip
    result.loss.backward()
    return exact, [x.detach() for x in result] + [v.grad, u.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("sample_dtype", oracle.DTYPES, ids=str)
def test_bits_of_the_reference(shape, dtype, sample_dtype):
    b = oracle.batch(5, shape, dtype, sample_dtype)
    transitions = flow_sde(oracle.SIGMAS)
    with _ops.use_backend("reference"):
        exact, close = micro_step(b, transitions)
    got_exact, got_close = micro_step(cuda(b), transitions.to("cuda"))
    for got, expected in zip(got_exact, exact, strict=True):
        assert torch.equal(got.cpu(), expected)
    rtol = 1e-5 if dtype == torch.float32 else 1e-2
    for got, expected in zip(got_close, close, strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=rtol, atol=1e-6)
    noise = initial_noise(b.seeds.cuda(), shape)
    with _ops.use_backend("reference"):
        assert torch.equal(noise.cpu(), initial_noise(b.seeds, shape))


def test_no_synchronisation():
    b, transitions = cuda(oracle.batch(4)), flow_sde(oracle.SIGMAS).to("cuda")
    micro_step(b, transitions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step(b, transitions)
        sde_step(b.velocity, b.sample, transitions, 3, seeds=b.seeds)
        sde_step(b.velocity, b.sample, transitions, torch.tensor(3), seeds=b.seeds)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_rollout():
    """A graph of three steps: each replay draws fresh noise from seeds on the device."""
    b, transitions = cuda(oracle.batch(4)), flow_sde(oracle.SIGMAS).to("cuda")
    seeds, latents = b.seeds.clone(), torch.zeros(4, *b.sample.shape, device="cuda")
    steps, scores = torch.arange(3, device="cuda"), torch.zeros(3, 4, device="cuda")

    def rollout():
        latents[0].copy_(initial_noise(seeds, b.sample.shape[1:]))
        for i in range(3):
            sde_step(
                b.velocity, latents[i], transitions, steps[i], seeds=seeds,
                out=latents[i + 1], log_prob_out=scores[i],
            )  # fmt: skip

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        rollout()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rollout()
    for shift in (0, 1):
        seeds.copy_(b.seeds + shift)
        graph.replay()
        captured = latents.clone(), scores.clone()
        rollout()
        assert torch.equal(captured[0], latents) and torch.equal(captured[1], scores)
    assert not torch.equal(captured[0][0], initial_noise(b.seeds, b.sample.shape[1:]))


def test_nothing_recompiles():
    """Step, batch and coefficients are data: one compilation of each kernel serves them."""
    from flowgrpo_kernels.sde_step import _sde_step_kernel

    def variants() -> int:
        return sum(len(entry[0]) for entry in _sde_step_kernel.device_caches.values())

    b = cuda(oracle.batch(8))
    sde_step(b.velocity, b.sample, flow_sde(oracle.SIGMAS).to("cuda"), b.step, seeds=b.seeds)
    before = variants()
    for rows in (1, 2, 7):
        for step in (0, 1, 5):
            transitions = flow_sde(oracle.SIGMAS[: step + 3], 0.1 * rows).to("cuda")
            sde_step(b.velocity[:rows], b.sample[:rows], transitions, step, seeds=b.seeds[:rows])
    assert variants() == before


def test_past_two_to_the_31():
    """Offsets are 64-bit: rows that begin past element 2^31 give the bits they give alone."""
    n = (1 << 30) + 4096
    transitions = flow_sde(oracle.SIGMAS).to("cuda")
    v = torch.empty(3, n, dtype=torch.bfloat16, device="cuda").normal_()
    x = torch.empty(3, n, dtype=torch.bfloat16, device="cuda").normal_()
    seeds = torch.arange(3, device="cuda")
    out, lp = sde_step(v, x, transitions, 4, seeds=seeds)
    one, score = sde_step(v[2:], x[2:], transitions, 4, seeds=seeds[2:])
    assert torch.equal(out[2:], one) and torch.equal(lp[2:], score)
    assert torch.equal(log_prob(v, x, out, transitions, 4), lp)
