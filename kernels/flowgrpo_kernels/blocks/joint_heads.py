"""Queries or keys of joint attention: text and image concatenated, each head normalised and turned.

    z   = x / sqrt(mean(x^2) + eps) w       over the d of each head; z = x for a part without w
    out = z cos + turn(z) sin               with `rotary`; turn of each pair (a, b) is (-b, a)

RMSNorm of queries and keys (SD3.5, FLUX: diffusers' RMSNorm), rotary embedding of interleaved
pairs (diffusers' apply_rotary_emb with use_real_unbind_dim=-1) and the concatenation of the
streams, which JointAttnProcessor2_0 and FluxAttnProcessor do one after the other with a rounding
each.

Shapes: parts [B, N_i, heads * d], whose rows may be slices of one product; weights [d]; cos, sin
float32 [S, d] with S the sum of the N_i; out [B, S, heads, d]. Parts are of one dtype out of
float32, bfloat16 and float16, and so is out. Bytes per element: part + out forward; grad + part +
gradient backward; cos and sin are read once a token. The root mean squares are computed again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd import once_differentiable

# _heads registers the Triton launchers.
from . import _checks, _heads  # noqa: F401
from ._ops import op
from .reference import head_weight_gradient, rotated_back

_joint_heads = op("joint_heads")
_joint_heads_backward = op("joint_heads_backward")


class _JointHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, weight, weight2, cos, sin, heads, eps):
        ctx.save_for_backward(first, second, weight, weight2, cos, sin)
        ctx.eps = eps
        return _joint_heads(first, second, weight, weight2, cos, sin, heads, eps)

    @staticmethod
    @once_differentiable("joint_heads")
    def backward(ctx, grad):
        first, second, weight, weight2, cos, sin = ctx.saved_tensors
        needs, dx, dx2, dw, dw2 = ctx.needs_input_grad, None, None, None, None
        if needs[0] or needs[1]:
            dx, dx2 = _joint_heads_backward(grad, first, second, weight, weight2, cos, sin, ctx.eps)
        if needs[2] or needs[3]:
            gz, count = rotated_back(grad, cos, sin), first.shape[1]
            if needs[2]:
                dw = head_weight_gradient(gz[:, :count], first, weight, ctx.eps)
            if needs[3]:
                dw2 = head_weight_gradient(gz[:, count:], second, weight2, ctx.eps)
        return dx if needs[0] else None, dx2 if needs[1] else None, dw, dw2, *[None] * 4


def joint_heads(
    parts: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    heads: int,
    eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, S, heads, d], contiguous; differentiable once in parts and weights.

    Args:
        parts: one or two tensors [B, N_i, heads * d] of one dtype, in the order in which they are
            concatenated; the last dimension contiguous, rows of any stride. On a GPU d is a power
            of two up to 256.
        weights: for each part the [d] weight of its RMSNorm, or None for no norm.
        heads: the number of heads.
        eps: added to the mean square.
        rotary: None or (cos, sin), float32 [S, d], interleaved as FLUX's; constants.
    """
    parts, weights = _listed("parts", parts), _listed("weights", weights)
    if len(parts) not in (1, 2) or len(weights) != len(parts):
        raise ValueError(
            f"parts must be 1 or 2 tensors with one weight (or None) each, got {len(parts)} parts "
            f"and {len(weights)} weights"
        )
    size = _check_parts(parts, heads)
    for i, weight in enumerate(weights):
        if weight is not None:
            _checks.check_float(f"weights[{i}]", weight, parts[0], "parts[0]")
            if weight.shape != (size,):
                raise ValueError(f"weights[{i}] must be [{size}], got {list(weight.shape)}")
    _checks.check_eps(eps)
    cos, sin = _check_rotary(rotary, parts, size)
    first, second = (*parts, None)[:2]
    weight, weight2 = (*weights, None)[:2]
    args = (first, second, weight, weight2, cos, sin, heads, float(eps))
    if _checks.needs_grad(first, second, weight, weight2):
        return _JointHeads.apply(*args)
    return _joint_heads(*args)


def _listed(name: str, value) -> list:
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return list(value)


def _check_parts(parts: list, heads: int) -> int:
    """Checks the parts and returns d."""
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise TypeError(f"heads must be an int, got {type(heads).__name__}")
    for i, part in enumerate(parts):
        _checks.check_tokens(f"parts[{i}]", part)
    first = parts[0]
    if heads < 1 or first.shape[2] % heads:
        raise ValueError(f"heads must divide the width {first.shape[2]} of parts[0], got {heads}")
    for part in parts[1:]:
        if part.dtype != first.dtype:
            raise TypeError(f"parts[1] must be {first.dtype} like parts[0], got {part.dtype}")
        if part.device != first.device:
            raise ValueError(f"parts[1] must be on {first.device} like parts[0], got {part.device}")
        if part.shape[0] != first.shape[0] or part.shape[2] != first.shape[2]:
            raise ValueError(
                f"parts[1] must be [{first.shape[0]}, N, {first.shape[2]}] like parts[0], got "
                f"{list(part.shape)}"
            )
    return first.shape[2] // heads


def _check_rotary(rotary, parts: list[Tensor], size: int) -> tuple[Tensor | None, Tensor | None]:
    cos, sin = _checks.pair("rotary", rotary, "(cos, sin)")
    if rotary is None:
        return None, None
    expected = (sum(part.shape[1] for part in parts), size)
    table = torch.float64 if parts[0].dtype == torch.float64 else torch.float32
    for name, value in (("cos", cos), ("sin", sin)):
        _checks.check_tensor(name, value)
        if value.dtype not in (torch.float32, table):
            raise TypeError(f"{name} must be float32, got {value.dtype}")
        if value.shape != expected:
            raise ValueError(f"{name} must be [S, d] = {list(expected)}, got {list(value.shape)}")
        if value.device != parts[0].device:
            raise ValueError(
                f"{name} must be on {parts[0].device} like parts[0], got {value.device}"
            )
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{name} is a constant for this op but requires a gradient; detach it")
    if size % 2:
        raise ValueError(f"rotary needs an even head size, got {size}")
    return cos, sin
