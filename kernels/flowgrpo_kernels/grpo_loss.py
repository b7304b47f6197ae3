"""GRPO loss of a stored step, clipped; forward and backward straight to the velocities.

    log_prob = as in log_prob.py
    ratio    = exp(log_prob - old_log_prob)
    policy   = max(-adv ratio, -adv clamp(ratio, 1 - clip_low, 1 + clip_high))
    KL       = K B^2 mean[(v - v_ref)^2]                                with ref_velocity
    loss     = 1/B sum_rows[row_weight policy] + kl_weight 1/B sum_rows[kl_row_weight KL]

adv is the advantage clamped to +-adv_clip. Guard (GRPO-Guard), with old_velocity, the velocity of
the rollout: ratio = exp((log_prob - old_log_prob + k B^2 mean[(v - v_old)^2]) C), policy divided
by |dt|. Ties at the clip boundary follow torch.maximum and torch.clamp: the boundary itself has a
gradient.

Shapes and dtypes as in sde_step.py. K is picked where the transitions are made (kl="std_dev" or
"gaussian"), and kl_weight with it. Bytes per element: every latent given is read once forward and
once backward, and the gradients are written; nothing of the size of a latent is stored between the
two. Triton takes three launches forward (block sums, everything per row, totals over rows) and one
backward. The native backend reads every latent once in all: it computes the gradient together with
the loss, for the grad_loss of the last backward (1, or 1/4 of loss / 4), and keeps it until
backward. When grad_loss turns out to be another value, backward reads everything again.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from . import checks, reference
from .arguments import bound, finite
from .backends import dispatch, triton
from .backends.triton import (
    COL_A,
    COL_ABS_DT,
    COL_B,
    COL_BIG_K,
    COL_C,
    COL_C0,
    COL_K,
    PARTS_C,
    chunk_lanes,
    coefficient,
    constant,
    count,
    exponential,
    guided,
    jit,
    load,
    position,
    quarter_lanes,
    quarter_sum,
    residual,
    row_sum,
    score,
    store_gradient,
    store_three,
    sum_over_rows,
    term,
    tl,
)
from .loss_function import loss_function
from .reference import LossArguments
from .transitions import Transitions

# Sums of a row that the forward pass leaves: of d d, e e and h h (see reference.py).
SUM_DD, SUM_EE, SUM_HH = constant(0), constant(1), constant(2)


class GrpoLoss(NamedTuple):
    """Results of grpo_loss, on the device. Only `loss` carries a gradient."""

    loss: Tensor  # 0-dim: policy_loss + kl_weight * kl
    policy_loss: Tensor  # 0-dim: mean over rows of row_weight * policy
    kl: Tensor  # 0-dim: mean over rows of kl_row_weight * KL; 0 without ref_velocity
    log_prob: Tensor  # [B]
    ratio: Tensor  # [B]
    clip_fraction: Tensor  # 0-dim: share of rows whose ratio is outside the clip range


def _fake_forward(*args):
    sample = LossArguments(*args).sample
    dtype, rows = reference.compute_dtype(sample), sample.shape[0]
    loss, policy_loss, kl, clip_fraction = (sample.new_empty((), dtype=dtype) for _ in range(4))
    log_prob, ratio = (sample.new_empty(rows, dtype=dtype) for _ in range(2))
    coefs = sample.new_empty((rows, 3), dtype=dtype)
    return loss, policy_loss, kl, clip_fraction, log_prob, ratio, coefs


def _fake_gradient(velocity, uncond, *args):
    *args, _grad_loss, uncond_grad = args
    outputs = _fake_forward(velocity, uncond, *args)
    return *outputs, *reference.empty_gradients(velocity, uncond, uncond_grad)


def _fake_backward(
    grad_loss, coefs, velocity, uncond, scale, sample, prev_sample, table, step, ref, ref_uncond,
    old, uncond_grad,
):  # fmt: skip
    return reference.empty_gradients(velocity, uncond, uncond_grad)


_ARGUMENTS = (
    "Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, "
    "Tensor prev_sample, Tensor old_log_prob, Tensor advantages, Tensor table, Tensor step, "
    "Tensor? ref_velocity, Tensor? ref_uncond_velocity, Tensor? old_velocity, "
    "Tensor? row_weight, Tensor? kl_row_weight, float kl_weight, float clip_low, float clip_high, "
    "float adv_clip"
)
# loss, policy_loss, kl, clip_fraction, log_prob, ratio, coefs.
_RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
forward_op = dispatch.define(
    "grpo_loss_forward",
    f"({_ARGUMENTS}) -> ({_RESULTS})",
    reference.grpo_loss_forward,
    _fake_forward,
)
gradient_op = dispatch.define(
    "grpo_loss_gradient",
    f"({_ARGUMENTS}, float grad_loss, bool uncond_grad) -> ({_RESULTS}, Tensor, Tensor)",
    reference.grpo_loss_gradient,
    _fake_gradient,
)
backward_op = dispatch.define(
    "grpo_loss_backward",
    "(Tensor grad_loss, Tensor coefs, Tensor velocity, Tensor? uncond_velocity, "
    "float guidance_scale, Tensor sample, Tensor prev_sample, Tensor table, Tensor step, "
    "Tensor? ref_velocity, Tensor? ref_uncond_velocity, Tensor? old_velocity, bool uncond_grad) "
    "-> (Tensor, Tensor)",
    reference.grpo_loss_backward,
    _fake_backward,
)


@jit
def grpo_loss_sums_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    ref_ptr,  # [B, D] if REF
    ref_u_ptr,  # [B, D] if REF_GUIDED
    old_ptr,  # [B, D] if OLD
    sums_ptr,  # [3, B * blocks * PARTS]: of d d, e e, h h
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    scale,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    REF: tl.constexpr,
    REF_GUIDED: tl.constexpr,
    OLD: tl.constexpr,
):
    """Writes sums of d d, e e and h h; PARTS programs per block."""
    row, part, _start, base, remaining = position(PARTS_C, elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    o_lane = quarter_lanes(part)
    b_v, b_d = residual(
        v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, ALIGN, GUIDED
    )
    # All loads before the first sum, which waits for them.
    if REF:
        b_e = b_v - guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, ALIGN, REF_GUIDED)
    if OLD:
        b_h = b_v - load(old_ptr + base, o_lane, remaining, ALIGN)
    programs = tl.num_programs(0).to(tl.int64)
    p_sum = sums_ptr + tl.program_id(0)
    if REF:
        tl.store(p_sum + SUM_EE * programs, quarter_sum(b_e * b_e))
    if OLD:
        tl.store(p_sum + SUM_HH * programs, quarter_sum(b_h * b_h))
    tl.store(p_sum + SUM_DD * programs, quarter_sum(b_d * b_d))


@jit
def clipped_policy(ratio, adv, low, high, adv_clip):
    """(policy term, its derivative in the ratio, whether the ratio is outside the clip range)."""
    # Comparisons, not minimum and maximum: a NaN has to get through.
    adv = tl.where(adv > adv_clip, adv_clip, tl.where(adv < -adv_clip, -adv_clip, adv))
    outside = (ratio < low) | (ratio > high)
    unclipped = -adv * ratio
    clipped = -adv * tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    active = tl.where(outside & (clipped > unclipped), 0.0, 1.0)
    return tl.where(clipped > unclipped, clipped, unclipped), -adv * active, outside


@jit
def policy_term(
    advantages_ptr, weight_ptr, row, rows, ratio, c, k, abs_dt, low, high, adv_clip,
    OLD: tl.constexpr, WEIGHT: tl.constexpr,
):  # fmt: skip
    """(weighted policy term, its derivative in log_prob, whether the ratio is outside)."""
    adv = tl.load(advantages_ptr + row).to(tl.float32)
    policy, slope, outside = clipped_policy(ratio, adv, low, high, adv_clip)
    weight = tl.zeros_like(adv) + 1.0
    if WEIGHT:
        weight = tl.load(weight_ptr + row).to(tl.float32)
    g = (tl.div_rn(weight, rows.to(tl.float32)) * slope) * ratio
    if OLD:
        policy = tl.div_rn(policy, abs_dt)
        g = tl.div_rn(g * c, abs_dt)
    # abs_dt of a quiet row may be anything, and so may be what is multiplied by weight 0.
    g = tl.where(((c == 0.0) & (k == 0.0)) | (weight == 0.0), 0.0, g)
    if WEIGHT:
        policy = tl.where(weight == 0.0, 0.0, weight * policy)
    return policy, g, outside


@jit
def kl_term(weight_ptr, row, rows, mean_e, big_k, c, n, kl_weight, WEIGHT: tl.constexpr):
    """(weighted KL, coefficient c_e of its gradient); big_k is K B^2."""
    kl = tl.where(c == 0.0, 0.0, big_k * mean_e)
    weight = tl.zeros_like(mean_e) + 1.0
    if WEIGHT:
        weight = tl.load(weight_ptr + row).to(tl.float32)
        kl = tl.where(weight == 0.0, 0.0, weight * kl)
    kl_grad = tl.div_rn(weight, rows.to(tl.float32)) * kl_weight
    return kl, tl.div_rn(kl_grad * (2.0 * big_k), n)


@jit
def grpo_loss_rows_kernel(
    sums_ptr,  # [3, B * blocks * PARTS]
    old_log_prob_ptr,  # [B]
    advantages_ptr,  # [B]
    weight_ptr,  # [B] if WEIGHT
    kl_row_weight_ptr,  # [B] if KL_WEIGHT
    log_prob_ptr,  # [B]
    ratio_ptr,  # [B]
    coefs_ptr,  # [B, 3]
    terms_ptr,  # [3, B]: weighted policy, weighted KL, outside the clip range
    table_ptr,  # [R, columns]
    step_ptr,  # [B]
    kl_weight,
    low,
    high,
    adv_clip,
    elements,
    num_steps,
    step_stride,
    num_blocks,
    WIDTH: tl.constexpr,
    REF: tl.constexpr,
    OLD: tl.constexpr,
    WEIGHT: tl.constexpr,
    KL_WEIGHT: tl.constexpr,
):
    """Computes all that happens once per row; one program per row."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    step = tl.load(step_ptr + row * step_stride)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    c = coefficient(table_ptr, step, num_steps, COL_C)
    k = coefficient(table_ptr, step, num_steps, COL_K)
    c0 = coefficient(table_ptr, step, num_steps, COL_C0)
    n = count(elements)

    log_prob = score(row_sum(sums_ptr, SUM_DD, num_blocks, WIDTH), elements, k, c0, c)
    delta = log_prob - tl.load(old_log_prob_ptr + row).to(tl.float32)
    if OLD:
        mean_h = tl.div_rn(row_sum(sums_ptr, SUM_HH, num_blocks, WIDTH), n)
        delta = (delta + (k * (b * b)) * mean_h) * c
    ratio = exponential(delta)

    abs_dt = coefficient(table_ptr, step, num_steps, COL_ABS_DT)
    policy, g, outside = policy_term(
        advantages_ptr, weight_ptr, row, rows, ratio, c, k, abs_dt, low, high, adv_clip, OLD, WEIGHT
    )
    c_d = tl.div_rn(g * (2.0 * (k * b)), n)
    kl, c_e, c_h = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
    if OLD:
        c_h = tl.div_rn(g * (2.0 * (k * (b * b))), n)
    if REF:
        big_k = coefficient(table_ptr, step, num_steps, COL_BIG_K) * (b * b)
        mean_e = tl.div_rn(row_sum(sums_ptr, SUM_EE, num_blocks, WIDTH), n)
        kl, c_e = kl_term(kl_row_weight_ptr, row, rows, mean_e, big_k, c, n, kl_weight, KL_WEIGHT)

    tl.store(log_prob_ptr + row, log_prob)
    tl.store(ratio_ptr + row, ratio)
    store_three(coefs_ptr + 3 * row, 1, c_d, c_e, c_h)
    store_three(terms_ptr + row, rows, policy, kl, tl.where(outside, 1.0, 0.0))


