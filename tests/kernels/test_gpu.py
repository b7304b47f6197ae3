"""On a GPU: the kernels give the reference's bits, never synchronise, and can be captured."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels import (
    checks,
    flow_sde,
    grpo_loss,
    initial_noise,
    log_prob,
    nft_loss,
    sde_step,
    warm_up,
)
from flowgrpo_kernels.backends import compiled, dispatch
from support.kernels import oracle

pytestmark = pytest.mark.gpu
SHAPES = ((3, 24, 24), (16, 64, 64), (3, 5, 7), (4097,), (4, 3, 6, 10), (1,))


@pytest.fixture(autouse=True, params=["compiled", "triton"])
def launched(request):
    """Each test on the compiled kernels and on Triton's, where they are available."""
    state = dispatch.backends()[request.param]
    if not state["available"]:
        pytest.skip(f"{request.param}: {state['reason']}")
    # What is not shipped compiled is Triton's part, here as in use.
    with dispatch.use_backend("auto" if request.param == "compiled" else "triton"):
        assert dispatch.backend_of("sde_step", "cuda") == request.param
        yield request.param


def cuda(b: oracle.Batch) -> oracle.Batch:
    return oracle.Batch(*(value.cuda() for value in vars(b).values()))


def captured(function) -> torch.cuda.CUDAGraph:
    """The graph of one call, after a first one that compiles or loads the kernels."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def micro_step(b, transitions):
    """Sample, replay and loss with gradients; every result."""
    guided = {"uncond_velocity": b.uncond, "guidance_scale": 3.0}
    out, lp = sde_step(b.velocity, b.sample, transitions, b.step, seeds=b.seeds, **guided)
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    guided = {"uncond_velocity": u, "guidance_scale": 3.0, "uncond_grad": True}
    score = log_prob(v, b.sample, out, transitions, b.step, **guided)
    (score * b.weight).sum().backward()
    results = [out, lp, score.detach(), v.grad.clone(), u.grad.clone()]
    v.grad = u.grad = None
    result = grpo_loss(
        v, b.sample, out, lp + 0.01, b.advantages, transitions, b.step, ref_velocity=b.ref,
        kl_weight=0.1, old_velocity=b.old, row_weight=b.weight, **guided,
    )  # fmt: skip
    result.loss.backward()
    return [*results, *(x.detach() for x in result), v.grad, u.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("sample_dtype", oracle.DTYPES, ids=str)
def test_bits_of_the_reference(shape, dtype, sample_dtype):
    b = oracle.batch(5, shape, dtype, sample_dtype)
    transitions = flow_sde(oracle.SIGMAS)
    with dispatch.use_backend("reference"):
        results = micro_step(b, transitions)
    for got, expected in zip(micro_step(cuda(b), transitions.to("cuda")), results, strict=True):
        assert torch.equal(got.cpu(), expected)
    noise = initial_noise(b.seeds.cuda(), shape)
    with dispatch.use_backend("reference"):
        assert torch.equal(noise.cpu(), initial_noise(b.seeds, shape))


def forward_process(b: oracle.NftBatch) -> list[torch.Tensor]:
    """nft_loss with guidance and KL, its results and gradients."""
    v, u = b.velocity.clone().requires_grad_(), b.uncond.clone().requires_grad_()
    out = nft_loss(
        v, *b.args[1:], beta=0.7, ref_velocity=b.ref, kl_weight=0.2, row_weight=b.weight,
        uncond_velocity=u, guidance_scale=3.0, uncond_grad=True,
    )  # fmt: skip
    out.loss.backward()
    return [*(x.detach() for x in out), v.grad, u.grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_nft_loss_gives_the_bits_of_the_reference(shape, dtype):
    b = oracle.nft_batch(5, shape, dtype, torch.float32)
    with dispatch.use_backend("reference"):
        expected = forward_process(b)
    on_gpu = oracle.NftBatch(*(value.cuda() for value in vars(b).values()))
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = forward_process(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, two in zip(got, expected, strict=True):
        assert torch.equal(one.cpu(), two)


@pytest.mark.parametrize("shape", [(3, 5, 7), (16, 12, 20)], ids=str)
def test_the_reference_gives_its_bits_on_a_gpu_too(shape):
    b, transitions = oracle.batch(5, shape, torch.bfloat16), flow_sde(oracle.SIGMAS)
    with dispatch.use_backend("reference"):
        expected, _ = micro_step(b, transitions)
        got, _ = micro_step(cuda(b), transitions.to("cuda"))
    assert all(torch.equal(x.cpu(), y) for x, y in zip(got, expected, strict=True))


def test_no_synchronisation():
    b, transitions = cuda(oracle.batch(4)), flow_sde(oracle.SIGMAS).to("cuda")
    micro_step(b, transitions)
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step(b, transitions)
        sde_step(b.velocity, b.sample, transitions, 3, seeds=b.seeds)
        sde_step(b.velocity, b.sample, transitions, torch.tensor(3), seeds=b.seeds)
        sde_step(b.velocity, b.sample, transitions, b.step[0], seeds=b.seeds)
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

    graph = captured(rollout)
    for shift in (0, 1):
        seeds.copy_(b.seeds + shift)
        graph.replay()
        replayed = latents.clone(), scores.clone()
        rollout()
        assert torch.equal(replayed[0], latents) and torch.equal(replayed[1], scores)
    assert not torch.equal(replayed[0][0], initial_noise(b.seeds, b.sample.shape[1:]))


def test_captured_micro_step():
    """Loss and gradient as a graph: new velocities, steps and advantages, the uncaptured bits."""
    transitions = flow_sde(oracle.SIGMAS).to("cuda")
    b, other = cuda(oracle.batch(4)), cuda(oracle.batch(4, dtype=torch.float16).to(torch.float32))
    v = b.velocity.clone().requires_grad_()
    x_prev, old = torch.empty_like(b.sample), torch.empty(4, device="cuda")
    results = {}

    def step():
        with torch.no_grad():
            sde_step(v, b.sample, transitions, b.step, seeds=b.seeds, out=x_prev, log_prob_out=old)
        out = grpo_loss(v, b.sample, x_prev, old, b.advantages, transitions, b.step)
        (gradient,) = torch.autograd.grad(out.loss, v)
        results.update(loss=out.loss.detach(), ratio=out.ratio, gradient=gradient)

    graph = captured(step)
    static = dict(results)
    with torch.no_grad():
        v.copy_(other.velocity)
        b.step.copy_(b.step.flip(0))
        b.advantages.mul_(-2)
    graph.replay()
    replayed = {name: value.clone() for name, value in static.items()}
    step()
    for name, value in results.items():
        assert torch.equal(replayed[name], value), name
    assert replayed["ratio"].eq(1.0).all() and replayed["gradient"].abs().sum() > 0


def test_launches_of_a_micro_step(monkeypatch):
    """Four kernels in all, forward and backward; one step for all rows costs no copy."""
    monkeypatch.undo()  # the poisoned buffers are launches too
    activity = torch.profiler.ProfilerActivity.CUDA
    if activity not in torch.profiler.supported_activities():
        pytest.skip("this PyTorch cannot trace kernels")
    transitions, b = flow_sde(oracle.SIGMAS).to("cuda"), cuda(oracle.batch(4))
    v, one = b.velocity.clone().requires_grad_(), torch.ones((), device="cuda")
    old = torch.zeros(4, device="cuda")

    def micro():
        out = grpo_loss(v, b.sample, b.old, old, b.advantages, transitions, 3, ref_velocity=b.ref)
        torch.autograd.grad(out.loss, v, one)

    micro()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[activity]) as profile:
        micro()
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(kernels) == 4 and all("kernel" in name for name in kernels), kernels


def test_debug_switch(monkeypatch):
    """A step outside the table: NaN rows, or with FLOWGRPO_DEBUG=1 an error."""
    transitions, b = flow_sde(oracle.SIGMAS).to("cuda"), cuda(oracle.batch(3))
    step = torch.tensor([3, 9, -1], device="cuda")
    monkeypatch.setattr(checks, "DEBUG", False)
    out, lp = sde_step(b.velocity, b.sample, transitions, step, seeds=b.seeds)
    assert lp.isnan().tolist() == out.flatten(1).isnan().all(1).tolist() == [False, True, True]
    monkeypatch.setattr(checks, "DEBUG", True)
    with pytest.raises(ValueError, match=r"step must be in \[0, 8\]"):
        sde_step(b.velocity, b.sample, transitions, step, seeds=b.seeds)
    half = torch.full((3,), 0.5, device="cuda")
    with pytest.raises(ValueError, match=r"sigma must be in \[0, 1\], got 500 in row 0"):
        nft_loss(b.velocity, b.sample, b.old, b.ref, 1000 * half, half)
    sde_step(b.velocity, b.sample, transitions, step[:1].expand(3), seeds=b.seeds)


def test_nothing_recompiles(launched):
    """Step, batch and coefficients are data: one compilation of each kernel serves them."""
    if launched == "compiled":
        pytest.skip("compiled ahead")
    from flowgrpo_kernels.grpo_loss import (
        grpo_loss_backward_kernel,
        grpo_loss_rows_kernel,
        grpo_loss_totals_kernel,
    )
    from flowgrpo_kernels.sde_step import sde_step_kernel

    loss = (grpo_loss_rows_kernel, grpo_loss_totals_kernel, grpo_loss_backward_kernel)
    kernels = (sde_step_kernel, *loss)

    def run(rows, step, transitions):
        v, x, old = (z[:rows] for z in (b.velocity, b.sample, b.advantages))
        _, lp = sde_step(v, x, transitions, step, seeds=b.seeds[:rows])
        v = v.clone().requires_grad_()
        grpo_loss(v, x, x, lp, old, transitions, step, clip_range=0.01 * rows).loss.backward()

    def variants() -> list[int]:
        return [sum(len(entry[0]) for entry in k.device_caches.values()) for k in kernels]

    b = cuda(oracle.batch(40))
    run(40, b.step, flow_sde(oracle.SIGMAS).to("cuda"))
    before = variants()
    for rows in (1, 2, 7, 16):
        for step in (0, 1, 5):
            run(rows, step, flow_sde(oracle.SIGMAS[: step + 3], 0.02 * rows).to("cuda"))
    assert variants() == before and min(before) > 0


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(16, 4, 4), (16, 64, 64), (16, 128, 160)], ids=str)
def test_compiled_gives_the_bits_of_triton(launched, shape, dtype):
    """Every result of a step, its replay and both losses; nothing falls back in between."""
    if launched == "triton":
        pytest.skip("compared once")
    b, transitions = cuda(oracle.batch(3, shape, dtype, torch.float32)), flow_sde(oracle.SIGMAS)
    b.old = b.old.float()
    nft = oracle.NftBatch(*(x.cuda() for x in vars(oracle.nft_batch(3, shape, dtype)).values()))
    results = {}
    for name in ("compiled", "triton"):
        with dispatch.use_backend(name):
            micro = micro_step(b, transitions.to("cuda"))
            noise = initial_noise(b.seeds, shape)
            results[name] = [*micro, noise, *forward_process(nft)]
    for one, two in zip(results["compiled"], results["triton"], strict=True):
        assert torch.equal(one, two)


def test_a_capture_after_warm_up(launched):
    """In a process that has launched nothing, warm_up is enough; without it one sentence."""
    if launched == "triton":
        pytest.skip("Triton compiles at the first call")
    b, transitions = cuda(oracle.batch(4, (16, 64, 64))), flow_sde(oracle.SIGMAS).to("cuda")
    out, lp = torch.empty_like(b.sample), torch.empty(4, device="cuda")

    def step():
        sde_step(b.velocity, b.sample, transitions, 3, seeds=b.seeds, out=out, log_prob_out=lp)

    compiled.forget()
    with pytest.raises(RuntimeError, match="warm_up"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        step()
    assert warm_up() > 300
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    replayed = out.clone(), lp.clone()
    step()
    assert torch.equal(replayed[0], out) and torch.equal(replayed[1], lp)
