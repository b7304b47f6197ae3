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

from ..autograd import check_transforms, once_differentiable
from ..backends import dispatch, triton
from ..backends.triton import tl
from . import checks, reference, rows
from .rows import (
    appended,
    divided,
    inside,
    inverse_root,
    jit,
    load_chunk,
    load_row,
    row_sum,
    sample_at,
    store_chunk,
    token_at,
    token_of,
)


def _fake(x, scale, shift, scale2, shift2, eps):
    dtype, tokens = reference.compute_dtype(x), x.shape[:2]
    y, y2 = x.new_empty(x.shape), x.new_empty((0,) if scale2 is None else x.shape)
    return y, y2, x.new_empty(tokens, dtype=dtype), x.new_empty(tokens, dtype=dtype)


def _fake_alone(x, scale, shift, scale2, shift2, eps):
    return [x.new_empty(x.shape) for _ in range(1 if scale2 is None else 2)]


def _fake_backward(dy, dy2, x, scale, scale2, mean, rstd):
    return x.new_empty(x.shape)


_ARGUMENTS = "(Tensor x, Tensor scale, Tensor shift, Tensor? scale2, Tensor? shift2, float eps)"
# y, y2 (empty without a second), mean and rstd: for a backward. Without one, [y] or [y, y2] alone.
norm_modulate_op = dispatch.define(
    "norm_modulate",
    f"{_ARGUMENTS} -> (Tensor, Tensor, Tensor, Tensor)",
    reference.norm_modulate,
    _fake,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)
norm_modulate_alone_op = dispatch.define(
    "norm_modulate_alone",
    f"{_ARGUMENTS} -> Tensor[]",
    reference.norm_modulate_alone,
    _fake_alone,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)
norm_modulate_backward_op = dispatch.define(
    "norm_modulate_backward",
    "(Tensor dy, Tensor? dy2, Tensor x, Tensor scale, Tensor? scale2, Tensor mean, Tensor rstd)"
    " -> Tensor",
    reference.norm_modulate_backward,
    _fake_backward,
    backends=dispatch.LAUNCHED,
    any_strides=True,
)


