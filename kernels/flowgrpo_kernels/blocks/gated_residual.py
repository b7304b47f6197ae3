"""Residual of a block: the output of a branch times the gate that a sample's tokens share.

    out = x + gate y
    out = x + gate y + gate2 y2             with `second`

As in diffusers' JointTransformerBlock and FluxTransformerBlock (`hidden_states + gate.unsqueeze(1)
* output`), where each product and sum is rounded to the dtype of x; here only `out` is.

Shapes: x, y, out [B, N, D]; gate [B, D]. Any mix of float32, bfloat16 and float16; out is in the
dtype of x, y2 in that of y. Bytes per element: x + y + out forward (and y2), grad + dy backward
(and dy2); the gradient of x is that of out itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd import check_transforms, once_differentiable
from ..backends import dispatch, triton
from ..backends.triton import tl
from ..reference import compute_dtype
from . import checks, reference, rows
from .rows import jit, load_row, sample_at, store_chunk, token_at, token_of


def _fake(x, gate, y, gate2, y2):
    return x.new_empty(x.shape)


def _fake_backward(grad, gate, gate2, dtype):
    dy = grad.new_empty(grad.shape, dtype=dtype)
    return dy, dy.new_empty((0,) if gate2 is None else grad.shape)


gated_residual_op = dispatch.define(
    "gated_residual",
    "(Tensor x, Tensor gate, Tensor y, Tensor? gate2, Tensor? y2) -> Tensor",
    reference.gated_residual,
    _fake,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)
gated_residual_backward_op = dispatch.define(
    "gated_residual_backward",
    "(Tensor grad, Tensor gate, Tensor? gate2, ScalarType dtype) -> (Tensor, Tensor)",
    reference.gated_residual_backward,
    _fake_backward,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)


@jit
def gated_residual_kernel(
    x_ptr,  # [B, tokens, WIDTH]
    gate_ptr,  # [B, WIDTH]
    y_ptr,  # [B, tokens, WIDTH]
    gate2_ptr,  # [B, WIDTH] or None
    y2_ptr,  # [B, tokens, WIDTH] or None
    out_ptr,  # [B, tokens, WIDTH], contiguous
    tokens,
    x_batch,
    x_token,
    gate_batch,
    y_batch,
    y_token,
    gate2_batch,
    y2_batch,
    y2_token,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes out of one token."""
    batch, token = token_of(tokens)
    x = load_row(token_at(x_ptr, batch, x_batch, token, x_token, ALIGN), WIDTH, LANES)
    y = load_row(token_at(y_ptr, batch, y_batch, token, y_token, ALIGN), WIDTH, LANES)
    gate = load_row(sample_at(gate_ptr, batch, gate_batch, ALIGN), WIDTH, LANES)
    if y2_ptr is not None:
        y2 = load_row(token_at(y2_ptr, batch, y2_batch, token, y2_token, ALIGN), WIDTH, LANES)
        gate2 = load_row(sample_at(gate2_ptr, batch, gate2_batch, ALIGN), WIDTH, LANES)
    p_out = out_ptr + tl.program_id(0).to(tl.int64) * WIDTH
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        b_out = x[i] + gate[i] * y[i]
        if y2_ptr is not None:
            b_out += gate2[i] * y2[i]
        store_chunk(p_out, b_out, i, WIDTH, LANES)