@jit
def grpo_loss_totals_kernel(
    terms_ptr,  # [3, B]
    loss_ptr,
    policy_ptr,
    kl_ptr,
    fraction_ptr,
    kl_weight,
    rows,
    REF: tl.constexpr,
):
    """Sums over rows in their fixed order; one program."""
    b = tl.cast(rows, tl.float32)
    policy = tl.div_rn(sum_over_rows(terms_ptr, rows), b)
    kl = tl.div_rn(sum_over_rows(terms_ptr + rows, rows), b)
    fraction = tl.div_rn(sum_over_rows(terms_ptr + 2 * rows, rows), b)
    loss = policy
    if REF:
        loss = policy + kl_weight * kl
    tl.store(loss_ptr, loss)
    tl.store(policy_ptr, policy)
    tl.store(kl_ptr, kl)
    tl.store(fraction_ptr, fraction)


@jit
def grpo_loss_backward_kernel(
    grad_ptr,  # 0-dim
    coefs_ptr,  # [B, 3]
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    ref_ptr,  # [B, D] if REF
    ref_u_ptr,  # [B, D] if REF_GUIDED
    old_ptr,  # [B, D] if OLD
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
    REF: tl.constexpr,
    REF_GUIDED: tl.constexpr,
    OLD: tl.constexpr,
    UNCOND_GRAD: tl.constexpr,
):
    """Writes a chunk of the gradients; PARTS programs per block."""
    row, chunk, _start, base, remaining = position(PARTS_C, elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, COL_A)
    b = coefficient(table_ptr, step, num_steps, COL_B)
    grad = tl.load(grad_ptr).to(tl.float32)
    c_d = grad * tl.load(coefs_ptr + 3 * row)
    c_e = grad * tl.load(coefs_ptr + 3 * row + 1)
    c_h = grad * tl.load(coefs_ptr + 3 * row + 2)
    o_lane = chunk_lanes(chunk)
    b_v, b_d = residual(
        v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, ALIGN, GUIDED
    )
    b_dv = term(c_d, b_d)
    if REF:
        b_ref = guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, ALIGN, REF_GUIDED)
        b_dv += term(c_e, b_v - b_ref)
    if OLD:
        b_dv += term(c_h, b_v - load(old_ptr + base, o_lane, remaining, ALIGN))
    store_gradient(
        dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
        ALIGN, GUIDED, UNCOND_GRAD,
    )  # fmt: skip


