"""Triton kernels of grpo_loss: formula in grpo_loss.py, arithmetic in reference.py.

Forward, three launches: block sums of d d, e e, h h; everything per row; the totals over rows.
Backward, one launch, from the coefs [B, 3] that the forward pass left. A micro-step is four
launches. In a file of their own because grpo_loss.py with them would be too long to read in one
go.
"""

from __future__ import annotations

import torch

from . import _triton
from ._triton import (
    CHUNKS_C,
    LANES_C,
    coefficient,
    count,
    guided,
    jit,
    load,
    ordered_sum,
    pair_tree,
    position,
    residual,
    score,
    store_gradient,
    sum_over_rows,
    term,
    tl,
)


@jit
def _sums_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    prev_ptr,  # [B, D]
    ref_ptr,  # [B, D] if REF
    ref_u_ptr,  # [B, D] if REF_GUIDED
    old_ptr,  # [B, D] if OLD
    sums_ptr,  # [3, B * blocks]: of d d, e e, h h
    table_ptr,  # [R, COLUMNS]
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
    row, _start, base, remaining = position(elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, 0)
    b = coefficient(table_ptr, step, num_steps, 1)
    b_dd = tl.zeros([LANES_C], dtype=tl.float32)
    b_ee = tl.zeros([LANES_C], dtype=tl.float32)
    b_hh = tl.zeros([LANES_C], dtype=tl.float32)
    for chunk in range(CHUNKS_C):
        o_lane = chunk * LANES_C + tl.arange(0, LANES_C)
        b_v, b_d = residual(
            v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, GUIDED
        )
        b_dd += b_d * b_d
        if REF:
            b_e = b_v - guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, REF_GUIDED)
            b_ee += b_e * b_e
        if OLD:
            b_h = b_v - load(old_ptr + base, o_lane, remaining)
            b_hh += b_h * b_h
    programs = tl.num_programs(0).to(tl.int64)
    p_sum = sums_ptr + tl.program_id(0)
    tl.store(p_sum, pair_tree(b_dd, LANES_C))
    if REF:
        tl.store(p_sum + programs, pair_tree(b_ee, LANES_C))
    if OLD:
        tl.store(p_sum + 2 * programs, pair_tree(b_hh, LANES_C))


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
def row_sum(sums_ptr, index, num_blocks, WIDTH: tl.constexpr):
    """This program's row of sums [3, B * blocks], added up. index 0: d d, 1: e e, 2: h h."""
    at = index * tl.num_programs(0).to(tl.int64) + tl.program_id(0)
    return ordered_sum(sums_ptr + at * num_blocks, num_blocks, WIDTH)