@jit
def norm_modulate_kernel(
    x_ptr,  # [B, tokens, WIDTH]
    scale_ptr,  # [B, WIDTH]
    shift_ptr,  # [B, WIDTH]
    scale2_ptr,  # [B, WIDTH] or None
    shift2_ptr,  # [B, WIDTH] or None
    y_ptr,  # [B, tokens, WIDTH], contiguous
    y2_ptr,  # the same or None
    mean_ptr,  # [B, tokens] or None
    rstd_ptr,  # [B, tokens] or None
    tokens,
    eps,
    x_batch,
    x_token,
    scale_batch,
    shift_batch,
    scale2_batch,
    shift2_batch,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes y of one token, and y2, mean and rstd where they are asked for."""
    batch, token = token_of(tokens)
    out = tl.program_id(0).to(tl.int64)
    x = load_row(token_at(x_ptr, batch, x_batch, token, x_token, ALIGN), WIDTH, LANES)
    scale = load_row(sample_at(scale_ptr, batch, scale_batch, ALIGN), WIDTH, LANES)
    mean = divided(row_sum(x, WIDTH, LANES), WIDTH)
    d, squares = (), ()
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        b_d = inside(x[i] - mean, i, WIDTH, LANES)
        d, squares = appended(d, b_d), appended(squares, b_d * b_d)
    rstd = inverse_root(divided(row_sum(squares, WIDTH, LANES), WIDTH) + eps)
    # Not asked for before: the registers would not suffice for two rows more.
    shift = load_row(sample_at(shift_ptr, batch, shift_batch, ALIGN), WIDTH, LANES)
    if mean_ptr is not None:
        tl.store(mean_ptr + out, mean)
        tl.store(rstd_ptr + out, rstd)
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        b_y = (d[i] * rstd) * (1.0 + scale[i]) + shift[i]
        store_chunk(y_ptr + out * WIDTH, b_y, i, WIDTH, LANES)
    if y2_ptr is not None:
        # Not asked for before: the registers would halve the programs on a multiprocessor.
        scale = load_row(sample_at(scale2_ptr, batch, scale2_batch, ALIGN), WIDTH, LANES)
        shift = load_row(sample_at(shift2_ptr, batch, shift2_batch, ALIGN), WIDTH, LANES)
        for i in tl.static_range((WIDTH + LANES - 1) // LANES):
            b_y = (d[i] * rstd) * (1.0 + scale[i]) + shift[i]
            store_chunk(y2_ptr + out * WIDTH, b_y, i, WIDTH, LANES)


@jit
def norm_modulate_backward_kernel(
    dy_ptr,  # [B, tokens, WIDTH]
    dy2_ptr,  # [B, tokens, WIDTH] or None
    x_ptr,  # [B, tokens, WIDTH]
    scale_ptr,  # [B, WIDTH]
    scale2_ptr,  # [B, WIDTH] or None
    mean_ptr,  # [B, tokens]
    rstd_ptr,  # [B, tokens]
    dx_ptr,  # [B, tokens, WIDTH], contiguous
    tokens,
    dy_batch,
    dy_token,
    dy2_batch,
    dy2_token,
    x_batch,
    x_token,
    scale_batch,
    scale2_batch,
    WIDTH: tl.constexpr,
    LANES: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Writes dx of one token."""
    batch, token = token_of(tokens)
    out = tl.program_id(0).to(tl.int64)
    p_dy = token_at(dy_ptr, batch, dy_batch, token, dy_token, ALIGN)
    p_x = token_at(x_ptr, batch, x_batch, token, x_token, ALIGN)
    p_scale = sample_at(scale_ptr, batch, scale_batch, ALIGN)
    mean, rstd = tl.load(mean_ptr + out), tl.load(rstd_ptr + out)
    g, h, gh = (), (), ()
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        b_g = load_chunk(p_dy, i, WIDTH, LANES) * (1.0 + load_chunk(p_scale, i, WIDTH, LANES))
        if dy2_ptr is not None:
            p_dy2 = token_at(dy2_ptr, batch, dy2_batch, token, dy2_token, ALIGN)
            p_scale2 = sample_at(scale2_ptr, batch, scale2_batch, ALIGN)
            b_scale = 1.0 + load_chunk(p_scale2, i, WIDTH, LANES)
            b_g += load_chunk(p_dy2, i, WIDTH, LANES) * b_scale
        # Beyond the row's end g is 0, so g h is too, and h of no consequence.
        b_h = (load_chunk(p_x, i, WIDTH, LANES) - mean) * rstd
        g, h, gh = appended(g, b_g), appended(h, b_h), appended(gh, b_g * b_h)
    mean_g = divided(row_sum(g, WIDTH, LANES), WIDTH)
    mean_gh = divided(row_sum(gh, WIDTH, LANES), WIDTH)
    for i in tl.static_range((WIDTH + LANES - 1) // LANES):
        b_dx = ((g[i] - mean_g) - h[i] * mean_gh) * rstd
        store_chunk(dx_ptr + out * WIDTH, b_dx, i, WIDTH, LANES)


@triton.launcher("norm_modulate")
def _launch(launch, x, scale, shift, scale2, shift2, eps):
    """One launch."""
    mean, rstd = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    y, *second = _normalised(launch, x, scale, shift, scale2, shift2, eps, mean, rstd)
    return y, second[0] if second else x.new_empty(0), mean, rstd


@triton.launcher("norm_modulate_alone")
def _normalised(launch, x, scale, shift, scale2, shift2, eps, mean=None, rstd=None):
    """One launch. Allocates only what is returned: [y] or [y, y2]."""
    x, scale, shift, scale2, shift2 = map(rows.dense, (x, scale, shift, scale2, shift2))
    batch, tokens, width = x.shape
    y = x.new_empty(x.shape)
    y2 = None if scale2 is None else torch.empty_like(y)
    steps = rows.strides(x, scale, shift, (scale2, 1), (shift2, 1))
    sizes = rows.options(width, *steps)
    if batch * tokens:
        with triton.on(x.device):
            launch(
                norm_modulate_kernel, batch * tokens,
                (x, scale, shift, scale2, shift2, y, y2, mean, rstd), (tokens, eps, *steps),
                **sizes,
            )  # fmt: skip
    return [y] if y2 is None else [y, y2]


@triton.launcher("norm_modulate_backward")
def _launch_backward(launch, dy, dy2, x, scale, scale2, mean, rstd):
    """One launch."""
    dy, dy2, x, scale, scale2 = map(rows.dense, (dy, dy2, x, scale, scale2))
    batch, tokens, width = x.shape
    dx = x.new_empty(x.shape)
    steps = rows.strides(dy, (dy2, 2), x, scale, (scale2, 1))
    sizes = rows.options(width, *steps)
    if batch * tokens:
        with triton.on(x.device):
            launch(
                norm_modulate_backward_kernel, batch * tokens,
                (dy, dy2, x, scale, scale2, mean, rstd, dx), (tokens, *steps), **sizes,
            )  # fmt: skip
    return dx


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, scale2, shift2, eps):
        y, y2, mean, rstd = norm_modulate_op(x, scale, shift, scale2, shift2, eps)
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
        shift_dtype, shift2_dtype = ctx.dtypes
        needs_x, needs_scale, needs_shift, needs_scale2, needs_shift2, _ = ctx.needs_input_grad
        dy2 = None if scale2 is None else dy2
        dx = None
        if needs_x and dy is not None:
            # A scale whose output does not reach the loss would only compile another kernel.
            scale2_or_none = None if dy2 is None else scale2
            dx = norm_modulate_backward_op(dy, dy2, x, scale, scale2_or_none, mean, rstd)
        elif needs_x and dy2 is not None:
            # The second output alone reaches the loss: it takes the place of the first.
            dx = norm_modulate_backward_op(dy2, None, x, scale2, None, mean, rstd)

        def scale_gradient(grad, scale, needed):
            if grad is None or not needed:
                return None
            return reference.token_sum(grad * reference.normalised(x, mean, rstd), scale.dtype)

        def shift_gradient(grad, dtype, needed):
            return reference.token_sum(grad, dtype) if needed and grad is not None else None

        return (
            dx,
            scale_gradient(dy, scale, needs_scale),
            shift_gradient(dy, shift_dtype, needs_shift),
            scale_gradient(dy2, scale2, needs_scale2),
            shift_gradient(dy2, shift2_dtype, needs_shift2),
            None,
        )


def norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    second: tuple[Tensor, Tensor] | None = None,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """Computes LN(x) (1 + scale) + shift, differentiable once in every tensor.

    Args:
        x: [B, N, D], D up to 8192 on a GPU.
        scale, shift: [B, D], rows of any stride (views of one modulation tensor).
        second: (scale2, shift2) [B, D]: a second output from the same normalised x.
        eps: added to the variance.

    Returns:
        y [B, N, D] in the dtype of x, or (y, y2) with `second`.
    """
    checks.check_tokens("x", x)
    scale2, shift2 = checks.pair("second", second, "(scale2, shift2)")
    checks.check_row("scale", scale, x)
    checks.check_row("shift", shift, x)
    if second is not None:
        checks.check_row("scale2", scale2, x)
        checks.check_row("shift2", shift2, x)
    args = (x, scale, shift, scale2, shift2, checks.positive("eps", eps))
    check_transforms("norm_modulate", x, scale, shift, scale2, shift2)
    if checks.needs_grad(x, scale, shift, scale2, shift2):
        y, y2 = _NormModulate.apply(*args)
        return y if second is None else (y, y2)
    outputs = norm_modulate_alone_op(*args)
    return outputs[0] if second is None else tuple(outputs)