@triton.launcher("grpo_loss_forward")
def _launch_forward(
    launch, velocity, uncond, scale, sample, prev_sample, old_log_prob, advantages, table, step,
    ref, ref_uncond, old, row_weight, kl_row_weight, kl_weight, clip_low, clip_high, adv_clip,
):  # fmt: skip
    """Three launches: block sums, rows, totals."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    # From the table, which is float32: half the host time of torch.empty with a dtype and device.
    new = table.new_empty
    loss, policy, kl, fraction = (new(()) for _ in range(4))
    log_prob, ratio, coefs = new(rows), new(rows), new((rows, 3))
    results = (loss, policy, kl, fraction, log_prob, ratio, coefs)
    if rows == 0:
        for total in (loss, policy, kl, fraction):
            total.zero_()
        return results
    blocks = triton.num_blocks(elements)
    sums, terms = triton.partial_sums(table, 3 * rows, blocks), new((3, rows))
    sizes = (elements, table.shape[0], step.stride(0), blocks)
    flags = {"REF": ref is not None, "OLD": old is not None}
    with triton.on(sample.device):
        launch(
            grpo_loss_sums_kernel, rows * blocks * triton.PARTS,
            (velocity, uncond, sample, prev_sample, ref, ref_uncond, old, sums, table, step),
            (scale, *sizes),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            REF_GUIDED=ref_uncond is not None,
            **flags,
            **triton.LAUNCH,
        )  # fmt: skip
        launch(
            grpo_loss_rows_kernel, rows,
            (sums, old_log_prob, advantages, row_weight, kl_row_weight, log_prob, ratio, coefs,
             terms, table, step),
            (kl_weight, 1.0 - clip_low, 1.0 + clip_high, adv_clip, *sizes),
            WEIGHT=row_weight is not None,
            KL_WEIGHT=kl_row_weight is not None,
            **flags,
            **triton.second_pass(blocks),
        )  # fmt: skip
        launch(
            grpo_loss_totals_kernel, 1, (terms, loss, policy, kl, fraction), (kl_weight, rows),
            REF=ref is not None, **triton.ONE_WARP,
        )  # fmt: skip
    return results


@triton.launcher("grpo_loss_backward")
def _launch_backward(
    launch, grad_loss, coefs, velocity, uncond, scale, sample, prev_sample, table, step, ref,
    ref_uncond, old, uncond_grad,
):  # fmt: skip
    """One launch."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    dv, du = reference.empty_gradients(velocity, uncond, uncond_grad)
    if rows == 0 or elements == 0:
        return dv, du
    blocks = triton.num_blocks(elements)
    with triton.on(sample.device):
        launch(
            grpo_loss_backward_kernel, rows * blocks * triton.PARTS,
            (grad_loss, coefs, velocity, uncond, sample, prev_sample, ref, ref_uncond, old, dv,
             du if uncond_grad else None, table, step),
            (scale, 1.0 - scale, elements, table.shape[0], step.stride(0), blocks),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            REF=ref is not None,
            REF_GUIDED=ref_uncond is not None,
            OLD=old is not None,
            UNCOND_GRAD=uncond_grad,
            **triton.LAUNCH,
        )  # fmt: skip
    return dv, du


