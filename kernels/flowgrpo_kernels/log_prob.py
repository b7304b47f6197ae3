"""log-probability of a stored step, differentiable in the velocities.

    d        = x' - (A x + B v)            v = u + w (velocity - u) under guidance
    log_prob = -k mean[d^2] - c0           0 where C = k = 0
    d log_prob / dv = 2 k B d / D          0 where C = k = 0 or the upstream gradient is 0
    mean     = A x + B v,  x0 = x - sigma v         float32, with return_mean and return_x0

Shapes and dtypes as in sde_step.py; the float32 sequence and the order of the sum are the same, so
the log_prob of what sde_step stored is the same bits. Bytes per element: velocity (twice under
guidance) + sample + x' forward, and 4 for each of mean and x0; the same plus the gradients
backward. Nothing of the size of a
latent is kept but the inputs. sample and prev_sample are constants for the gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import checks, reference
from .arguments import flag
from .autograd import check_transforms, once_differentiable
from .backends import dispatch, triton
from .backends.triton import (
    CHUNKS_C,
    COL_A,
    COL_B,
    COL_C,
    COL_C0,
    COL_K,
    COL_SIGMA,
    LANES_C,
    PARTS_C,
    chunk_lanes,
    coefficient,
    count,
    guided,
    jit,
    load,
    pair_tree,
    position,
    quarter_lanes,
    quarter_sum,
    residual,
    score,
    store_gradient,
    store_moments,
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


def _fake_mean(velocity, uncond, scale, sample, prev_sample, table, step, with_x0):
    dtype = reference.compute_dtype(sample)
    mean = sample.new_empty(sample.shape, dtype=dtype)
    x0 = sample.new_empty(sample.shape if with_x0 else 0, dtype=dtype)
    return sample.new_empty(sample.shape[0], dtype=dtype), mean, x0


def _fake_mean_backward(grad, grad_mean, grad_x0, velocity, uncond, *rest):
    return reference.empty_gradients(velocity, uncond, rest[-1])


log_prob_mean_op = dispatch.define(
    "log_prob_mean",
    "(Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, "
    "Tensor prev_sample, Tensor table, Tensor step, bool with_x0) -> (Tensor, Tensor, Tensor)",
    reference.log_prob_mean,
    _fake_mean,
)
log_prob_mean_backward_op = dispatch.define(
    "log_prob_mean_backward",
    "(Tensor grad, Tensor? grad_mean, Tensor? grad_x0, Tensor velocity, Tensor? uncond_velocity, "
    "float guidance_scale, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "bool uncond_grad) -> (Tensor, Tensor)",
    reference.log_prob_mean_backward,
    _fake_mean_backward,
)


@jit
def log_prob_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    sums_ptr,  # [B, blocks, PARTS], or log_prob [B] if SINGLE
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    mean_ptr,  # [B, D] if MEAN
    x0_out_ptr,  # [B, D] if X0
    scale,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    SINGLE: tl.constexpr,
    MEAN: tl.constexpr,
    X0: tl.constexpr,
):
    """Writes a sum of squares, PARTS programs per block, or the row's log_prob if SINGLE."""
    parts: tl.constexpr = 1 if SINGLE else PARTS_C
    row, part, _start, base, remaining = position(parts, elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    sigma = 0.0
    if X0:
        sigma = coefficient(table_ptr, step, num_steps, COL_SIGMA)
    b_sum = tl.zeros([LANES_C], dtype=tl.float32)
    for chunk in range(CHUNKS_C if SINGLE else 1):
        # The mean is float32: four a thread, as it is stored.
        o_lane = chunk_lanes(chunk, 1, MEAN) if SINGLE else quarter_lanes(part, 1, MEAN)
        b_from = load(x_ptr + base, o_lane, remaining, ALIGN)
        b_prev = load(prev_ptr + base, o_lane, remaining, ALIGN)
        b_v = guided(v_ptr, u_ptr, base, o_lane, remaining, scale, ALIGN, GUIDED)
        b_mu = a * b_from + b * b_v
        b_d = b_prev - b_mu
        store_moments(
            mean_ptr, x0_out_ptr, base, o_lane, remaining, b_v, b_from, b_mu, sigma,
            ALIGN, MEAN, X0,
        )  # fmt: skip
        b_sum += b_d * b_d
    if SINGLE:
        total = pair_tree(b_sum, LANES_C)
        k = coefficient(table_ptr, step, num_steps, COL_K)
        c0 = coefficient(table_ptr, step, num_steps, COL_C0)
        c = coefficient(table_ptr, step, num_steps, COL_C)
        tl.store(sums_ptr + row, score(total, elements, k, c0, c))
    else:
        tl.store(sums_ptr + tl.program_id(0), quarter_sum(b_sum))


@jit
def log_prob_backward_kernel(
    grad_ptr,  # [B]
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    grad_mean_ptr,  # [B, D], or None
    grad_x0_ptr,  # [B, D], or None
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
    """Writes a chunk of the gradients; PARTS programs per block."""
    row, chunk, _start, base, remaining = position(PARTS_C, elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    k = coefficient(table_ptr, step, num_steps, COL_K)
    grad = tl.load(grad_ptr + row)
    c_d = tl.div_rn(grad * (2.0 * (k * b)), count(elements))
    sigma = 0.0
    if grad_x0_ptr is not None:
        sigma = coefficient(table_ptr, step, num_steps, COL_SIGMA)
    o_lane = chunk_lanes(chunk)
    _v, b_d = residual(
        v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, ALIGN, GUIDED
    )
    b_dv = term(c_d, b_d)
    if grad_mean_ptr is not None:
        b_dv += b * load(grad_mean_ptr + base, o_lane, remaining, ALIGN)
    if grad_x0_ptr is not None:
        b_dv -= sigma * load(grad_x0_ptr + base, o_lane, remaining, ALIGN)
    store_gradient(
        dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
        ALIGN, GUIDED, UNCOND_GRAD,
    )  # fmt: skip


@triton.launcher("log_prob")
def _launch(launch, velocity, uncond, scale, sample, prev_sample, table, step, mean=None, x0=None):
    """One launch, and a second one for rows of more than one block."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    log_prob = table.new_empty(rows)
    if rows == 0:
        return log_prob
    blocks = triton.num_blocks(elements)
    sums = log_prob if blocks == 1 else triton.partial_sums(log_prob, rows, blocks)
    sizes = (elements, table.shape[0], step.stride(0), blocks)
    with triton.on(sample.device):
        launch(
            log_prob_kernel, rows * blocks * (1 if blocks == 1 else triton.PARTS),
            (velocity, uncond, sample, prev_sample, sums, table, step, mean, x0), (scale, *sizes),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            SINGLE=blocks == 1,
            MEAN=mean is not None,
            X0=x0 is not None,
            **triton.LAUNCH,
        )  # fmt: skip
        if blocks > 1:
            launch(
                triton.finish_kernel, rows, (sums, log_prob, table, step), sizes,
                **triton.second_pass(blocks),
            )  # fmt: skip
    return log_prob


@triton.launcher("log_prob_mean")
def _launch_mean(launch, *args):
    """The same launches."""
    *args, with_x0 = args
    sample, table = args[3], args[5]
    mean = table.new_empty(sample.shape)
    x0 = table.new_empty(sample.shape if with_x0 else 0)
    return _launch(launch, *args, mean, x0 if with_x0 else None), mean, x0


@triton.launcher("log_prob_backward")
def _launch_backward(launch, grad, *args):
    """One launch."""
    return _launch_mean_backward(launch, grad, None, None, *args)


@triton.launcher("log_prob_mean_backward")
def _launch_mean_backward(
    launch, grad, grad_mean, grad_x0, velocity, uncond, scale, sample, prev_sample, table, step,
    uncond_grad,
):  # fmt: skip
    """One launch."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    dv, du = reference.empty_gradients(velocity, uncond, uncond_grad)
    if rows == 0 or elements == 0:
        return dv, du
    blocks = triton.num_blocks(elements)
    with triton.on(sample.device):
        launch(
            log_prob_backward_kernel, rows * blocks * triton.PARTS,
            (grad, velocity, uncond, sample, prev_sample, grad_mean, grad_x0, dv,
             du if uncond_grad else None, table, step),
            (scale, 1.0 - scale, elements, table.shape[0], step.stride(0), blocks),
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


class LogProbMean(torch.autograd.Function):
    """log_prob, mean and x0 (None unless asked for), differentiable in the velocities."""

    @staticmethod
    def forward(ctx, velocity, uncond, uncond_grad, with_x0, constants):
        scale, *tensors = constants
        ctx.save_for_backward(velocity, uncond, *tensors)
        ctx.scale, ctx.uncond_grad = scale, uncond_grad
        ctx.set_materialize_grads(False)
        log_prob, mean, x0 = log_prob_mean_op(velocity, uncond, scale, *tensors, with_x0)
        return log_prob, mean, x0 if with_x0 else None

    @staticmethod
    @once_differentiable("log_prob")
    def backward(ctx, grad, grad_mean, grad_x0):
        if grad is None and grad_mean is None and grad_x0 is None:
            return None, None, None, None, None
        velocity, uncond, sample, *others = ctx.saved_tensors
        if grad is None:
            grad = sample.new_zeros(sample.shape[0], dtype=reference.compute_dtype(sample))
        dv, du = log_prob_mean_backward_op(
            grad, grad_mean, grad_x0, velocity, uncond, ctx.scale, sample, *others, ctx.uncond_grad
        )
        return dv, du if ctx.uncond_grad else None, None, None, None


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
    return_mean: bool = False,
    return_x0: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Scores prev_sample: float32 [B] log-probability, differentiable once in velocity.

    Args:
        velocity, sample, prev_sample, uncond_velocity: [B, ...], one shape and device.
        transitions, step: as for sde_step.
        uncond_grad: also differentiate in uncond_velocity (by default a constant, as in flow_grpo).
        return_mean, return_x0: return (log_prob, mean[, x0]) or (log_prob, x0), from the same pass:
            the Gaussian's mean and sample - sigma v, float32 [B, ...], differentiable likewise.
    """
    checks.check_latents(
        sample, velocity=velocity, prev_sample=prev_sample, uncond_velocity=uncond_velocity
    )
    scale = checks.guidance(uncond_velocity, guidance_scale)
    checks.check_transitions(transitions, sample)
    checks.check_constants(sample=sample, prev_sample=prev_sample)
    rows = checks.resolve_step(step, transitions, sample)
    uncond, uncond_grad = checks.uncond_half(uncond_velocity, uncond_grad)
    return_mean, return_x0 = flag("return_mean", return_mean), flag("return_x0", return_x0)
    constants = (scale, sample, prev_sample, transitions.table, rows)
    check_transforms("log_prob", velocity, uncond)
    differentiable = torch.is_grad_enabled() and (velocity.requires_grad or uncond_grad)
    if return_mean or return_x0:
        score, mean, x0 = score_and_mean(
            velocity, uncond, uncond_grad, return_x0, constants, differentiable
        )
        return (score, *((mean,) if return_mean else ()), *((x0,) if return_x0 else ()))
    if differentiable:
        return _LogProb.apply(velocity, uncond, *constants, uncond_grad)
    # The op has no autograd of its own.
    return log_prob_op(velocity.detach(), uncond, *constants)


def score_and_mean(
    velocity: Tensor,
    uncond: Tensor | None,
    uncond_grad: bool,
    with_x0: bool,
    constants: tuple,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Computes (log_prob, mean, x0 or None) of checked tensors.

    constants: (guidance_scale, sample, prev_sample, table, rows of it, int64 [B]).
    """
    if differentiable:
        return LogProbMean.apply(velocity, uncond, uncond_grad, with_x0, constants)
    scale, *tensors = constants
    score, mean, x0 = log_prob_mean_op(velocity.detach(), uncond, scale, *tensors, with_x0)
    return score, mean, x0 if with_x0 else None
