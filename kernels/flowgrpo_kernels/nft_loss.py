"""Loss of DiffusionNFT (arXiv 2509.16117); forward and backward straight to the velocities.

    v+, v-    = v_old + beta (v - v_old), v_old - beta (v - v_old)    v under guidance as elsewhere
    x0+, x0-  = x_t - sigma v+, x_t - sigma v-
    error+-   = mean[(x0+- - x0)^2] / max(mean|x0+- - x0|, floor)     the divisor has no gradient
    loss      = 1/B sum_rows[row_weight (r error+ + (1 - r) error-)]
                + kl_weight 1/B sum_rows[kl_row_weight mean[(v - v_ref)^2]]     with ref_velocity

x_t = (1 - sigma) x0 + sigma eps is a result x0 of the rollout, noised again: there is no step of a
sampler, no log-probability and no ratio. r in [0, 1] is the optimality of the row, from its
advantage; v_old is the velocity of the old policy, v the one that is trained. v+ and v- are the
paper's implicit positive and negative policies, and the divisor is its self-normalised x0
regression.

Shapes and dtypes as in sde_step.py. error is a quotient of two sums of the row, so one pass over
the latents gives the loss, and a second one the gradient

    dv = c_p (x0+ - x0) + c_q (x0- - x0) + c_e (v - v_ref)

from three numbers a row. Bytes per element: every latent given (velocity, sample, x0, old_velocity)
is read once forward and once backward, and the gradient is written; nothing of the size of a latent
is stored between the two. Triton takes three launches forward (block sums, everything per row,
totals over rows) and one backward. The native backend reads every latent once in all, as grpo_loss
does.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from . import checks, reference
from .arguments import check_tensor, finite, positive
from .backends import dispatch, triton
from .backends.triton import (
    PARTS_C,
    chunk_lanes,
    constant,
    count,
    guided,
    jit,
    load,
    position,
    quarter_lanes,
    quarter_sum,
    row_sum,
    store_gradient,
    store_three,
    sum_over_rows,
    term,
    tl,
)
from .loss_function import loss_function
from .reference import NftArguments

# Sums of a row that the forward pass leaves: of |p|, p p, |q|, q q, h h and e e (see reference.py).
SUM_ABS_P, SUM_P, SUM_ABS_Q, SUM_Q, SUM_H, SUM_E = (constant(i) for i in range(6))


class NftLoss(NamedTuple):
    """Results of nft_loss, on the device. Only `loss` carries a gradient."""

    loss: Tensor  # 0-dim: positive_loss + negative_loss + kl_weight * kl
    positive_loss: Tensor  # 0-dim: mean over rows of row_weight * r * error+
    negative_loss: Tensor  # 0-dim: mean over rows of row_weight * (1 - r) * error-
    kl: Tensor  # 0-dim: mean over rows of kl_row_weight * mean[(v - v_ref)^2]; 0 without ref
    positive_error: Tensor  # [B]: error+
    negative_error: Tensor  # [B]: error-
    old_deviation: Tensor  # [B]: mean[(v - v_old)^2], how far the policy has moved


def _fake_forward(*args):
    sample = NftArguments(*args).sample
    dtype, rows = reference.compute_dtype(sample), sample.shape[0]
    totals = (sample.new_empty((), dtype=dtype) for _ in range(4))
    per_row = (sample.new_empty(rows, dtype=dtype) for _ in range(3))
    return *totals, *per_row, sample.new_empty((rows, 3), dtype=dtype)


def _fake_gradient(velocity, uncond, *args):
    *args, _grad_loss, uncond_grad = args
    outputs = _fake_forward(velocity, uncond, *args)
    return *outputs, *reference.empty_gradients(velocity, uncond, uncond_grad)


def _fake_backward(
    grad_loss, coefs, velocity, uncond, scale, sample, x0, old, sigma, ref, ref_uncond, beta,
    uncond_grad,
):  # fmt: skip
    return reference.empty_gradients(velocity, uncond, uncond_grad)


_ARGUMENTS = (
    "Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample, Tensor x0, "
    "Tensor old_velocity, Tensor sigma, Tensor optimality, Tensor? ref_velocity, "
    "Tensor? ref_uncond_velocity, Tensor? row_weight, Tensor? kl_row_weight, float beta, "
    "float floor, float kl_weight"
)
# loss, positive_loss, negative_loss, kl, positive_error, negative_error, old_deviation, coefs.
_RESULTS = "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"
forward_op = dispatch.define(
    "nft_loss_forward",
    f"({_ARGUMENTS}) -> ({_RESULTS})",
    reference.nft_loss_forward,
    _fake_forward,
)
gradient_op = dispatch.define(
    "nft_loss_gradient",
    f"({_ARGUMENTS}, float grad_loss, bool uncond_grad) -> ({_RESULTS}, Tensor, Tensor)",
    reference.nft_loss_gradient,
    _fake_gradient,
)
backward_op = dispatch.define(
    "nft_loss_backward",
    "(Tensor grad_loss, Tensor coefs, Tensor velocity, Tensor? uncond_velocity, "
    "float guidance_scale, Tensor sample, Tensor x0, Tensor old_velocity, Tensor sigma, "
    "Tensor? ref_velocity, Tensor? ref_uncond_velocity, float beta, bool uncond_grad) "
    "-> (Tensor, Tensor)",
    reference.nft_loss_backward,
    _fake_backward,
)


@jit
def unit(ptr, row):
    """Loads a row's number as float32; NaN outside [0, 1]."""
    x = tl.load(ptr + row).to(tl.float32)
    return tl.where((x >= 0.0) & (x <= 1.0), x, float("nan"))


