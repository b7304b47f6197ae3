"""LayerNorm over D without weight and bias, then the scale and shift that a sample's tokens share.

    h = (x - mean) / sqrt(var + eps)        mean and (biased) variance over D
    y = h (1 + scale) + shift
    y2 = h (1 + scale2) + shift2            with `second`

The adaptive norm of diffusion transformers (Peebles and Xie, https://arxiv.org/abs/2212.09748): the
arithmetic of diffusers' AdaLayerNormZero, AdaLayerNormContinuous and, with `second`, of
SD35AdaLayerNormZeroX. There LayerNorm rounds h to the dtype of x; here only y is rounded.

Shapes: x, y [B, N, D]; scale, shift [B, D]. Any mix of float32, bfloat16 and float16; y is in the
dtype of x. Bytes per element: x + y forward (and y2), with 8 bytes a token for mean and rstd when a
backward will come; dy + x + dx backward (and dy2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd import once_differentiable
from . import _checks
from ._ops import op
from .reference import normalised, token_sum

_norm_modulate = op("norm_modulate")
_norm_modulate_backward = op("norm_modulate_backward")


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, scale2, shift2, eps):
        y, y2, mean, rstd = _norm_modulate(x, scale, shift, scale2, shift2, eps, True)
        ctx.save_for_backward(x, scale, scale2, mean, rstd)
        ctx.dtypes = shift.dtype, None if shift2 is None else shift2.dtype
        if scale2 is None:
            ctx.mark_non_differentiable(y2)
        # An output that the loss does not reach costs no pass over zeros.
        ctx.set_materialize_grads(False)
        return y, y2

    @staticmethod
    @once_differentiable("norm_modulate")
    def backward(ctx, dy, dy2):
        x, scale, scale2, mean, rstd = ctx.saved_tensors
        dy2 = None if scale2 is None else dy2
        given = [(g, s) for g, s in ((dy, scale), (dy2, scale2)) if g is not None]
        dx = None
        if ctx.needs_input_grad[0] and given:
            (first, s), (second, s2) = (*given, (None, None))[:2]
            dx = _norm_modulate_backward(first, second, x, s, s2, mean, rstd)
        rows = []
        for i, (grad, s) in enumerate(((dy, scale), (dy2, scale2))):
            for shifts in (False, True):
                if grad is None or not ctx.needs_input_grad[1 + 2 * i + shifts]:
                    rows.append(None)
                elif shifts:
                    rows.append(token_sum(grad, ctx.dtypes[i]))
                else:
                    rows.append(token_sum(grad * normalised(x, mean, rstd), s.dtype))
        return dx, *rows, None


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """LN(x) (1 + scale) + shift, differentiable once in every tensor.

    Args:
        x: [B, N, D], D up to 8192 on a GPU.
        scale, shift: [B, D], rows of any stride (views of one modulation tensor).
        second: (scale2, shift2) [B, D]: a second output from the same normalised x.
        eps: added to the variance.

    Returns:
        y [B, N, D] in the dtype of x, or (y, y2) with `second`.
    """
    _checks.check_tokens("x", x)
    scale2, shift2 = _checks.pair("second", second, "(scale2, shift2)")
    _checks.check_row("scale", scale, x)
    _checks.check_row("shift", shift, x)
    if second is not None:
        _checks.check_row("scale2", scale2, x)
        _checks.check_row("shift2", shift2, x)
    _checks.check_eps(eps)
    args = (x, scale, shift, scale2, shift2, float(eps))
    if _checks.needs_grad(x, scale, shift, scale2, shift2):
        y, y2 = _NormModulate.apply(*args)
    else:
        y, y2, *_ = _norm_modulate(*args, False)
    return y if second is None else (y, y2)
