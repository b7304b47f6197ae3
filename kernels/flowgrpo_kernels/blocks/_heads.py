"""Triton kernels of joint_heads.py: one program a token, all heads of it, 8 at a time.

A tile is [8, d] with 8 neighbouring elements a thread, so that a head lies inside a warp: the sum
of squares and the turn of a pair need neither shared memory nor a barrier. The tiles of a token are
asked for together. Rows of the grid are tokens of the result; the part that a token comes from is
uniform in its program.
"""

from __future__ import annotations

from .. import _triton
from . import _rows
from ._rows import appended, divided, inverse_root, jit, token_at, token_of

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
    """A tuple of [TILE, SIZE] of a token's heads in their dtype; +0 beyond the last head."""
    heads = ()
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        o_head = i * TILE + tl.arange(0, TILE)[:, None]
        o = tl.multiple_of(o_head.to(tl.int64) * head_step, [ALIGN, ALIGN])
        o += tl.arange(0, SIZE)[None, :]
        heads = appended(heads, tl.load(ptr + o, mask=o_head < HEADS, other=0.0))
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
        b_z = x[i].to(tl.float32)
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
        # Weight first: after x, Triton 3.6 gives h * sum the layout of the sum, with all of a head
        # in each thread, which takes three times the registers.
        b_w = _load_for_heads(w_ptr, SIZE, TILE)
        x = _load_heads(p_x, SIZE, SIZE, HEADS, SIZE, TILE)
    for i in tl.static_range((HEADS + TILE - 1) // TILE):
        b_g = grad[i].to(tl.float32)
        if ROTARY:
            cos_a, cos_b, sin_a, sin_b = tables
            b_a, b_b = _pairs(b_g, TILE, SIZE)
            b_g = tl.join(b_a * cos_a + b_b * sin_b, b_b * cos_b - b_a * sin_a)
            b_g = tl.reshape(b_g, [TILE, SIZE])
        if w_ptr is not None:
            b_x = x[i].to(tl.float32)
            b_r = _inverse_rms(b_x, eps, TILE, SIZE)
            b_h = b_x * b_r
            b_g = b_g * b_w
            b_g = (b_g - b_h * divided(_pair_sum(b_g * b_h, TILE, SIZE), SIZE)) * b_r
        _store_heads(p_dx, b_g, i, HEADS)


@jit
def joint_heads_kernel(
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
def joint_heads_backward_kernel(
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


def options(heads: int, size: int, steps: list[int]) -> dict[str, int | bool]:
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
    out = first.new_empty(shape)
    steps = _rows.strides(first, (second, 2))
    sizes = options(heads, width // heads, steps)
    if batch * tokens:
        with _triton.on(first.device):
            joint_heads_kernel[(batch * tokens,)](
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
    d_first, d_second = map(first.new_empty, shapes)
    steps = _rows.strides(grad, first, (second, 2))
    sizes = options(heads, size, steps)
    if batch * tokens:
        with _triton.on(first.device):
            joint_heads_backward_kernel[(batch * tokens,)](
                grad, first, second, *constants, d_first, None if second is None else d_second,
                tokens, first.shape[1], eps, *steps, **sizes,
            )  # fmt: skip
    return d_first, d_second
