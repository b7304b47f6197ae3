"""log-probability of a stored step, differentiable in the velocities.

    d        = x' - (A x + B v)            v = u + w (velocity - u) under guidance
    log_prob = -k mean[d^2] - c0           0 where C = 0
    d log_prob / dv = 2 k B d / D          0 where C = 0 or the upstream gradient is 0

Shapes and dtypes as in sde_step.py; the float32 sequence and the order of the sum are the same, so
the log_prob of what sde_step stored is the same bits. Bytes per element: velocity (twice under
guidance) + sample + x' forward; the same plus the gradients backward. Nothing of the size of a
latent is kept but the inputs. sample and prev_sample are constants for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .autograd import check_transforms, once_differentiable
from .backends import dispatch, triton
from .backends.triton import (
    CHUNKS_C,
    COL_A,
    COL_B,
    COL_C,
    COL_C0,
    COL_K,
    LANES_C,
    coefficient,
    count,
    jit,
    pair_tree,
    position,
    residual,
    score,
    store_gradient,
    term,
    tl,
)
from .transitions import Transitions


def _fake(velocity, uncond, scale, sample, prev_sample, table, step):
    return sample.new_empty(sample.shape[0], dtype=reference.compute_dtype(sample))


def _fake_backward(grad, velocity, uncond, scale, sample, prev_sample, table, step, uncond_grad):
    return reference.empty_gradients(velocity, uncond, uncond_grad)


log_prob_op = dispatch.define(
    "log_prob",
    "(Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, "
    "Tensor prev_sample, Tensor table, Tensor step) -> Tensor",
    reference.log_prob,
    _fake,
)
log_prob_backward_op = dispatch.define(
    "log_prob_backward",
    "(Tensor grad, Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, "
    "Tensor prev_sample, Tensor table, Tensor step, bool uncond_grad) -> (Tensor, Tensor)",
    reference.log_prob_backward,
    _fake_backward,
)


@jit
def log_prob_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    sums_ptr,  # [B, blocks], or log_prob [B] if SINGLE
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    scale,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    SINGLE: tl.constexpr,
):
    """Writes a block's sum of squares, or the row's log_prob; one program per block."""
    row, _start, base, remaining = position(elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    b_sum = tl.zeros([LANES_C], dtype=tl.float32)
    for chunk in range(CHUNKS_C):
        o_lane = chunk * LANES_C + tl.arange(0, LANES_C)
        _v, b_d = residual(
            v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, GUIDED
        )
        b_sum += b_d * b_d
    total = pair_tree(b_sum, LANES_C)
    if SINGLE:
        k = coefficient(table_ptr, step, num_steps, COL_K)
        c0 = coefficient(table_ptr, step, num_steps, COL_C0)
        c = coefficient(table_ptr, step, num_steps, COL_C)
        tl.store(sums_ptr + row, score(total, elements, k, c0, c))
    else:
        tl.store(sums_ptr + tl.program_id(0), total)


@jit
def log_prob_backward_kernel(
    grad_ptr,  # [B]
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    dv_ptr,  # [B, D]
    du_ptr,  # [B, D] if UNCOND_GRAD
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    scale,
    uncond_scale,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    UNCOND_GRAD: tl.constexpr,
):
    """Writes a block of the gradients; one program per block."""
    row, _start, base, remaining = position(elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    k = coefficient(table_ptr, step, num_steps, COL_K)
    grad = tl.load(grad_ptr + row)
    c_d = tl.div_rn(grad * (2.0 * (k * b)), count(elements))
    for chunk in range(CHUNKS_C):
        o_lane = chunk * LANES_C + tl.arange(0, LANES_C)
        _v, b_d = residual(
            v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, GUIDED
        )
        store_gradient(
            dv_ptr, du_ptr, base, o_lane, remaining, term(c_d, b_d), scale, uncond_scale,
            GUIDED, UNCOND_GRAD,
        )  # fmt: skip


@triton.launcher("log_prob")
def _launch(launch, velocity, uncond, scale, sample, prev_sample, table, step):
    """One launch, and a second one for rows of more than one block."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    log_prob = table.new_empty(rows)
    if rows == 0:
        return log_prob
    blocks = triton.num_blocks(elements)
    sums = log_prob if blocks == 1 else log_prob.new_empty(rows * blocks)
    sizes = (elements, table.shape[0], step.stride(0), blocks)
    with triton.on(sample.device):
        launch(log_prob_kernel, rows * blocks)(
            velocity, uncond, sample, prev_sample, sums, table, step, scale, *sizes,
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            SINGLE=blocks == 1,
            **triton.LAUNCH,
        )  # fmt: skip
        if blocks > 1:
            launch(triton.finish_kernel, rows)(
                sums, log_prob, table, step, *sizes, **triton.second_pass(blocks)
            )
    return log_prob


@triton.launcher("log_prob_backward")
def _launch_backward(
    launch, grad, velocity, uncond, scale, sample, prev_sample, table, step, uncond_grad
):
    """One launch."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    dv, du = reference.empty_gradients(velocity, uncond, uncond_grad)
    if rows == 0 or elements == 0:
        return dv, du
    blocks = triton.num_blocks(elements)
    with triton.on(sample.device):
        launch(log_prob_backward_kernel, rows * blocks)(
            grad, velocity, uncond, sample, prev_sample, dv, du if uncond_grad else None, table,
            step, scale, 1.0 - scale, elements, table.shape[0], step.stride(0), blocks,
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            UNCOND_GRAD=uncond_grad,
            **triton.LAUNCH,
        )  # fmt: skip
    return dv, du


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, velocity, uncond, scale, sample, prev_sample, table, step, uncond_grad):
        ctx.save_for_backward(velocity, uncond, sample, prev_sample, table, step)
        ctx.scale, ctx.uncond_grad = scale, uncond_grad
        return log_prob_op(velocity, uncond, scale, sample, prev_sample, table, step)

    @staticmethod
    @once_differentiable("log_prob")
    def backward(ctx, grad):
        velocity, uncond, sample, prev_sample, table, step = ctx.saved_tensors
        dv, du = log_prob_backward_op(
            grad, velocity, uncond, ctx.scale, sample, prev_sample, table, step, ctx.uncond_grad
        )
        du = du if ctx.uncond_grad else None
        return dv, du, None, None, None, None, None, None


def log_prob(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    uncond_grad: bool = False,
) -> Tensor:
    """Scores prev_sample: float32 [B] log-probability, differentiable once in velocity.

    Args:
        velocity, sample, prev_sample, uncond_velocity: [B, ...], one shape and device.
        transitions, step: as for sde_step.
        uncond_grad: also differentiate in uncond_velocity (by default a constant, as in flow_grpo).
    """
    checks.check_latents(
        sample, velocity=velocity, prev_sample=prev_sample, uncond_velocity=uncond_velocity
    )
    scale = checks.guidance(uncond_velocity, guidance_scale)
    checks.check_transitions(transitions, sample)
    checks.check_constants(sample=sample, prev_sample=prev_sample)
    rows = checks.resolve_step(step, transitions, sample)
    uncond, uncond_grad = checks.uncond_half(uncond_velocity, uncond_grad)
    others = (uncond, scale, sample, prev_sample, transitions.table, rows)
    check_transforms("log_prob", velocity, uncond)
    if torch.is_grad_enabled() and (velocity.requires_grad or uncond_grad):
        return _LogProb.apply(velocity, *others, uncond_grad)
    # The op has no autograd of its own.
    return log_prob_op(velocity.detach(), *others)