@jit
def errors(
    x_ptr, x0_ptr, base, o_lane, remaining, b_old, b_h, sigma, sigma_beta, ALIGN: tl.constexpr
):
    """Loads one chunk of x_t and x0 and returns (p, q): x0+ - x0 and x0- - x0. b_h: v - v_old."""
    # First, so that b_h need not be kept: the kernel of the sums has no register left.
    b_t = sigma_beta * b_h
    b_d = load(x_ptr + base, o_lane, remaining, ALIGN) - sigma * b_old
    b_d = b_d - load(x0_ptr + base, o_lane, remaining, ALIGN)
    return b_d - b_t, b_d + b_t


@jit
def nft_loss_sums_kernel(
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    x0_ptr,  # [B, D]
    old_ptr,  # [B, D]
    ref_ptr,  # [B, D] if REF
    ref_u_ptr,  # [B, D] if REF_GUIDED
    sigma_ptr,  # [B]
    sums_ptr,  # [6, B * blocks * PARTS]: of |p|, p p, |q|, q q, h h, e e
    scale,
    beta,
    elements,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    REF: tl.constexpr,
    REF_GUIDED: tl.constexpr,
):
    """Writes six sums; PARTS programs per block."""
    row, part, _start, base, remaining = position(PARTS_C, elements, num_blocks, ALIGN)
    sigma = unit(sigma_ptr, row)
    sigma_beta = sigma * beta
    o_lane = quarter_lanes(part)
    b_v = guided(v_ptr, u_ptr, base, o_lane, remaining, scale, ALIGN, GUIDED)
    # All loads before the first sum, which waits for them.
    if REF:
        b_e = b_v - guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, ALIGN, REF_GUIDED)
    b_old = load(old_ptr + base, o_lane, remaining, ALIGN)
    b_h = b_v - b_old
    b_p, b_q = errors(x_ptr, x0_ptr, base, o_lane, remaining, b_old, b_h, sigma, sigma_beta, ALIGN)
    programs = tl.num_programs(0).to(tl.int64)
    p_sum = sums_ptr + tl.program_id(0)
    if REF:
        tl.store(p_sum + SUM_E * programs, quarter_sum(b_e * b_e))
    tl.store(p_sum + SUM_H * programs, quarter_sum(b_h * b_h))
    # A masked lane has p = q = 0 unless sigma is NaN, and then the row is.
    tl.store(p_sum + SUM_ABS_P * programs, quarter_sum(tl.abs(b_p)))
    tl.store(p_sum + SUM_P * programs, quarter_sum(b_p * b_p))
    tl.store(p_sum + SUM_ABS_Q * programs, quarter_sum(tl.abs(b_q)))
    tl.store(p_sum + SUM_Q * programs, quarter_sum(b_q * b_q))


