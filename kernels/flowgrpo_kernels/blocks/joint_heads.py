"""Queries or keys of joint attention: streams concatenated, each head normalised and turned.

    z   = x / sqrt(mean(x^2) + eps) w       over the d of each head; z = x for a stream without w
    out = z cos + turn(z) sin               with `rotary`; turn of each pair (a, b) is (-b, a)

RMSNorm of queries and keys (SD3.5, FLUX: diffusers' RMSNorm), rotary embedding of interleaved
pairs (diffusers' apply_rotary_emb with use_real_unbind_dim=-1) and the concatenation of the
streams (image and text), which JointAttnProcessor2_0 and FluxAttnProcessor do one after the other
with a rounding each.

Shapes: streams [B, N_i, heads * d], whose rows may be slices of one product; weights [d]; cos, sin
float32 [S, d] with S the sum of the N_i; out [B, S, heads, d]. Streams are of one dtype out of
float32, bfloat16 and float16, and so is out. Bytes per element: stream + out forward; grad + stream
+ gradient backward; cos and sin are read once per token. The root mean squares are computed again.

Layout of the kernels. One program per token, all heads of it, 8 at a time. A tile is [8, d] with 8
neighbouring elements a thread, so that a head lies inside a warp: the sum of squares and the turn
of a pair need neither shared memory nor a barrier. The tiles of a token are asked for together.
Rows of the grid are tokens of the result; a program has one stream, that of its token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..arguments import integer
from ..autograd import check_transforms, once_differentiable
from ..backends import dispatch, triton
from ..backends.triton import narrow, tl
from . import checks, reference, rows
from .rows import appended, divided, inverse_root, jit, token_at, token_of

MAX_SIZE = 256
"""Elements of a head, at most: with 8 heads at a time, 8 values a thread in 8 warps."""


def _fake(first, second, weight, weight2, cos, sin, heads, eps):
    batch, tokens, width = first.shape
    if second is not None:
        tokens += second.shape[1]
    return first.new_empty((batch, tokens, heads, width // heads))


def _fake_backward(grad, first, second, weight, weight2, cos, sin, eps):
    d_second = first.new_empty((0,) if second is None else second.shape)
    return first.new_empty(first.shape), d_second


_STREAMS = "Tensor first, Tensor? second, Tensor? weight, Tensor? weight2, Tensor? cos, Tensor? sin"
joint_heads_op = dispatch.define(
    "joint_heads",
    f"({_STREAMS}, int heads, float eps) -> Tensor",
    reference.joint_heads,
    _fake,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)
joint_heads_backward_op = dispatch.define(
    "joint_heads_backward",
    f"(Tensor grad, {_STREAMS}, float eps) -> (Tensor, Tensor)",
    reference.joint_heads_backward,
    _fake_backward,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)


@jit
def _pair_sum(b_x, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Sums [TILE, SIZE] -> [TILE, 1] by adjacent pairs."""
    for p in tl.static_range(8):
        if (SIZE >> p) > 1:
            b_x = tl.sum(tl.reshape(b_x, [TILE, SIZE >> (p + 1), 2]), axis=2)
    return b_x