@jit
def gated_residual_backward_kernel(
    grad_ptr,  # [B, tokens, WIDTH]
    gate_ptr,  # [B, WIDTH]
    gate2_ptr,  # [B, WIDTH] or None
    dy_ptr,  # [B, tokens, WIDTH], contiguous
    dy2_ptr,  # the same or None
    tokens,
    grad_batch,
    grad_token,
    gate_batch,
    gate2_batch,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes dy of one token, and dy2."""
    batch, token = token_of(tokens)
    grad = load_row(token_at(grad_ptr, batch, grad_batch, token, grad_token, ALIGN), WIDTH, LANES)
    gate = load_row(sample_at(gate_ptr, batch, gate_batch, ALIGN), WIDTH, LANES)
    if dy2_ptr is not None:
        gate2 = load_row(sample_at(gate2_ptr, batch, gate2_batch, ALIGN), WIDTH, LANES)
    out = tl.program_id(0).to(tl.int64) * WIDTH
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        store_chunk(dy_ptr + out, gate[i] * grad[i], i, WIDTH, LANES)
        if dy2_ptr is not None:
            store_chunk(dy2_ptr + out, gate2[i] * grad[i], i, WIDTH, LANES)


@triton.launcher("gated_residual")
def _launch(launch, x, gate, y, gate2, y2):
    """One launch."""
    x, gate, y, gate2, y2 = map(rows.dense, (x, gate, y, gate2, y2))
    batch, tokens, width = x.shape
    out = x.new_empty(x.shape)
    steps = rows.strides(x, gate, y, (gate2, 1), (y2, 2))
    sizes = rows.options(width, *steps)
    if batch * tokens:
        with triton.on(x.device):
            launch(
                gated_residual_kernel, batch * tokens, (x, gate, y, gate2, y2, out),
                (tokens, *steps), **sizes,
            )  # fmt: skip
    return out


@triton.launcher("gated_residual_backward")
def _launch_backward(launch, grad, gate, gate2, dtype):
    """One launch."""
    grad, gate, gate2 = map(rows.dense, (grad, gate, gate2))
    batch, tokens, width = grad.shape
    dy = grad.new_empty(grad.shape, dtype=dtype)
    dy2 = dy.new_empty(0) if gate2 is None else torch.empty_like(dy)
    steps = rows.strides(grad, gate, (gate2, 1))
    sizes = rows.options(width, *steps)
    if batch * tokens:
        with triton.on(grad.device):
            launch(
                gated_residual_backward_kernel, batch * tokens,
                (grad, gate, gate2, dy, None if gate2 is None else dy2), (tokens, *steps), **sizes,
            )  # fmt: skip
    return dy, dy2


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, y, gate2, y2):
        _, needs_gate, _, needs_gate2, _ = ctx.needs_input_grad
        # y is saved for the gradient of its gate alone, which adapters do not ask for.
        ctx.save_for_backward(gate, gate2, y if needs_gate else None, y2 if needs_gate2 else None)
        ctx.dtype = y.dtype
        return gated_residual_op(x, gate, y, gate2, y2)

    @staticmethod
    @once_differentiable("gated_residual")
    def backward(ctx, grad):
        gate, gate2, y, y2 = ctx.saved_tensors
        needs_x, needs_gate, needs_y, needs_gate2, needs_y2 = ctx.needs_input_grad
        dy = dy2 = d_gate = d_gate2 = None
        if needs_y or needs_y2:
            dy, dy2 = gated_residual_backward_op(grad, gate, gate2, ctx.dtype)
        dtype = compute_dtype(grad)
        if needs_gate:
            d_gate = reference.token_sum(grad.to(dtype) * y, gate.dtype)
        if needs_gate2:
            d_gate2 = reference.token_sum(grad.to(dtype) * y2, gate2.dtype)
        return (
            grad if needs_x else None,
            d_gate,
            dy if needs_y else None,
            d_gate2,
            dy2 if needs_y2 else None,
        )


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, *, second: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """Computes x + gate y, differentiable once in every tensor.

    Args:
        x, y: [B, N, D], D up to 8192 on a GPU.
        gate: [B, D], rows of any stride.
        second: (gate2 [B, D], y2 [B, N, D]), another branch on the same residual; y2 in the dtype
            of y.

    Returns:
        [B, N, D] in the dtype of x.
    """
    checks.check_tokens("x", x)
    gate2, y2 = checks.pair("second", second, "(gate2, y2)")
    checks.check_row("gate", gate, x)
    checks.check_same("y", y, x)
    if second is not None:
        checks.check_row("gate2", gate2, x)
        checks.check_same("y2", y2, x)
        if y2.dtype != y.dtype:
            raise TypeError(f"y2 must have the dtype of y {y.dtype}, got {y2.dtype}")
    args = (x, gate, y, gate2, y2)
    check_transforms("gated_residual", *args)
    if checks.needs_grad(*args):
        return _GatedResidual.apply(*args)
    return gated_residual_op(*args)
