"""The blocks' Triton kernels in Triton's interpreter, bit for bit against the reference.

The interpreter takes a tenth of a second a program, so every case has a token or two. Bits equal to
the reference carry its other tests over.
"""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels.backends import dispatch, triton
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate, reference, rows
from support.kernels import block_cases as cases

pytestmark = pytest.mark.skipif(
    not (triton.interpreting() and dispatch.backends()["triton"]["available"]),
    reason="needs Triton and TRITON_INTERPRET=1",
)


def same(function) -> None:
    """function() gives the same tensors on Triton and on the reference."""
    with dispatch.use_backend("triton"):
        mine = function()
    with dispatch.use_backend("reference"):
        theirs = function()
    for got, expected in zip(mine, theirs, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape
        assert torch.equal(got, expected)


def everything(op: str, dtype: torch.dtype, **sizes) -> None:
    v = cases.inputs(op, dtype, **sizes)

    def run():
        outputs, grads = cases.gradients(cases.ours, op, cases.leaves(v))
        with torch.no_grad():
            again = cases.ours(op, v)
        assert all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
        return [*outputs, *grads.values()]

    same(run)


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("op", cases.OPS)
def test_every_op_in_every_dtype(op, dtype):
    """Outputs and all gradients; rows and parts are views of wider tensors."""
    everything(op, dtype, batch=1, tokens=2, width=96)


@pytest.mark.parametrize("width", [1, 7, 512, 1536, 1608, 2048, 4098])
def test_widths(width):
    """One lane, odd, one chunk, the models' chunks of 512 and 1024, and tails."""
    g = torch.Generator().manual_seed(width)
    x, y = (torch.randn(1, 1, width, generator=g) for _ in range(2))
    rows = torch.randn(2, 1, width, generator=g)

    def run():
        a, b = (t.clone().requires_grad_() for t in (x, y))
        out, residual = norm_modulate(a, *rows), gated_residual(a, rows[0], b)
        (out * y + residual * x).sum().backward()
        return out.detach(), residual.detach(), a.grad, b.grad

    same(run)


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (24, 64), (9, 128), (2, 256), (5, 8), (3, 1)])
def test_heads(heads, size):
    """Tiles of 8 heads with and without a rest; grads laid out as attention gives them."""
    g = torch.Generator().manual_seed(heads)
    first, second = (torch.randn(1, 1, heads * size, generator=g) for _ in range(2))
    weight, cotangent = torch.randn(size, generator=g), torch.randn(1, heads, 2, size, generator=g)
    rotary = torch.randn(2, 2, size, generator=g) if size > 1 else None

    def run():
        a, b = (t.clone().requires_grad_() for t in (first, second))
        tables = None if rotary is None else tuple(rotary)
        out = joint_heads((a, b), (weight, None), heads=heads, rotary=tables)
        out.transpose(1, 2).backward(cotangent)
        return out.detach(), a.grad, b.grad

    same(run)


@pytest.mark.slow
def test_layouts():
    """Samples and tokens of any stride, gradients that are expanded, several samples."""
    x = torch.randn(3, 2, 16).transpose(0, 1)
    rows = torch.randn(3, 2, 16).unbind(0)

    def run():
        a, b = x.clone(memory_format=torch.preserve_format).requires_grad_(), x.detach() * 2
        assert a.stride() == x.stride()
        out = norm_modulate(a, rows[0], rows[1][:1].expand(2, 16)) + gated_residual(b, rows[2], a)
        heads = joint_heads((b, a), (None, rows[0][0, :8]), heads=2)
        (out.sum() + heads.sum()).backward()
        return out.detach(), heads.detach(), a.grad

    same(run)


def test_empty():
    for shape in ((0, 3, 16), (2, 0, 16)):
        x, row = torch.zeros(shape, requires_grad=True), torch.zeros(shape[0], 16)

        def run(x=x, row=row):
            a, b = norm_modulate(x, row, row, second=(row, row))
            c = gated_residual(x, row, x, second=(row, x))
            d = joint_heads((x, x), (None, None), heads=2)
            grads = torch.autograd.grad((a.sum() + b.sum(), c.sum(), d.sum()), x)
            return a.detach(), b.detach(), c.detach(), d.detach(), *grads

        same(run)
    whole, none = torch.randn(1, 2, 16), torch.zeros(1, 0, 16)
    for parts in ((whole, none), (none, whole)):
        same(lambda parts=parts: (joint_heads(parts, (None, None), heads=2),))


def test_sizes_that_do_not_fit():
    wide, row = torch.zeros(1, 1, rows.MAX_WIDTH + 1), torch.zeros(1, rows.MAX_WIDTH + 1)
    with dispatch.use_backend("triton"):
        with pytest.raises(ValueError, match="x must have at most 8192 elements a token"):
            norm_modulate(wide, row, row)
        for size in (24, 512):
            with pytest.raises(ValueError, match="heads of a power of two up to 256 elements"):
                joint_heads((torch.zeros(1, 1, 2 * size),), (None,), heads=2)
    assert norm_modulate(wide, row, row).eq(0).all()


def test_chunks_cover_every_width():
    """W divides the widths of the models, and 8 values a thread make whole warps there."""
    assert [reference.lanes(width) for width in (1536, 3072, 2432, 512, 96, 1)] == [
        512, 1024, 512, 512, 128, 1,
    ]  # fmt: skip
    assert [rows.options(width)["num_warps"] for width in (1536, 3072, 8192, 96)] == [2, 4, 4, 1]
    assert [rows.alignment(1536, *steps) for steps in ((), (4608, 0), (24,), (2, 16))] == [
        16, 16, 8, 2,
    ]  # fmt: skip