@jit
def policy_term(
    advantages_ptr, weight_ptr, row, rows, ratio, c, abs_dt, low, high, adv_clip,
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
    g = tl.where((c == 0.0) | (weight == 0.0), 0.0, g)
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
def store_three(ptr, stride, x, y, z):
    tl.store(ptr, x)
    tl.store(ptr + stride, y)
    tl.store(ptr + 2 * stride, z)


@jit
def _rows_kernel(
    sums_ptr,  # [3, B * blocks]
    old_log_prob_ptr,  # [B]
    advantages_ptr,  # [B]
    weight_ptr,  # [B] if WEIGHT
    kl_row_weight_ptr,  # [B] if KL_WEIGHT
    log_prob_ptr,  # [B]
    ratio_ptr,  # [B]
    coefs_ptr,  # [B, 3]
    terms_ptr,  # [3, B]: weighted policy, weighted KL, outside the clip range
    table_ptr,  # [R, COLUMNS]
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
    """Everything that happens once a row; one program a row."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    step = tl.load(step_ptr + row * step_stride)
    b = coefficient(table_ptr, step, num_steps, 1)
    c = coefficient(table_ptr, step, num_steps, 2)
    k = coefficient(table_ptr, step, num_steps, 3)
    c0 = coefficient(table_ptr, step, num_steps, 4)
    n = count(elements)

    log_prob = score(row_sum(sums_ptr, 0, num_blocks, WIDTH), elements, k, c0, c)
    delta = log_prob - tl.load(old_log_prob_ptr + row).to(tl.float32)
    if OLD:
        mean_h = tl.div_rn(row_sum(sums_ptr, 2, num_blocks, WIDTH), n)
        delta = (delta + (k * (b * b)) * mean_h) * c
    ratio = tl.exp(delta)

    abs_dt = coefficient(table_ptr, step, num_steps, 6)
    policy, g, outside = policy_term(
        advantages_ptr, weight_ptr, row, rows, ratio, c, abs_dt, low, high, adv_clip, OLD, WEIGHT
    )
    c_d = tl.div_rn(g * (2.0 * (k * b)), n)
    kl, c_e, c_h = tl.zeros_like(g), tl.zeros_like(g), tl.zeros_like(g)
    if OLD:
        c_h = tl.div_rn(g * (2.0 * (k * (b * b))), n)
    if REF:
        big_k = coefficient(table_ptr, step, num_steps, 5) * (b * b)
        mean_e = tl.div_rn(row_sum(sums_ptr, 1, num_blocks, WIDTH), n)
        kl, c_e = kl_term(kl_row_weight_ptr, row, rows, mean_e, big_k, c, n, kl_weight, KL_WEIGHT)

    tl.store(log_prob_ptr + row, log_prob)
    tl.store(ratio_ptr + row, ratio)
    store_three(coefs_ptr + 3 * row, 1, c_d, c_e, c_h)
    store_three(terms_ptr + row, rows, policy, kl, tl.where(outside, 1.0, 0.0))


@jit
def _totals_kernel(
    terms_ptr,  # [3, B]
    loss_ptr,
    policy_ptr,
    kl_ptr,
    fraction_ptr,
    kl_weight,
    rows,
    REF: tl.constexpr,
):
    """The sums over rows in their fixed order; one program."""
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
def _backward_kernel(
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
    table_ptr,  # [R, COLUMNS]
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
    row, _start, base, remaining = position(elements, num_blocks, ALIGN)
    step = tl.load(step_ptr + row * step_stride)
    a = coefficient(table_ptr, step, num_steps, 0)
    b = coefficient(table_ptr, step, num_steps, 1)
    grad = tl.load(grad_ptr).to(tl.float32)
    c_d = grad * tl.load(coefs_ptr + 3 * row)
    c_e = grad * tl.load(coefs_ptr + 3 * row + 1)
    c_h = grad * tl.load(coefs_ptr + 3 * row + 2)
    for chunk in range(CHUNKS_C):
        o_lane = chunk * LANES_C + tl.arange(0, LANES_C)
        b_v, b_d = residual(
            v_ptr, u_ptr, x_ptr, prev_ptr, base, o_lane, remaining, scale, a, b, GUIDED
        )
        b_dv = term(c_d, b_d)
        if REF:
            b_ref = guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, REF_GUIDED)
            b_dv += term(c_e, b_v - b_ref)
        if OLD:
            b_dv += term(c_h, b_v - load(old_ptr + base, o_lane, remaining))
        store_gradient(
            dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
            GUIDED, UNCOND_GRAD,
        )  # fmt: skip


@_triton.launcher("grpo_loss_forward")
def _launch_forward(
    velocity, uncond, scale, sample, prev_sample, old_log_prob, advantages, table, step, ref,
    ref_uncond, old, row_weight, kl_row_weight, kl_weight, clip_low, clip_high, adv_clip,
):  # fmt: skip
    """Three launches: block sums, rows, totals."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    # From the table, which is float32: half the host time of torch.empty with a dtype and device.
    new = table.new_empty
    loss, policy, kl, fraction = (new(()) for _ in range(4))
    log_prob, ratio, coefs = new(rows), new(rows), new((rows, 3))
    results = (loss, policy, kl, fraction, log_prob, ratio, coefs)
    if rows == 0:
        for value in results[:4]:
            value.zero_()
        return results
    blocks = _triton.num_blocks(elements)
    sums, terms = new((3, rows * blocks)), new((3, rows))
    sizes = (elements, table.shape[0], step.stride(0), blocks)
    flags = {"REF": ref is not None, "OLD": old is not None}
    with _triton.on(sample.device):
        _sums_kernel[(rows * blocks,)](
            velocity, uncond, sample, prev_sample, ref, ref_uncond, old, sums, table, step, scale,
            *sizes,
            ALIGN=_triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            REF_GUIDED=ref_uncond is not None,
            **flags,
            **_triton.LAUNCH,
        )  # fmt: skip
        _rows_kernel[(rows,)](
            sums, old_log_prob, advantages, row_weight, kl_row_weight, log_prob, ratio, coefs,
            terms, table, step, kl_weight, 1.0 - clip_low, 1.0 + clip_high, adv_clip, *sizes,
            WEIGHT=row_weight is not None,
            KL_WEIGHT=kl_row_weight is not None,
            **flags,
            **_triton.second_pass(blocks),
        )  # fmt: skip
        _totals_kernel[(1,)](
            terms, loss, policy, kl, fraction, kl_weight, rows,
            REF=ref is not None, **_triton.ONE_WARP,
        )  # fmt: skip
    return results


@_triton.launcher("grpo_loss_backward")
def _launch_backward(
    grad_loss, coefs, velocity, uncond, scale, sample, prev_sample, table, step, ref, ref_uncond,
    old, uncond_grad,
):  # fmt: skip
    """One launch."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    dv, du = _triton.gradients(velocity, uncond, uncond_grad)
    if rows == 0 or elements == 0:
        return dv, du
    blocks = _triton.num_blocks(elements)
    with _triton.on(sample.device):
        _backward_kernel[(rows * blocks,)](
            grad_loss, coefs, velocity, uncond, sample, prev_sample, ref, ref_uncond, old, dv,
            du if uncond_grad else None, table, step, scale, 1.0 - scale, elements,
            table.shape[0], step.stride(0), blocks,
            ALIGN=_triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            REF=ref is not None,
            REF_GUIDED=ref_uncond is not None,
            OLD=old is not None,
            UNCOND_GRAD=uncond_grad,
            **_triton.LAUNCH,
        )  # fmt: skip
    return dv, du


@_triton.launcher("grpo_loss_gradient")
def _launch_gradient(*args):
    """The two in turn, four launches: on a GPU nothing is gained by knowing grad_loss before."""
    *args, grad_loss, uncond_grad = args
    outputs = _launch_forward(*args)
    grad = torch.full_like(outputs[0], grad_loss)
    latents = (*args[:5], *args[7:12])
    return *outputs, *_launch_backward(grad, outputs[6], *latents, uncond_grad)
