"""The residual of a block: what a branch gives, times the gate that a sample's tokens share.

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

from .._autograd import once_differentiable
from . import _checks
from ._ops import op
from .reference import compute_dtype, token_sum

_gated_residual = op("gated_residual")
_gated_residual_backward = op("gated_residual_backward")


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, y, gate2, y2):
        # y is kept for the gradient of its gate alone, which adapters do not ask for.
        kept = [v if ctx.needs_input_grad[i] else None for i, v in ((1, y), (3, y2))]
        ctx.save_for_backward(gate, gate2, *kept)
        ctx.dtype = y.dtype
        return _gated_residual(x, gate, y, gate2, y2)

    @staticmethod
    @once_differentiable("gated_residual")
    def backward(ctx, grad):
        gate, gate2, y, y2 = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dy = dy2 = d_gate = d_gate2 = None
        if needs[2] or needs[4]:
            dy, dy2 = _gated_residual_backward(grad, gate, gate2, ctx.dtype)
        compute = compute_dtype(grad)
        if needs[1]:
            d_gate = token_sum(grad.to(compute) * y, gate.dtype)
        if needs[3]:
            d_gate2 = token_sum(grad.to(compute) * y2, gate2.dtype)
        return (
            grad if needs[0] else None,
            d_gate,
            dy if needs[2] else None,
            d_gate2,
            dy2 if needs[4] else None,
        )


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, *, second: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x + gate y, differentiable once in every tensor.

    Args:
        x, y: [B, N, D], D up to 8192 on a GPU.
        gate: [B, D], rows of any stride.
        second: (gate2 [B, D], y2 [B, N, D]), another branch on the same residual; y2 in the dtype
            of y.

    Returns:
        [B, N, D] in the dtype of x.
    """
    _checks.check_tokens("x", x)
    gate2, y2 = _checks.pair("second", second, "(gate2, y2)")
    _checks.check_row("gate", gate, x)
    _checks.check_same("y", y, x)
    if second is not None:
        _checks.check_row("gate2", gate2, x)
        _checks.check_same("y2", y2, x)
        if y2.dtype != y.dtype:
            raise TypeError(f"y2 must have the dtype of y {y.dtype}, got {y2.dtype}")
    args = (x, gate, y, gate2, y2)
    if _checks.needs_grad(*args):
        return _GatedResidual.apply(*args)
    return _gated_residual(*args)