@jit
def side(
    sums_ptr, num_blocks, n, floor, SUM_ABS: tl.constexpr, SUM: tl.constexpr, WIDTH: tl.constexpr
):
    """(normaliser, error) of this program's row: of x0+ or of x0-."""
    normaliser = tl.div_rn(row_sum(sums_ptr, SUM_ABS, num_blocks, WIDTH), n)
    # A comparison, not a maximum: a NaN has to get through.
    normaliser = tl.where(normaliser < floor, floor, normaliser)
    mean = tl.div_rn(row_sum(sums_ptr, SUM, num_blocks, WIDTH), n)
    return normaliser, tl.div_rn(mean, normaliser)


@jit
def nft_loss_rows_kernel(
    sums_ptr,  # [6, B * blocks]
    sigma_ptr,  # [B]
    optimality_ptr,  # [B]
    weight_ptr,  # [B] if WEIGHT
    kl_row_weight_ptr,  # [B] if KL_WEIGHT
    positive_error_ptr,  # [B]
    negative_error_ptr,  # [B]
    deviation_ptr,  # [B]
    coefs_ptr,  # [B, 3]
    terms_ptr,  # [3, B]: weighted positive and negative terms, weighted KL
    beta,
    floor,
    kl_weight,
    elements,
    num_blocks,
    WIDTH: tl.constexpr,
    REF: tl.constexpr,
    WEIGHT: tl.constexpr,
    KL_WEIGHT: tl.constexpr,
):
    """Computes all that happens once per row; one program per row."""
    row = tl.program_id(0)
    rows = tl.num_programs(0)
    n, b = count(elements), rows.to(tl.float32)
    r = unit(optimality_ptr, row)
    slope = 2.0 * (unit(sigma_ptr, row) * beta)
    scale_p, error_p = side(sums_ptr, num_blocks, n, floor, SUM_ABS_P, SUM_P, WIDTH)
    scale_q, error_q = side(sums_ptr, num_blocks, n, floor, SUM_ABS_Q, SUM_Q, WIDTH)

    positive_term = r * error_p
    negative_term = (1.0 - r) * error_q
    weight = tl.zeros_like(r) + 1.0
    if WEIGHT:
        weight = tl.load(weight_ptr + row).to(tl.float32)
        positive_term = tl.where(weight == 0.0, 0.0, weight * positive_term)
        negative_term = tl.where(weight == 0.0, 0.0, weight * negative_term)
    share = tl.div_rn(weight, b)
    c_p = -tl.div_rn(tl.div_rn((share * r) * slope, scale_p), n)
    c_q = tl.div_rn(tl.div_rn((share * (1.0 - r)) * slope, scale_q), n)
    c_p = tl.where(weight == 0.0, 0.0, c_p)
    c_q = tl.where(weight == 0.0, 0.0, c_q)
    kl, c_e = tl.zeros_like(r), tl.zeros_like(r)
    if REF:
        kl = tl.div_rn(row_sum(sums_ptr, SUM_E, num_blocks, WIDTH), n)
        kl_row_weight = tl.zeros_like(r) + 1.0
        if KL_WEIGHT:
            kl_row_weight = tl.load(kl_row_weight_ptr + row).to(tl.float32)
            kl = tl.where(kl_row_weight == 0.0, 0.0, kl_row_weight * kl)
        c_e = tl.div_rn((tl.div_rn(kl_row_weight, b) * kl_weight) * 2.0, n)

    tl.store(positive_error_ptr + row, error_p)
    tl.store(negative_error_ptr + row, error_q)
    tl.store(deviation_ptr + row, tl.div_rn(row_sum(sums_ptr, SUM_H, num_blocks, WIDTH), n))
    store_three(coefs_ptr + 3 * row, 1, c_p, c_q, c_e)
    store_three(terms_ptr + row, rows, positive_term, negative_term, kl)