@triton.launcher("grpo_loss_gradient")
def _launch_gradient(launch, *args):
    """Runs the two in turn, four launches: a GPU gains nothing by knowing grad_loss before."""
    passes = (functools.partial(run, launch) for run in (_launch_forward, _launch_backward))
    return reference.in_turn(LossArguments, *passes, args)


LossFunction = loss_function("grpo_loss", LossArguments, forward_op, gradient_op, backward_op)


def grpo_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    transitions: Transitions,
    step: int | Tensor,
    *,
    ref_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip: float = 5.0,
    row_weight: Tensor | None = None,
    kl_row_weight: Tensor | None = None,
    old_velocity: Tensor | None = None,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_uncond_velocity: Tensor | None = None,
    uncond_grad: bool = False,
) -> GrpoLoss:
    """Computes the loss of one batch of stored steps, differentiable once in velocity.

    Args:
        velocity, sample, prev_sample: [B, ...], one shape and device, any mix of float dtypes.
        old_log_prob, advantages: [B] float.
        transitions, step: as for sde_step; rows may be at different steps.
        ref_velocity: the reference model's velocity. Under guidance it is combined already, unless
            ref_uncond_velocity is given too: then both are combined here with guidance_scale.
        kl_weight: beta. The value is tied to the convention of K (see transitions.py).
        clip_range: one number, or (clip_low, clip_high).
        adv_clip: the bound on |advantage|; float("inf") for none.
        row_weight: [B], weight of each row's policy term; sums are divided by B, not by the
            weights.
        kl_row_weight: [B], weight of each row's KL term; row_weight when None. To reweight the
            policy term alone, pass ones, or the rows' keep mask.
        old_velocity: the rollout's (combined) velocity; switches Guard on. Only for SDE and ODE
            rows.
        uncond_velocity, guidance_scale, uncond_grad: as for log_prob.

    A row of weight 0 adds 0 to the loss even where its advantage is NaN. An ODE row has ratio
    exp(-old_log_prob) and KL 0. Neither has a gradient, whatever its latents hold.
    """
    low, high = _clip_bounds(clip_range)
    latents = {
        "velocity": velocity,
        "prev_sample": prev_sample,
        "uncond_velocity": uncond_velocity,
        "ref_velocity": ref_velocity,
        "ref_uncond_velocity": ref_uncond_velocity,
        "old_velocity": old_velocity,
    }
    per_row = {
        "old_log_prob": old_log_prob,
        "advantages": advantages,
        "row_weight": row_weight,
        "kl_row_weight": kl_row_weight,
    }
    scale = checks.guidance(uncond_velocity, guidance_scale)
    kl_weight, adv_clip = finite("kl_weight", kl_weight), bound("adv_clip", adv_clip)
    _check(sample, latents, per_row, transitions, kl_weight, adv_clip)
    rows = checks.resolve_step(step, transitions, sample)
    uncond, uncond_grad = checks.uncond_half(uncond_velocity, uncond_grad)
    constants = (
        scale, sample, prev_sample, old_log_prob, advantages,
        transitions.table, rows, ref_velocity, ref_uncond_velocity, old_velocity,
        row_weight, row_weight if kl_row_weight is None else kl_row_weight,
        kl_weight, low, high, adv_clip,
    )  # fmt: skip
    results = LossFunction.evaluate(velocity, uncond, uncond_grad, *constants)
    loss, policy_loss, kl, clip_fraction, lp, ratio = results
    return GrpoLoss(loss, policy_loss, kl, lp, ratio, clip_fraction)


