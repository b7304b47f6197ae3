"""The block ops on a GPU: the reference's bits, no synchronisation, capture, no recompiling."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels.aot import table
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate
from support.kernels import block_cases as cases

pytestmark = pytest.mark.gpu
# Gradients by PyTorch's reductions, in an order of their own.
SUMS = ("scale", "shift", "scale2", "shift2", "gate", "gate2", "weight", "weight2")


@pytest.fixture(autouse=True)
def _on_triton():
    with dispatch.use_backend("triton"):
        yield


def cuda(v: dict) -> dict:
    return {name: x.cuda() for name, x in v.items()}


@pytest.mark.parametrize("width", [96, 1536, 2448, 3072])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_bits_of_the_reference(op, dtype, width):
    if op.startswith("heads"):
        width = cases.HEADS << (width // 96).bit_length() + 1
    v = cases.inputs(op, dtype, batch=3, tokens=37, width=width)
    with dispatch.use_backend("reference"):
        outputs, grads = cases.gradients(cases.ours, op, cases.leaves(v))
    got, found = cases.gradients(cases.ours, op, cases.leaves(cuda(v)))
    for mine, expected in zip(got, outputs, strict=True):
        assert torch.equal(mine.cpu(), expected)
    for name, expected in grads.items():
        mine = found[name].cpu()
        if name in SUMS:
            rtol = 1e-4 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(mine, expected, rtol=rtol, atol=1e-3)
        else:
            assert torch.equal(mine, expected), name
    with torch.no_grad():
        again = cases.ours(op, cuda(v))
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))


def micro_step(v: dict, x: torch.Tensor) -> list[torch.Tensor]:
    """The element-wise work of a block, forward and backward."""
    x = x.detach().requires_grad_()
    y, y2 = norm_modulate(x, v["scale"], v["shift"], second=(v["scale2"], v["shift2"]))
    tokens = x.shape[1] // 2
    q = joint_heads((y[:, :tokens], y2[:, tokens:]), (v["weight"], None), heads=24)
    out = gated_residual(x, v["scale"], q.flatten(2), second=(v["shift"], y2))
    (grad,) = torch.autograd.grad(out, x, torch.ones_like(out))
    return [out.detach(), grad]


def flux_like() -> tuple[dict, torch.Tensor]:
    v = cuda(cases.inputs("norm second", torch.bfloat16, batch=2, tokens=64, width=1536))
    v["weight"] = torch.randn(64, device="cuda").bfloat16()
    return v, v.pop("x")


def test_no_synchronisation():
    v, x = flux_like()
    micro_step(v, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        micro_step(v, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured():
    """A graph of forward and backward, replayed on other values, gives the bits of calls."""
    v, x = flux_like()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        micro_step(v, x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = micro_step(v, x)
    for shift in (0.0, 0.5):
        x.add_(shift)
        graph.replay()
        expected = micro_step(v, x)
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("model", table.MODELS)
@pytest.mark.parametrize("dtype", table.BLOCK_DTYPES, ids=str)
def test_compiled_gives_the_bits_of_triton(model, dtype):
    """The blocks of the models that are shipped compiled; nothing falls back in between."""
    state = dispatch.backends()["compiled"]
    if not state["available"]:
        pytest.skip(state["reason"])
    width, heads, dual, rotary = table.MODELS[model]
    x, y, y2 = torch.randn(3, 2, 37, width, device="cuda").to(dtype)
    rows = torch.randn(4, 2, width, device="cuda").to(dtype)
    weight = torch.randn(width // heads, device="cuda").to(dtype)
    angle = torch.randn(74, width // heads // 2, device="cuda").repeat_interleave(2, 1)

    def run():
        a, b = x.clone().requires_grad_(), y.clone().requires_grad_()
        normed = norm_modulate(a, rows[0], rows[1], second=(rows[2], rows[3]) if dual else None)
        gated = gated_residual(a, rows[0], b, second=(rows[1], y2) if dual else None)
        joined = joint_heads(
            (a, b), (weight, weight), heads=heads,
            rotary=(angle.cos(), angle.sin()) if rotary else None,
        )  # fmt: skip
        outputs = [*(normed if dual else (normed,)), gated, joined]
        grads = torch.autograd.grad(outputs, (a, b), [torch.ones_like(o) for o in outputs])
        return [*outputs, *grads]

    with dispatch.use_backend("compiled"):
        mine = run()
    assert all(torch.equal(one, two) for one, two in zip(mine, run(), strict=True))


def test_nothing_recompiles():
    """Batch, tokens and strides are data: one compilation of each kernel serves them."""
    from flowgrpo_kernels.blocks.gated_residual import gated_residual_kernel
    from flowgrpo_kernels.blocks.joint_heads import joint_heads_kernel
    from flowgrpo_kernels.blocks.norm_modulate import norm_modulate_kernel

    kernels = (norm_modulate_kernel, gated_residual_kernel, joint_heads_kernel)

    def compiled() -> int:
        return sum(len(entry[0]) for k in kernels for entry in k.device_caches.values())

    def call(batch: int, tokens: int) -> None:
        wide = torch.zeros(batch, tokens, 3 * 1536, device="cuda", dtype=torch.bfloat16)
        rows = torch.zeros(batch, 6 * 1536, device="cuda", dtype=torch.bfloat16).chunk(6, 1)
        for x in (wide[..., :1536], wide[..., 1536:3072].contiguous()):
            norm_modulate(x, rows[0], rows[1])
            gated_residual(x, rows[2], x)
            joint_heads((x, x[:, :1]), (None, None), heads=24)

    call(2, 5)
    before = compiled()
    for batch, tokens in ((1, 1), (1, 16), (16, 1), (3, 333), (4, 64)):
        call(batch, tokens)
    assert compiled() == before


def test_past_two_to_the_31():
    """Offsets are 64-bit: the last token of a tensor of more than 2^31 elements."""
    tokens, width = (1 << 20) + 3, 2048
    x = torch.zeros(1, tokens, width, dtype=torch.bfloat16, device="cuda")
    x[0, -1].normal_()
    row = torch.randn(1, width, device="cuda").bfloat16()
    assert torch.equal(norm_modulate(x, row, row)[:, -1:], norm_modulate(x[:, -1:], row, row))
    assert torch.equal(gated_residual(x, row, x)[:, -1:], gated_residual(x[:, -1:], row, x[:, -1:]))
    heads = joint_heads((x,), (row[0, :64],), heads=32)[:, -1:]
    assert torch.equal(heads, joint_heads((x[:, -1:],), (row[0, :64],), heads=32))
