"""Reference of the blocks' ops in plain PyTorch: oracle, CPU backend, and numerical contract.

The numerical contract
======================
The Triton kernels give the same bits as this file for float32, bfloat16 and float16 inputs.

Inputs are read in their dtype and converted to float32. Every product, sum, division and square
root is float32 and rounded on its own: no fma, no reassociation. A result is rounded once, at the
end, to its dtype. In float64 (all inputs float64) the same code is the subject of gradcheck.

Sums over the D elements of a token, or over the d of a head (`row_sum`): the elements are cut into
chunks of W lanes, W = `lanes(D)`, missing ones count as +0. Chunks are added lane by lane in order,
then the lanes by adjacent pairs: lane i of the next level = lane 2i + lane 2i + 1. Nothing depends
on B, N, alignment or strides.

norm_modulate, with n = float32(D):

    mean = sum(x) / n           d = x - mean
    rstd = 1 / sqrt(sum(d d) / n + eps)
    h    = d rstd               y = h (1 + scale) + shift       y2 from the same h

    g    = dy (1 + scale) + dy2 (1 + scale2)
    dx   = ((g - sum(g) / n) - h (sum(g h) / n)) rstd

gated_residual:

    out  = (x + gate y) + gate2 y2              dy = gate grad      dy2 = gate2 grad

joint_heads, on the d elements of a head, with n = float32(d) and w the weight of its stream:

    r    = 1 / sqrt(sum(x x) / n + eps)
    z    = (x r) w                              z = x without a weight
    out  = z cos + turn(z) sin                  turn(z)[2i] = -z[2i+1], turn(z)[2i+1] = z[2i]

    gz   = grad cos - turn(grad sin)            the transposed rotation
    g    = gz w
    dx   = (g - (x r) (sum(g (x r)) / n)) r     dx = gz without a weight

The gradients of scale, shift, gate and weights are sums over tokens in float32, by PyTorch's own
reductions: deterministic, but in no order that this file fixes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..reference import compute_dtype, over


def lanes(width: int) -> int:
    """Computes the lanes that a row of `width` is summed over: a power of two, up to 1024."""
    if width >= 512:
        return 1024 if width % 1024 == 0 or width > 4096 else 512
    return 1 << max(width - 1, 0).bit_length()


def row_sum(x: Tensor) -> Tensor:
    """Sums [..., D] -> [..., 1] in the order of the module docstring."""
    width = x.shape[-1]
    count = lanes(width)
    chunks = F.pad(x, (0, -width % count)).unflatten(-1, (-1, count)).unbind(-2)
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    while total.shape[-1] > 1:
        total = total[..., 0::2] + total[..., 1::2]
    return total


def _inverse_root(x: Tensor) -> Tensor:
    """Computes 1 / sqrt(x), both correctly rounded in the dtype of x."""
    # torch.sqrt of float32 calls a vector library that misses by an ulp now and then.
    return 1.0 / x.double().sqrt().to(x.dtype)


def _token(row: Tensor, dtype: torch.dtype) -> Tensor:
    """Spreads [B, D] over the tokens: [B, 1, D] in the compute dtype."""
    return row[:, None].to(dtype)


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds a result to its dtype."""
    return x.to(dtype).contiguous()


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes (y, y2, mean [B, N], rstd [B, N]); y2 is empty without scale2."""
    dtype, width = compute_dtype(x), x.shape[-1]
    b_x = x.to(dtype)
    mean = over(row_sum(b_x), width)
    d = b_x - mean
    rstd = _inverse_root(over(row_sum(d * d), width) + eps)
    h = d * rstd

    def modulated(scale: Tensor, shift: Tensor) -> Tensor:
        return _rounded(h * (1.0 + _token(scale, dtype)) + _token(shift, dtype), x.dtype)

    y2 = x.new_empty(0) if scale2 is None else modulated(scale2, shift2)
    return modulated(scale, shift), y2, mean[..., 0].contiguous(), rstd[..., 0].contiguous()


def norm_modulate_alone(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    scale2: Tensor | None,
    shift2: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """Computes [y], or [y, y2] with scale2."""
    y, y2, *_ = norm_modulate(x, scale, shift, scale2, shift2, eps)
    return [y] if scale2 is None else [y, y2]


def norm_modulate_backward(
    dy: Tensor,
    dy2: Tensor | None,
    x: Tensor,
    scale: Tensor,
    scale2: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> Tensor:
    """Computes dx, in the dtype of x."""
    dtype, width = compute_dtype(x), x.shape[-1]
    h = normalised(x, mean, rstd)
    g = dy.to(dtype) * (1.0 + _token(scale, dtype))
    if dy2 is not None:
        g = g + dy2.to(dtype) * (1.0 + _token(scale2, dtype))
    dx = ((g - over(row_sum(g), width)) - h * over(row_sum(g * h), width)) * rstd[..., None]
    return _rounded(dx, x.dtype)


def normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Computes h of the module docstring, [B, N, D] in the dtype of mean."""
    return (x.to(mean.dtype) - mean[..., None]) * rstd[..., None]