@jit
def _inverse_rms(b_x, eps, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Computes 1 / sqrt(mean square + eps) of each head: [TILE, 1]."""
    return inverse_root(divided(_pair_sum(b_x * b_x, TILE, SIZE), SIZE) + eps)


@jit
def _load_for_heads(ptr, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Loads a row [SIZE] that all heads share, as float32 [TILE, SIZE]."""
    # Read once for each head of a tile, out of L1: a [1, SIZE] would have another layout, and the
    # compiler would move every tile to it and back through shared memory.
    o_head = tl.arange(0, TILE)[:, None] * 0
    return tl.load(ptr + o_head + tl.arange(0, SIZE)[None, :]).to(tl.float32)


@jit
def _pairs(b_x, TILE: tl.constexpr, SIZE: tl.constexpr):
    """Splits pairs into first and second elements, each [TILE, SIZE / 2]."""
    return tl.split(tl.reshape(b_x, [TILE, SIZE // 2, 2]))


@jit
def _tables(cos_ptr, sin_ptr, token, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Loads cos and sin of a token at the first and the second elements of the pairs."""
    cos_a, cos_b = _pairs(_load_for_heads(cos_ptr + token * SIZE, SIZE, TILE), TILE, SIZE)
    sin_a, sin_b = _pairs(_load_for_heads(sin_ptr + token * SIZE, SIZE, TILE), TILE, SIZE)
    return cos_a, cos_b, sin_a, sin_b


@jit
def _load_heads(
    ptr, head_step, ALIGN: tl.constexpr,
    HEADS: tl.constexpr, SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Loads a token's heads in their dtype: a tuple of [TILE, SIZE], +0 beyond the last head."""
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
    """Writes all heads of a token, TILE at a time. p_x and p_out [HEADS, SIZE], contiguous."""
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
    """Writes the gradient of a token's heads. p_grad of any stride; p_x, p_dx contiguous."""
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
    """Writes out of one token."""
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
    """Writes the gradient of one token, into that of its stream."""
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


def launch_options(heads: int, size: int, steps: list[int]) -> dict[str, int | bool]:
    """Returns constants and options of a launch: 8 heads at a time, 8 values a thread."""
    if size & (size - 1) or size > MAX_SIZE:
        raise ValueError(
            f"streams must have heads of a power of two up to {MAX_SIZE} elements for the Triton "
            f"kernels, got {size}; FLOWGRPO_KERNELS=reference runs any size"
        )
    rows.check_width("streams", heads * size)
    tile = min(8, 1 << (heads - 1).bit_length())
    return {
        "HEADS": heads,
        "SIZE": size,
        "TILE": tile,
        "ALIGN": rows.alignment(size, *steps),
        "num_warps": max(1, tile * size // 256),
        "enable_fp_fusion": False,
    }


@triton.launcher("joint_heads")
def _launch(launch, first, second, weight, weight2, cos, sin, heads, eps):
    """One launch."""
    first, second = map(rows.dense, (first, second))
    constants = [v if v is None else v.contiguous() for v in (weight, weight2, cos, sin)]
    batch, count, width = first.shape
    tokens = count + (0 if second is None else second.shape[1])
    shape = (batch, tokens, heads, width // heads)
    out = first.new_empty(shape)
    steps = rows.strides(first, (second, 2))
    sizes = launch_options(heads, width // heads, steps)
    if batch * tokens:
        with triton.on(first.device):
            launch(
                joint_heads_kernel, batch * tokens, (first, second, *constants, out),
                (tokens, count, eps, *steps), **sizes,
            )  # fmt: skip
    return out


@triton.launcher("joint_heads_backward")
def _launch_backward(launch, grad, first, second, weight, weight2, cos, sin, eps):
    """One launch."""
    grad, first, second = map(rows.dense, (grad, first, second))
    constants = [v if v is None else v.contiguous() for v in (weight, weight2, cos, sin)]
    batch, tokens, heads, size = grad.shape
    shapes = [first.shape, (0,) if second is None else second.shape]
    d_first, d_second = map(first.new_empty, shapes)
    steps = rows.strides(grad, first, (second, 2))
    sizes = launch_options(heads, size, steps)
    if batch * tokens:
        with triton.on(first.device):
            launch(
                joint_heads_backward_kernel, batch * tokens,
                (grad, first, second, *constants, d_first, None if second is None else d_second),
                (tokens, first.shape[1], eps, *steps), **sizes,
            )  # fmt: skip
    return d_first, d_second


class _JointHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, first, second, weight, weight2, cos, sin, heads, eps):
        ctx.save_for_backward(first, second, weight, weight2, cos, sin)
        ctx.eps = eps
        return joint_heads_op(first, second, weight, weight2, cos, sin, heads, eps)

    @staticmethod
    @once_differentiable("joint_heads")
    def backward(ctx, grad):
        first, second, weight, weight2, cos, sin = ctx.saved_tensors
        needs_first, needs_second, needs_weight, needs_weight2, *_ = ctx.needs_input_grad
        d_first = d_second = d_weight = d_weight2 = None
        if needs_first or needs_second:
            d_first, d_second = joint_heads_backward_op(
                grad, first, second, weight, weight2, cos, sin, ctx.eps
            )
        if needs_weight or needs_weight2:
            gz, count = reference.rotated_back(grad, cos, sin), first.shape[1]
            if needs_weight:
                d_weight = reference.head_weight_gradient(gz[:, :count], first, weight, ctx.eps)
            if needs_weight2:
                d_weight2 = reference.head_weight_gradient(gz[:, count:], second, weight2, ctx.eps)
        return (
            d_first if needs_first else None,
            d_second if needs_second else None,
            d_weight,
            d_weight2,
            *(None, None, None, None),  # cos, sin, heads, eps
        )


def joint_heads(
    streams: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    *,
    heads: int,
    eps: float = 1e-6,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Joins streams to [B, S, heads, d], contiguous; differentiable once in streams and weights.

    Args:
        streams: one or two tensors [B, N_i, heads * d] of one dtype, in the order in which they are
            concatenated; the last dimension contiguous, rows of any stride. On a GPU d is a power
            of two up to 256.
        weights: for each stream the [d] weight of its RMSNorm, or None for no norm.
        heads: the number of heads.
        eps: added to the mean square.
        rotary: None or (cos, sin), float32 [S, d], interleaved as FLUX's; constants.
    """
    streams, weights = _listed("streams", streams), _listed("weights", weights)
    if len(streams) not in (1, 2) or len(weights) != len(streams):
        raise ValueError(
            f"streams must be 1 or 2 tensors with one weight (or None) each, got {len(streams)} "
            f"streams and {len(weights)} weights"
        )
    heads = integer("heads", heads)
    size = _check_streams(streams, heads)
    for i, weight in enumerate(weights):
        if weight is not None:
            checks.check_float(f"weights[{i}]", weight, streams[0], "streams[0]")
            if weight.shape != (size,):
                raise ValueError(f"weights[{i}] must be [{size}], got {list(weight.shape)}")
    eps = checks.positive("eps", eps)
    cos, sin = _check_rotary(rotary, streams, size)
    first, second = streams if len(streams) == 2 else (streams[0], None)
    weight, weight2 = weights if len(weights) == 2 else (weights[0], None)
    args = (first, second, weight, weight2, cos, sin, heads, eps)
    check_transforms("joint_heads", first, second, weight, weight2)
    if checks.needs_grad(first, second, weight, weight2):
        return _JointHeads.apply(*args)
    return joint_heads_op(*args)


def _listed(name: str, value) -> list:
    """Checks a sequence that is no tensor and returns it as a list."""
    if isinstance(value, Tensor) or not isinstance(value, Sequence):
        raise TypeError(f"{name} must be a sequence, got {type(value).__name__}")
    return list(value)


def _check_streams(streams: list, heads: int) -> int:
    """Checks the streams and returns d."""
    for i, stream in enumerate(streams):
        checks.check_tokens(f"streams[{i}]", stream)
    first = streams[0]
    if heads < 1 or first.shape[2] % heads:
        raise ValueError(f"heads must divide the width {first.shape[2]} of streams[0], got {heads}")
    for stream in streams[1:]:
        if stream.dtype != first.dtype:
            raise TypeError(f"streams[1] must be {first.dtype} like streams[0], got {stream.dtype}")
        if stream.device != first.device:
            raise ValueError(
                f"streams[1] must be on {first.device} like streams[0], got {stream.device}"
            )
        if stream.shape[0] != first.shape[0] or stream.shape[2] != first.shape[2]:
            raise ValueError(
                f"streams[1] must be [{first.shape[0]}, N, {first.shape[2]}] like streams[0], got "
                f"{list(stream.shape)}"
            )
    return first.shape[2] // heads


def _check_rotary(rotary, streams: list[Tensor], size: int) -> tuple[Tensor | None, Tensor | None]:
    """Checks the rotary tables and returns (cos, sin), or (None, None) without them."""
    cos, sin = checks.pair("rotary", rotary, "(cos, sin)")
    if rotary is None:
        return None, None
    expected = (sum(stream.shape[1] for stream in streams), size)
    table = torch.float64 if streams[0].dtype == torch.float64 else torch.float32
    for name, value in (("cos", cos), ("sin", sin)):
        checks.check_tensor(name, value)
        if value.dtype not in (torch.float32, table):
            raise TypeError(f"{name} must be float32, got {value.dtype}")
        if value.shape != expected:
            raise ValueError(f"{name} must be [S, d] = {list(expected)}, got {list(value.shape)}")
        if value.device != streams[0].device:
            raise ValueError(
                f"{name} must be on {streams[0].device} like streams[0], got {value.device}"
            )
        if torch.is_grad_enabled() and value.requires_grad:
            raise ValueError(f"{name} is a constant for this op but requires a gradient; detach it")
    if size % 2:
        raise ValueError(f"rotary needs an even head size, got {size}")
    return cos, sin