def _clip_bounds(clip_range: float | tuple[float, float]) -> tuple[float, float]:
    """Checks the clip range and returns (clip_low, clip_high)."""
    if isinstance(clip_range, (tuple, list)):
        if len(clip_range) != 2:
            raise ValueError(f"clip_range must be a number or (low, high), got {clip_range!r}")
        low, high = clip_range
    else:
        low = high = clip_range
    low, high = bound("clip_range", low), bound("clip_range", high)
    if not (0.0 <= low <= 1.0 and high >= 0.0):
        raise ValueError(f"clip_range must be low in [0, 1] and high >= 0, got {clip_range!r}")
    return low, high


def _check(
    sample: Tensor,
    latents: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    transitions: Transitions,
    kl_weight: float,
    adv_clip: float,
) -> None:
    """Checks all arguments but step and clip_range."""
    checks.check_latents(sample, **latents)
    checks.check_transitions(transitions, sample)
    for name, value in per_row.items():
        if value is not None or name in ("old_log_prob", "advantages"):
            checks.check_rows(name, value, sample)
    halves = ("velocity", "uncond_velocity")
    constants = {name: value for name, value in latents.items() if name not in halves}
    checks.check_constants(sample=sample, **constants, **per_row)
    if not kl_weight >= 0.0:
        raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
    if not adv_clip > 0:
        raise ValueError(f"adv_clip must be > 0, got {adv_clip}")
    if kl_weight > 0.0 and latents["ref_velocity"] is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_velocity")
    if latents["ref_uncond_velocity"] is not None and (
        latents["ref_velocity"] is None or latents["uncond_velocity"] is None
    ):
        raise ValueError("ref_uncond_velocity needs ref_velocity and uncond_velocity")
    for kind in ("cps", "matching"):
        if latents["old_velocity"] is not None and kind in transitions.kinds:
            raise ValueError(
                f"old_velocity (Guard) needs k = 1 / 2C^2, but transitions has {kind} rows"
            )
