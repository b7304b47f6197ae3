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

from .. import _triton
from .._autograd import once_differentiable
from . import _checks, _rows
from ._ops import op
from ._rows import appended, divided, inverse_root, jit, token_at, token_of
from .reference import head_weight_gradient, rotated_back

tl, narrow = _triton.tl, _triton.narrow
MAX_SIZE = 256
"""Elements of a head: with 8 heads at a time, 8 values a thread in 8 warps."""


@jit
def _pair_sum(b_x, TILE: tl.constexpr, SIZE: tl.constexpr):
    """[TILE, SIZE] -> [TILE, 1] by adjacent pairs."""
    for p in tl.static_range(8):
        if (SIZE >> p) > 1:
            b_x = tl.sum(tl.reshape(b_x, [TILE, SIZE >> (p + 1), 2]), axis=2)
    return b_x


@jit
def _inverse_rms(b_x, eps, TILE: tl.constexpr, SIZE: tl.constexpr):
    return inverse_root(divided(_pair_sum(b_x * b_x, TILE, SIZE), SIZE) + eps)


@jit
def _load_for_heads(ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """[SIZE] that all heads share, as float32 [TILE, SIZE].

    Read once for each head of a tile, out of L1: a [1, SIZE] would have a layout of its own, and
    the compiler would move every tile to it and back through shared memory.
    """
    o_head = tl.arange(0, TILE)[:, None] * 0
    return tl.load(ptr + o_head + tl.arange(0, SIZE)[None, :]).to(tl.float32)


@jit
def _pairs(b_x, TILE: tl.constexpr, SIZE: tl.constexpr):
    """The first and the second elements of the pairs, each [TILE, SIZE / 2]."""
    return tl.split(tl.reshape(b_x, [TILE, SIZE // 2, 2]))


@jit
def _tables(cos_ptr, sin_ptr, token, SIZE: tl.constexpr, TILE: tl.constexpr):
    """cos and sin of a token at the first and the second elements of the pairs."""
    cos_a, cos_b = _pairs(_load_for_heads(cos_ptr + token * SIZE, SIZE, TILE), TILE, SIZE)
    sin_a, sin_b = _pairs(_load_for_heads(sin_ptr + token * SIZE, SIZE, TILE), TILE, SIZE)
    return cos_a, cos_b, sin_a, sin_b


@jit
def _load_heads(
    ptr, head_step, ALIGN: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tuple of [TILE, SIZE] float32 of a token's heads; +0 beyond the last head."""
    heads = ()
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        o_head = i * TILE + tl.arange(0, TILE)[:, None]
        o = tl.multiple_of(o_head.to(tl.int64) * head_step, [ALIGN, ALIGN])
        o += tl.arange(0, SIZE)[None, :]
        heads = appended(heads, tl.load(ptr + o, mask=o_head < HEADS, other=0.0).to(tl.float32))
    return heads


@jit
def _store_heads(ptr, b_x, NUMBER: tl.constexpr, HEADS: tl.constexpr):
    """Stores tile NUMBER of a token's contiguous heads, rounded once."""
    TILE: tl.constexpr = b_x.shape[0]
    SIZE: tl.constexpr = b_x.shape[1]
    o_head = NUMBER * TILE + tl.arange(0, TILE)[:, None]
    o = o_head * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(ptr + o, narrow(b_x, ptr.dtype.element_ty), mask=o_head < HEADS)


@jit
def _forward_token(
    p_x, w_ptr, p_out, tables, eps,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """All heads of a token, TILE at a time. p_x and p_out [HEADS, SIZE], contiguous."""
    x = _load_heads(p_x, SIZE, SIZE, HEADS, SIZE, TILE)
    if w_ptr is not None:
        b_w = _load_for_heads(w_ptr, SIZE, TILE)
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        b_z = x[i]
        if w_ptr is not None:
            b_z = (b_z * _inverse_rms(b_z, eps, TILE, SIZE)) * b_w
        if ROTARY:
            cos_a, cos_b, sin_a, sin_b = tables
            b_a, b_b = _pairs(b_z, TILE, SIZE)
            b_z = tl.join(b_a * cos_a - b_b * sin_a, b_b * cos_b + b_a * sin_b)
            b_z = tl.reshape(b_z, [TILE, SIZE])
        _store_heads(p_out, b_z, i, HEADS)


@jit
def _backward_token(
    p_grad, grad_head, p_x, w_ptr, p_dx, tables, eps, ALIGN: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """All heads of a token. p_grad [HEADS, SIZE] of any stride; p_x, p_dx contiguous."""
    grad = _load_heads(p_grad, grad_head, ALIGN, HEADS, SIZE, TILE)
    if w_ptr is not None:
        x = _load_heads(p_x, SIZE, SIZE, HEADS, SIZE, TILE)
        b_w = _load_for_heads(w_ptr, SIZE, TILE)
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        b_g = grad[i]
        if ROTARY:
            cos_a, cos_b, sin_a, sin_b = tables
            b_a, b_b = _pairs(b_g, TILE, SIZE)
            b_g = tl.join(b_a * cos_a + b_b * sin_b, b_b * cos_b - b_a * sin_a)
            b_g = tl.reshape(b_g, [TILE, SIZE])
        if w_ptr is not None:
            b_r = _inverse_rms(x[i], eps, TILE, SIZE)
            b_h = x[i] * b_r
            b_g = b_g * b_w
            b_g = (b_g - b_h * divided(_pair_sum(b_g * b_h, TILE, SIZE), SIZE)) * b_r
        _store_heads(p_dx, b_g, i, HEADS)


@jit
def _joint_heads_kernel(
    first_ptr,  # [B, count, HEADS * SIZE]
    second_ptr,  # [B, tokens - count, HEADS * SIZE] or None
    weight_ptr,  # [SIZE] or None
    weight2_ptr,  # [SIZE] or None
    cos_ptr,  # [tokens, SIZE] or None
    sin_ptr,  # the same
    out_ptr,  # [B, tokens, HEADS, SIZE], contiguous
    tokens,
    count,
    eps,
    first_batch,
    first_token,
    second_batch,
    second_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    batch, token = token_of(tokens)
    p_out = out_ptr + tl.program_id(0).to(tl.int64) * (HEADS * SIZE)
    tables = ()
    if cos_ptr is not None:
        tables = _tables(cos_ptr, sin_ptr, token, SIZE, TILE)
    if second_ptr is None or token < count:
        p_x = token_at(first_ptr, batch, first_batch, token, first_token, ALIGN)
        _forward_token(p_x, weight_ptr, p_out, tables, eps, HEADS, SIZE, TILE, cos_ptr is not None)
    else:
        p_x = token_at(second_ptr, batch, second_batch, token - count, second_token, ALIGN)
        _forward_token(p_x, weight2_ptr, p_out, tables, eps, HEADS, SIZE, TILE, cos_ptr is not None)


@jit
def _joint_heads_backward_kernel(
    grad_ptr,  # [B, tokens, HEADS, SIZE]
    first_ptr,  # [B, count, HEADS * SIZE]
    second_ptr,  # [B, tokens - count, HEADS * SIZE] or None
    weight_ptr,  # [SIZE] or None
    weight2_ptr,  # [SIZE] or None
    cos_ptr,  # [tokens, SIZE] or None
    sin_ptr,  # the same
    d_first_ptr,  # [B, count, HEADS * SIZE], contiguous
    d_second_ptr,  # [B, tokens - count, HEADS * SIZE], contiguous, or None
    tokens,
    count,
    eps,
    grad_batch,
    grad_token,
    grad_head,
    first_batch,
    first_token,
    second_batch,
    second_token,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
    ALIGN: tl.constexpr,
):
    batch, token = token_of(tokens)
    p_grad = token_at(grad_ptr, batch, grad_batch, token, grad_token, ALIGN)
    tables = ()
    if cos_ptr is not None:
        tables = _tables(cos_ptr, sin_ptr, token, SIZE, TILE)
    if second_ptr is None or token < count:
        p_x = token_at(first_ptr, batch, first_batch, token, first_token, ALIGN)
        p_dx = d_first_ptr + (batch * count + token) * (HEADS * SIZE)
        _backward_token(
            p_grad, grad_head, p_x, weight_ptr, p_dx, tables, eps,
            ALIGN, HEADS, SIZE, TILE, cos_ptr is not None,
        )  # fmt: skip
    else:
        token -= count
        p_x = token_at(second_ptr, batch, second_batch, token, second_token, ALIGN)
        p_dx = d_second_ptr + (batch * (tokens - count) + token) * (HEADS * SIZE)
        _backward_token(
            p_grad, grad_head, p_x, weight2_ptr, p_dx, tables, eps,
            ALIGN, HEADS, SIZE, TILE, cos_ptr is not None,
        )  # fmt: skip


def _sizes(heads: int, size: int, steps: list[int]) -> dict[str, int | bool]:
    """Constants and options of a launch: 8 heads at a time, 8 values a thread."""
    if size & (size - 1) or size > MAX_SIZE:
        raise ValueError(
            f"parts must have heads of a power of two up to {MAX_SIZE} elements for the Triton "
            f"kernels, got {size}; FLOWGRPO_KERNELS=reference runs any size"
        )
    _rows.check_width("parts", heads * size)
    tile = min(8, 1 << (heads - 1).bit_length())
    return {
        "HEADS": heads,
        "SIZE": size,
        "TILE": tile,
        "ALIGN": _rows.alignment(size, *steps),
        "num_warps": max(1, tile * size // 256),
        "enable_fp_fusion": False,
    }


@_triton.launcher("joint_heads")
def _launch(first, second, weight, weight2, cos, sin, heads, eps):
    """One launch."""
    first, second = map(_rows.dense, (first, second))
    constants = [v if v is None else v.contiguous() for v in (weight, weight2, cos, sin)]
    batch, count, width = first.shape
    tokens = count + (0 if second is None else second.shape[1])
    shape = (batch, tokens, heads, width // heads)
    out = torch.empty(shape, dtype=first.dtype, device=first.device)
    steps = _rows.strides(first, (second, 2))
    sizes = _sizes(heads, width // heads, steps)
    if batch * tokens:
        with _triton.on(first.device):
            _joint_heads_kernel[(batch * tokens,)](
                first, second, *constants, out, tokens, count, eps, *steps, **sizes
            )
    return out


@_triton.launcher("joint_heads_backward")
def _launch_backward(grad, first, second, weight, weight2, cos, sin, eps):
    """One launch."""
    grad, first, second = map(_rows.dense, (grad, first, second))
    constants = [v if v is None else v.contiguous() for v in (weight, weight2, cos, sin)]
    batch, tokens, heads, size = grad.shape
    shapes = [first.shape, (0,) if second is None else second.shape]
    d_first, d_second = (torch.empty(s, dtype=first.dtype, device=first.device) for s in shapes)
    steps = _rows.strides(grad, first, (second, 2))
    sizes = _sizes(heads, size, steps)
    if batch * tokens:
        with _triton.on(first.device):
            _joint_heads_backward_kernel[(batch * tokens,)](
                grad, first, second, *constants, d_first, None if second is None else d_second,
                tokens, first.shape[1], eps, *steps, **sizes,
            )  # fmt: skip
    return d_first, d_second


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