@jit
def nft_loss_totals_kernel(
    terms_ptr,  # [3, B]
    loss_ptr,
    positive_ptr,
    negative_ptr,
    kl_ptr,
    kl_weight,
    rows,
    REF: tl.constexpr,
):
    """Sums over rows in their fixed order; one program."""
    b = tl.cast(rows, tl.float32)
    positive_loss = tl.div_rn(sum_over_rows(terms_ptr, rows), b)
    negative_loss = tl.div_rn(sum_over_rows(terms_ptr + rows, rows), b)
    kl = tl.div_rn(sum_over_rows(terms_ptr + 2 * rows, rows), b)
    loss = positive_loss + negative_loss
    if REF:
        loss = loss + kl_weight * kl
    tl.store(loss_ptr, loss)
    tl.store(positive_ptr, positive_loss)
    tl.store(negative_ptr, negative_loss)
    tl.store(kl_ptr, kl)


@jit
def nft_loss_backward_kernel(
    grad_ptr,  # 0-dim
    coefs_ptr,  # [B, 3]
    v_ptr,  # [B, D]
    u_ptr,  # [B, D] if GUIDED
    x_ptr,  # [B, D]
    x0_ptr,  # [B, D]
    old_ptr,  # [B, D]
    ref_ptr,  # [B, D] if REF
    ref_u_ptr,  # [B, D] if REF_GUIDED
    sigma_ptr,  # [B]
    dv_ptr,  # [B, D]
    du_ptr,  # [B, D] if UNCOND_GRAD
    scale,
    uncond_scale,
    beta,
    elements,
    num_blocks,
    ALIGN: tl.constexpr,
    GUIDED: tl.constexpr,
    REF: tl.constexpr,
    REF_GUIDED: tl.constexpr,
    UNCOND_GRAD: tl.constexpr,
):
    """Writes a chunk of the gradients; PARTS programs per block."""
    row, chunk, _start, base, remaining = position(PARTS_C, elements, num_blocks, ALIGN)
    sigma = unit(sigma_ptr, row)
    sigma_beta = sigma * beta
    grad = tl.load(grad_ptr).to(tl.float32)
    c_p = grad * tl.load(coefs_ptr + 3 * row)
    c_q = grad * tl.load(coefs_ptr + 3 * row + 1)
    c_e = grad * tl.load(coefs_ptr + 3 * row + 2)
    o_lane = chunk_lanes(chunk)
    b_v = guided(v_ptr, u_ptr, base, o_lane, remaining, scale, ALIGN, GUIDED)
    b_old = load(old_ptr + base, o_lane, remaining, ALIGN)
    b_p, b_q = errors(
        x_ptr, x0_ptr, base, o_lane, remaining, b_old, b_v - b_old, sigma, sigma_beta, ALIGN
    )
    b_dv = term(c_p, b_p) + term(c_q, b_q)
    if REF:
        b_ref = guided(ref_ptr, ref_u_ptr, base, o_lane, remaining, scale, ALIGN, REF_GUIDED)
        b_dv += term(c_e, b_v - b_ref)
    store_gradient(
        dv_ptr, du_ptr, base, o_lane, remaining, b_dv, scale, uncond_scale,
        ALIGN, GUIDED, UNCOND_GRAD,
    )  # fmt: skip