def token_sum(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums [B, N, D] -> [B, D]: the gradient of a row that all tokens of a sample share."""
    return x.sum(1, dtype=compute_dtype(x)).to(dtype)


def gated_residual(
    x: Tensor, gate: Tensor, y: Tensor, gate2: Tensor | None, y2: Tensor | None
) -> Tensor:
    """Computes x + gate y + gate2 y2, in the dtype of x."""
    dtype = compute_dtype(x)
    out = x.to(dtype) + _token(gate, dtype) * y.to(dtype)
    if y2 is not None:
        out = out + _token(gate2, dtype) * y2.to(dtype)
    return _rounded(out, x.dtype)


def gated_residual_backward(
    grad: Tensor, gate: Tensor, gate2: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes (dy, dy2) in dtype; dy2 is empty without gate2."""
    compute = compute_dtype(grad)
    grad = grad.to(compute)
    dy = _rounded(_token(gate, compute) * grad, dtype)
    if gate2 is None:
        return dy, dy.new_empty(0)
    return dy, _rounded(_token(gate2, compute) * grad, dtype)


def joint_heads(
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    heads: int,
    eps: float,
) -> Tensor:
    """Joins streams [B, N, heads * d] to [B, N1 + N2, heads, d], in their dtype."""
    dtype = compute_dtype(first)
    joined = []
    for stream, w in ((first, weight), (second, weight2)):
        if stream is None:
            continue
        z = stream.unflatten(-1, (heads, -1)).to(dtype)
        if w is not None:
            z = (z * _rms(z, eps)) * w.to(dtype)
        joined.append(z)
    z = torch.cat(joined, 1)
    if cos is not None:
        z = z * cos.to(dtype)[:, None] + _turn(z) * sin.to(dtype)[:, None]
    return _rounded(z, first.dtype)


def _rms(x: Tensor, eps: float) -> Tensor:
    """Computes the reciprocal root of the mean square of each head."""
    return _inverse_root(over(row_sum(x * x), x.shape[-1]) + eps)


def _turn(x: Tensor) -> Tensor:
    """Turns each pair (a, b) of the last dimension into (-b, a)."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((-b, a), -1).flatten(-2)


def rotated_back(grad: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Computes gz of the module docstring, in the compute dtype."""
    g = grad.to(compute_dtype(grad))
    if cos is None:
        return g
    return g * cos.to(g.dtype)[:, None] - _turn(g * sin.to(g.dtype)[:, None])


def joint_heads_backward(
    grad: Tensor,
    first: Tensor,
    second: Tensor | None,
    weight: Tensor | None,
    weight2: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of both streams, contiguous; the second is empty without one."""
    gz = rotated_back(grad, cos, sin)
    count = first.shape[1]
    d_first = _stream_gradient(gz[:, :count], first, weight, eps)
    if second is None:
        return d_first, first.new_empty(0)
    return d_first, _stream_gradient(gz[:, count:], second, weight2, eps)


def _stream_gradient(gz: Tensor, stream: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Computes the gradient of a stream [B, N, heads * d] from its gz [B, N, heads, d]."""
    if weight is None:
        return _rounded(gz.flatten(-2), stream.dtype)
    x = stream.view(gz.shape).to(gz.dtype)
    r = _rms(x, eps)
    h, g = x * r, gz * weight.to(gz.dtype)
    dx = (g - h * over(row_sum(g * h), x.shape[-1])) * r
    return _rounded(dx.flatten(-2), stream.dtype)


def head_weight_gradient(gz: Tensor, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes the gradient of a stream's RMSNorm weight [d]; gz from `rotated_back`."""
    x = stream.unflatten(-1, gz.shape[-2:]).to(gz.dtype)
    return (gz * (x * _rms(x, eps))).sum((0, 1, 2)).to(weight.dtype)