@triton.launcher("nft_loss_forward")
def _launch_forward(launch, *args):
    """Three launches: block sums, rows, totals."""
    a = NftArguments(*args)
    rows, elements = a.sample.shape[0], a.sample.shape[1:].numel()
    device = a.sample.device

    def new(*shape):
        return torch.empty(shape, dtype=torch.float32, device=device)

    loss, positive_loss, negative_loss, kl = (new() for _ in range(4))
    positive_error, negative_error, deviation, coefs = new(rows), new(rows), new(rows), new(rows, 3)
    totals, per_row = (
        (loss, positive_loss, negative_loss, kl),
        (positive_error, negative_error, deviation),
    )
    if rows == 0:
        for total in totals:
            total.zero_()
        return *totals, *per_row, coefs
    blocks = triton.num_blocks(elements)
    sums, terms = triton.partial_sums(loss, 6 * rows, blocks), new(3, rows)
    ref = a.ref_velocity is not None
    with triton.on(device):
        launch(
            nft_loss_sums_kernel, rows * blocks * triton.PARTS,
            (a.velocity, a.uncond_velocity, a.sample, a.x0, a.old_velocity, a.ref_velocity,
             a.ref_uncond_velocity, a.sigma, sums),
            (a.guidance_scale, a.beta, elements, blocks),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=a.uncond_velocity is not None,
            REF=ref,
            REF_GUIDED=a.ref_uncond_velocity is not None,
            **triton.LAUNCH,
        )  # fmt: skip
        launch(
            nft_loss_rows_kernel, rows,
            (sums, a.sigma, a.optimality, a.row_weight, a.kl_row_weight, *per_row, coefs, terms),
            (a.beta, a.floor, a.kl_weight, elements, blocks),
            REF=ref,
            WEIGHT=a.row_weight is not None,
            KL_WEIGHT=a.kl_row_weight is not None,
            **triton.second_pass(blocks),
        )  # fmt: skip
        launch(
            nft_loss_totals_kernel, 1, (terms, *totals), (a.kl_weight, rows),
            REF=ref, **triton.ONE_WARP,
        )  # fmt: skip
    return *totals, *per_row, coefs


@triton.launcher("nft_loss_backward")
def _launch_backward(
    launch, grad_loss, coefs, velocity, uncond, scale, sample, x0, old, sigma, ref, ref_uncond,
    beta, uncond_grad,
):  # fmt: skip
    """One launch."""
    rows, elements = sample.shape[0], sample.shape[1:].numel()
    dv, du = reference.empty_gradients(velocity, uncond, uncond_grad)
    if rows == 0 or elements == 0:
        return dv, du
    blocks = triton.num_blocks(elements)
    with triton.on(sample.device):
        launch(
            nft_loss_backward_kernel, rows * blocks * triton.PARTS,
            (grad_loss, coefs, velocity, uncond, sample, x0, old, ref, ref_uncond, sigma, dv,
             du if uncond_grad else None),
            (scale, 1.0 - scale, beta, elements, blocks),
            ALIGN=triton.alignment(rows, elements),
            GUIDED=uncond is not None,
            REF=ref is not None,
            REF_GUIDED=ref_uncond is not None,
            UNCOND_GRAD=uncond_grad,
            **triton.LAUNCH,
        )  # fmt: skip
    return dv, du


@triton.launcher("nft_loss_gradient")
def _launch_gradient(launch, *args):
    """Runs the two in turn, four launches: a GPU gains nothing by knowing grad_loss before."""
    passes = (functools.partial(run, launch) for run in (_launch_forward, _launch_backward))
    return reference.in_turn(NftArguments, *passes, args)


LossFunction = loss_function("nft_loss", NftArguments, forward_op, gradient_op, backward_op)


def nft_loss(
    velocity: Tensor,
    sample: Tensor,
    x0: Tensor,
    old_velocity: Tensor,
    sigma: Tensor,
    optimality: Tensor,
    *,
    beta: float = 1.0,
    ref_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    row_weight: Tensor | None = None,
    kl_row_weight: Tensor | None = None,
    floor: float = 1e-5,
    uncond_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    ref_uncond_velocity: Tensor | None = None,
    uncond_grad: bool = False,
) -> NftLoss:
    """Computes DiffusionNFT's loss of one batch of noised results, differentiable in velocity.

    Args:
        velocity: [B, ...], the trained policy's velocity at (sample, sigma).
        sample: x_t = (1 - sigma) x0 + sigma eps; x0: the results of the rollout. All latents have
            one shape and device, in any mix of float dtypes.
        old_velocity: the old policy's (combined) velocity at the same place, a constant.
        sigma: [B] float, noise level of each row in [0, 1].
        optimality: [B] float, r in [0, 1]: 1/2 + advantage / (2 adv_clip), clipped to [0, 1], for
            an advantage that is 0 on average.
        beta: how far v+ and v- lie from v_old, > 0. DiffusionNFT's code divides its loss by beta
            and multiplies it by adv_clip: hand that factor over as row_weight.
        ref_velocity, kl_weight: the reference model's velocity and the weight of its distance.
            Under guidance ref_velocity is combined already, unless ref_uncond_velocity is given
            too: then both are combined here with guidance_scale.
        row_weight: [B], weight of each row's errors; sums are divided by B, not by the weights.
        kl_row_weight: [B], weight of each row's KL term; row_weight when None.
        floor: the least that the mean of |x0+- - x0| is taken for, > 0.
        uncond_velocity, guidance_scale, uncond_grad: as for log_prob.

    A row of weight 0 adds 0 to that term and has no gradient of it, whatever its latents hold. A
    sigma or an optimality outside [0, 1] is a ValueError on a CPU (on a GPU under
    FLOWGRPO_DEBUG=1); where only the device knows, its row is NaN. TypeError and ValueError name
    the argument.

    On policy (v = v_old) both errors are the same bits, and the gradient is that of error+ times
    2 r - 1: the direction of the advantage.
    """
    latents = {
        "velocity": velocity,
        "x0": x0,
        "old_velocity": old_velocity,
        "uncond_velocity": uncond_velocity,
        "ref_velocity": ref_velocity,
        "ref_uncond_velocity": ref_uncond_velocity,
    }
    per_row = {
        "sigma": sigma,
        "optimality": optimality,
        "row_weight": row_weight,
        "kl_row_weight": kl_row_weight,
    }
    scale = checks.guidance(uncond_velocity, guidance_scale)
    beta, floor = positive("beta", beta), positive("floor", floor)
    kl_weight = finite("kl_weight", kl_weight)
    _check(sample, latents, per_row, kl_weight)
    uncond, uncond_grad = checks.uncond_half(uncond_velocity, uncond_grad)
    constants = (
        scale, sample, x0, old_velocity, sigma, optimality, ref_velocity, ref_uncond_velocity,
        row_weight, row_weight if kl_row_weight is None else kl_row_weight, beta, floor, kl_weight,
    )  # fmt: skip
    return NftLoss(*LossFunction.evaluate(velocity, uncond, uncond_grad, *constants))


def _check(
    sample: Tensor,
    latents: dict[str, Tensor | None],
    per_row: dict[str, Tensor | None],
    kl_weight: float,
) -> None:
    """Checks all tensors, and what needs what."""
    for name in ("x0", "old_velocity"):
        check_tensor(name, latents[name])
    checks.check_latents(sample, **latents)
    for name, value in per_row.items():
        if value is not None or name in ("sigma", "optimality"):
            checks.check_rows(name, value, sample)
    halves = ("velocity", "uncond_velocity")
    constants = {name: value for name, value in latents.items() if name not in halves}
    checks.check_constants(sample=sample, **constants, **per_row)
    checks.check_unit("sigma", per_row["sigma"], "a timestep of diffusers is 1000 sigma")
    checks.check_unit(
        "optimality", per_row["optimality"], "an advantage is no optimality; see nft_loss"
    )
    if not kl_weight >= 0.0:
        raise ValueError(f"kl_weight must be >= 0, got {kl_weight}")
    if kl_weight > 0.0 and latents["ref_velocity"] is None:
        raise ValueError(f"kl_weight={kl_weight} needs ref_velocity")
    if latents["ref_uncond_velocity"] is not None and (
        latents["ref_velocity"] is None or latents["uncond_velocity"] is None
    ):
        raise ValueError("ref_uncond_velocity needs ref_velocity and uncond_velocity")
