"""Reference of every op in plain PyTorch, any float dtype: oracle, fallback, numerical contract.

The numerical contract
======================
A backend (Triton, native C++) gives the same bits as this file for float32, bfloat16 and float16
inputs, wherever this section says how something is computed.

Elements. A sample's D elements are taken in row-major order of its logical shape. Inputs are read
and converted to float32; all arithmetic is float32. Every product, sum and division is rounded on
its own: **no fma, no contraction, no reassociation** (Triton: enable_fp_fusion=False; C++:
-ffp-contract=off). Coefficients are row `step[b]` of the float32 table; when step[b] is outside
[0, R) they are NaN, which makes the whole row NaN. `w` is float32(guidance_scale).

    v    = velocity                              without uncond_velocity
    v    = u + w * (velocity - u)                u = uncond_velocity
    mu   = (A * x) + (B * v)
    x'   = round(mu + (C * eps))                 to the dtype of the buffer that takes it
    d    = x' - mu                               x' after its rounding
    x0   = x - (sigma * v)                       sigma: column of the table
    e    = v - v_ref          v_ref likewise from ref_velocity, ref_uncond_velocity
    h    = v - v_old                             v_old = old_velocity

Noise. eps as in philox.py (counter = element block and column noise_step of the table, key =
seed), or the caller's tensor converted to float32, or 0 when neither is given (ODE steps only).
Where C = 0, C * eps is 0 whatever the caller's tensor holds. The sign of a zero is not part of the
contract, so a backend may skip it there.

Sums over elements (of d * d, e * e, h * h), `ordered_sum` below. The row is cut into blocks of
BLOCK = 4096 elements, missing elements count as +0. Inside a block, 4 chunks of LANES = 1024 are
added lane by lane in order, ((c0 + c1) + c2) + c3, then the 1024 lanes by adjacent pairs:
lane i of the next level = lane 2i + lane 2i + 1, ten levels. The block sums of a row are then cut
into chunks of 1024, added lane by lane in order, and the lanes by adjacent pairs again. The sum
over rows in the loss is the same second pass over B values. Nothing depends on B, threads or
vector width.

Per row, with n = float32(D), sums S_d, S_e, S_h, means m = S / n (0 when D = 0):

    log_prob = (-(k * m_d)) - c0
    kl       = (K * (B * B)) * m_e
    delta    = log_prob - old_log_prob
    delta    = (delta + (k * (B * B)) * m_h) * C                  with Guard
    ratio    = exp(delta)                                         as below; exp(0) = 1 exactly
    adv      = advantage clamped to +-adv_clip
    lo, hi   = float32(1 - clip_low), float32(1 + clip_high)
    policy   = max(-adv * ratio, -adv * clamp(ratio, lo, hi))     NaN propagates
    policy   = policy / abs_dt                                    with Guard
    loss     = policy_loss + kl_weight * kl_loss
               policy_loss = sum_rows(row_weight * policy) / B, kl_loss = sum_rows(kl_row_weight *
               kl) / B

Where C = 0, kl is 0, and so is log_prob where k = 0, too: a row may score its x' without drawing
noise. Where a weight is 0 its row adds 0 (even if the row is NaN). B = 0 gives a loss of 0.

Gradient, saved by the forward pass as coefs float32 [B, 3]:

    active = not ((ratio < lo or ratio > hi) and -adv * clamp(ratio) > -adv * ratio)
    g      = ((row_weight / B) * (-adv * active)) * ratio         times C / abs_dt with Guard;
                                                                  0 where row_weight or C = k = 0
    c_d    = (g * (2 * (k * B))) / n
    c_e    = (((kl_row_weight / B) * kl_weight) * (2 * (K * (B * B)))) / n
    c_h    = (g * (2 * (k * (B * B)))) / n
    dv     = go c_d d + go c_e e + go c_h h                       in this order, (go * c) first;
                                                                  a term is 0 where go * c is
    grad velocity        = dv, or w * dv under guidance
    grad uncond_velocity = float32(1 - guidance_scale) * dv, only when asked for

rounded once to the dtype of the velocity. log_prob's own gradient has
c_d = (go * (2 * (k * B))) / n; those of mu and x0, where they are asked for, are added to dv:
B * g_mu, then -(sigma * g_x0).

exp is a polynomial, since no two libraries or GPUs have the same bits of it (PTX's ex2.approx does
not fix its last ones). With x clamped to [-104, 89], beyond which the result is 0 or infinite:

    n   = floor(x * 1.44269504 + 0.5)
    r   = (x - n * 0.693359375) - n * -0.00021219444      ln 2 in two parts; the first is exact
    exp = ((P(r) * (r * r) + r) + 1) * 2^n                P by Horner, coefficients EXP_POLY

where 2^n is multiplied as two powers of two, half of n each, so that a subnormal result is rounded
once. Within 1 ulp of the exact value everywhere, within 0.51 for |x| < 0.001. NaN stays NaN.

nft_loss
--------
Elements, with sigma and optimality r of the row (NaN unless within [0, 1]), x = x_t, sb = sigma *
beta, v_old = old_velocity, v and v_ref as above:

    h    = v - v_old
    d    = (x - (sigma * v_old)) - x0
    t    = sb * h
    p, q = d - t, d + t                                           x0+ - x0 and x0- - x0

Sums over elements, in the order above, of |p|, p * p, |q|, q * q, h * h, and e * e with
ref_velocity; means m = S / n. Per row, and then over rows as above:

    a+            = max(m_|p|, floor)                             NaN propagates; a- likewise
    error+        = m_pp / a+                                     error- = m_qq / a-
    positive      = r * error+
    negative      = (1 - r) * error-
    positive_loss = sum_rows(row_weight * positive) / B           negative_loss likewise
    kl            = sum_rows(kl_row_weight * m_ee) / B
    loss          = (positive_loss + negative_loss) + kl_weight * kl

The normalisers a+ and a- are constants for the gradient. coefs float32 [B, 3]:

    c_p = -((((row_weight / B) * r) * (2 * sb)) / a+) / n         0 where row_weight is 0
    c_q =  ((((row_weight / B) * (1 - r)) * (2 * sb)) / a-) / n   0 where row_weight is 0
    c_e = (((kl_row_weight / B) * kl_weight) * 2) / n
    dv  = go c_p p + go c_q q + go c_e e                          as for grpo_loss

In float64 (all floating inputs float64) the same code is the oracle and gradcheck's subject.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import philox

BLOCK = 4096
LANES = 1024
# (exp(r) - 1 - r) / r^2 = P(r) for |r| <= ln 2 / 2: a minimax fit, relative error of exp 6e-11.
EXP_POLY = (0.5, 0.166666657, 0.0416662656, 0.00833351072, 0.00139468687, 0.000197882517)


class Coefficients(NamedTuple):
    """Table row of each sample, each [B] in the compute dtype."""

    A: Tensor
    B: Tensor
    C: Tensor
    k: Tensor
    c0: Tensor
    K: Tensor
    abs_dt: Tensor
    noise_step: Tensor
    std_dev: Tensor
    sigma: Tensor


def coefficients(table: Tensor, step: Tensor, dtype: torch.dtype) -> Coefficients:
    """Gathers rows `step` (int64 [B]) of the table; NaN where the step is outside the table."""
    inside = (step >= 0) & (step < table.shape[0])
    rows = table.index_select(0, step.clamp(0, table.shape[0] - 1)).to(dtype)
    rows = torch.where(inside[:, None], rows, float("nan"))
    return Coefficients(*rows[:, : len(Coefficients._fields)].unbind(1))


def ordered_sum(x: Tensor) -> Tensor:
    """Sums over the last dimension of [B, n] in the fixed order of the module docstring: [B]."""
    rows, n = x.shape
    if n > BLOCK:
        # Not -1: an empty batch leaves it open.
        blocks = (n + BLOCK - 1) // BLOCK
        x = F.pad(x, (0, -n % BLOCK)).view(rows, blocks, BLOCK // LANES, LANES)
        return _lane_sum(_pair_tree(_chunk_sum(x)))
    return _lane_sum(x)


def _lane_sum(x: Tensor) -> Tensor:
    """[B, n] -> [B]: chunks of LANES added in order, then the lanes by adjacent pairs."""
    rows, n = x.shape
    if n == 0:
        return x.new_zeros(rows)
    # Lanes and chunks that are missing are +0 and adding them changes nothing, so a short row needs
    # no padding up to LANES.
    if n <= LANES:
        return _pair_tree(F.pad(x, (0, (1 << (n - 1).bit_length()) - n)))
    chunks = (n + LANES - 1) // LANES
    return _pair_tree(_chunk_sum(F.pad(x, (0, -n % LANES)).view(rows, chunks, LANES)))


def _chunk_sum(x: Tensor) -> Tensor:
    """[..., chunks, LANES] -> [..., LANES], chunks added in order."""
    chunks = x.unbind(-2)
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    return total


def _pair_tree(x: Tensor) -> Tensor:
    """[..., 2^p] -> [...], adjacent pairs first."""
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x[..., 0]


def over(x: Tensor, count: int) -> Tensor:
    """Divides by a count, or by 1 if it is 0."""
    # By a tensor: by a number PyTorch would, on a GPU, multiply with its reciprocal.
    return x / torch.full_like(x, max(count, 1))


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, ...] -> [B, D] in the compute dtype."""
    return x.reshape(x.shape[0], x.shape[1:].numel()).to(dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that an op computes in: float64 for float64 tensors, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _guided(velocity: Tensor, uncond: Tensor | None, guidance_scale: float, dtype) -> Tensor:
    """v [B, D]: the velocity, combined with the unconditional one where that is there."""
    v = _flat(velocity, dtype)
    if uncond is None:
        return v
    u = _flat(uncond, dtype)
    return u + (v - u) * guidance_scale


def _mean(squares: Tensor) -> Tensor:
    """Takes the mean over the elements of [B, D], defined as 0 for D = 0."""
    return over(ordered_sum(squares), squares.shape[1])


def _score(c: Coefficients, d: Tensor) -> Tensor:
    """log_prob [B] of d = x' - mu."""
    log_prob = -(c.k * _mean(d * d)) - c.c0
    return torch.where(_quiet(c), 0.0, log_prob)


def _quiet(c: Coefficients) -> Tensor:
    """Tells of each row, bool [B], whether it has neither noise nor a score."""
    return (c.C == 0) & (c.k == 0)


def sde_step(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    table: Tensor,
    step: Tensor,
    seeds: Tensor | None,
    noise: Tensor | None,
    prev_sample: Tensor,
    log_prob: Tensor,
    mean: Tensor | None = None,
    x0: Tensor | None = None,
) -> None:
    """Writes x', rounded to the dtype of prev_sample, its log_prob (float32 [B]), mu and x0."""
    dtype = compute_dtype(sample)
    c = coefficients(table, step, dtype)
    v = _guided(velocity, uncond_velocity, guidance_scale, dtype)
    mu = _mu(c, sample, v)
    if noise is not None:
        eps = _flat(noise, dtype)
    elif seeds is not None:
        # A row outside the table has a NaN step; any counter will do, its result is NaN.
        steps = torch.nan_to_num(c.noise_step).to(torch.int64)
        eps = philox.normals(seeds, steps, mu.shape[1]).to(dtype)
    else:
        eps = torch.zeros_like(mu)
    x_prev = (mu + _term(c.C, eps)).to(prev_sample.dtype)
    clean = _x0(c, sample, v) if x0 is not None else None
    prev_sample.copy_(x_prev.view(prev_sample.shape))
    log_prob.copy_(_score(c, x_prev.to(dtype) - mu))
    if mean is not None:
        mean.copy_(mu.view(mean.shape))
    if clean is not None:
        x0.copy_(clean.view(x0.shape))


def _mu(c: Coefficients, sample: Tensor, v: Tensor) -> Tensor:
    """mu [B, D]."""
    return c.A[:, None] * _flat(sample, v.dtype) + c.B[:, None] * v


def _x0(c: Coefficients, sample: Tensor, v: Tensor) -> Tensor:
    """x0 [B, D]."""
    return _flat(sample, v.dtype) - c.sigma[:, None] * v


def _residual(velocity, uncond, guidance_scale, sample, prev_sample, c) -> tuple[Tensor, Tensor]:
    """(v, d), each [B, D]: the velocity and x' - mu."""
    dtype = c.A.dtype
    v = _guided(velocity, uncond, guidance_scale, dtype)
    return v, _flat(prev_sample, dtype) - _mu(c, sample, v)


def exp(x: Tensor) -> Tensor:
    """Computes exp of float32 as the module docstring says; of float64 as torch does."""
    if x.dtype != torch.float32:
        return torch.exp(x)
    number = torch.where(x == x, x, 0.0).clamp(-104.0, 89.0)
    n = torch.floor(number * 1.44269504 + 0.5)
    r = (number - n * 0.693359375) - n * -0.00021219444
    p = philox.horner(EXP_POLY, r)
    n = n.to(torch.int32)
    half = n >> 1
    result = ((p * (r * r) + r) + 1.0) * _power_of_two(half) * _power_of_two(n - half)
    return torch.where(x == x, result, x)


def _power_of_two(n: Tensor) -> Tensor:
    """2^n as float32 of an int32 n in [-126, 127]."""
    return ((n + 127) << 23).view(torch.float32)


def log_prob(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
) -> Tensor:
    """Computes log_prob of a stored x': float32 [B] (float64 for float64 inputs)."""
    c = coefficients(table, step, compute_dtype(sample))
    _, d = _residual(velocity, uncond_velocity, guidance_scale, sample, prev_sample, c)
    return _score(c, d)


def log_prob_mean(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    with_x0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (log_prob [B], mu, x0) of a stored x', float32; x0 is empty unless asked for."""
    c = coefficients(table, step, compute_dtype(sample))
    v = _guided(velocity, uncond_velocity, guidance_scale, c.A.dtype)
    mu = _mu(c, sample, v)
    log_prob = _score(c, _flat(prev_sample, mu.dtype) - mu)
    x0 = _x0(c, sample, v).view(sample.shape) if with_x0 else mu.new_empty(0)
    return log_prob, mu.view(sample.shape), x0


def log_prob_mean_backward(
    grad: Tensor,
    grad_mean: Tensor | None,
    grad_x0: Tensor | None,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of log_prob_mean in velocity and uncond_velocity."""
    c = coefficients(table, step, compute_dtype(sample))
    _, d = _residual(velocity, uncond_velocity, guidance_scale, sample, prev_sample, c)
    dv = _term(over(grad.to(d.dtype) * (2 * (c.k * c.B)), d.shape[1]), d)
    if grad_mean is not None:
        dv = dv + c.B[:, None] * _flat(grad_mean, d.dtype)
    if grad_x0 is not None:
        dv = dv - c.sigma[:, None] * _flat(grad_x0, d.dtype)
    return _split_gradient(dv, velocity, uncond_velocity, guidance_scale, uncond_grad)


def _term(c: Tensor, x: Tensor) -> Tensor:
    """Multiplies each row by its c, with 0 where c is 0: there x may be infinite or NaN."""
    c = c[:, None]
    return torch.where(c == 0, 0.0, c * x)


def empty_gradients(
    velocity: Tensor, uncond: Tensor | None, uncond_grad: bool
) -> tuple[Tensor, Tensor]:
    """Allocates the gradients of both halves; the second is empty unless asked for."""
    dv = velocity.new_empty(velocity.shape)
    if uncond is None:
        return dv, velocity.new_empty(0)
    return dv, uncond.new_empty(uncond.shape if uncond_grad else 0)


def _split_gradient(
    dv: Tensor, velocity: Tensor, uncond: Tensor | None, guidance_scale: float, uncond_grad: bool
) -> tuple[Tensor, Tensor]:
    """Splits dv [B, D] into the gradients of both halves; the second is empty unless asked for."""
    if uncond is None:
        return dv.to(velocity.dtype).view(velocity.shape), velocity.new_empty(0)
    conditional = (dv * guidance_scale).to(velocity.dtype).view(velocity.shape)
    if not uncond_grad:
        return conditional, uncond.new_empty(0)
    return conditional, (dv * (1.0 - guidance_scale)).to(uncond.dtype).view(uncond.shape)


def log_prob_backward(
    grad: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of sum(grad * log_prob), grad [B], in velocity and uncond_velocity."""
    return log_prob_mean_backward(
        grad, None, None, velocity, uncond_velocity, guidance_scale, sample, prev_sample, table,
        step, uncond_grad,
    )  # fmt: skip


def _weighted_mean(weight: Tensor | None, values: Tensor) -> Tensor:
    """Computes sum(weight * values) / B; weight 0 silences a row, an empty batch gives 0."""
    if weight is not None:
        weight = weight.to(values.dtype)
        values = torch.where(weight == 0, 0.0, weight * values)
    return over(ordered_rows(values), values.shape[0])


def ordered_rows(values: Tensor) -> Tensor:
    """Sums [B] in the order of the second pass: 0-dim."""
    return _lane_sum(values[None])[0]


class LossArguments(NamedTuple):
    """Arguments of the op grpo_loss_forward, in its order."""

    velocity: Tensor
    uncond_velocity: Tensor | None
    guidance_scale: float
    sample: Tensor
    prev_sample: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    table: Tensor
    step: Tensor
    ref_velocity: Tensor | None
    ref_uncond_velocity: Tensor | None
    old_velocity: Tensor | None
    row_weight: Tensor | None
    kl_row_weight: Tensor | None
    kl_weight: float
    clip_low: float
    clip_high: float
    adv_clip: float

    def of_backward(self) -> tuple:
        """Lists the arguments of grpo_loss_backward between its coefs and its uncond_grad."""
        return (
            self.velocity, self.uncond_velocity, self.guidance_scale, self.sample,
            self.prev_sample, self.table, self.step, self.ref_velocity, self.ref_uncond_velocity,
            self.old_velocity,
        )  # fmt: skip


def grpo_loss_forward(
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    table: Tensor,
    step: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    old_velocity: Tensor | None,
    row_weight: Tensor | None,
    kl_row_weight: Tensor | None,
    kl_weight: float,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
) -> tuple[Tensor, ...]:
    """Computes (loss, policy_loss, kl, clip_fraction, log_prob [B], ratio [B], coefs [B, 3])."""
    dtype = compute_dtype(sample)
    c = coefficients(table, step, dtype)
    v, d = _residual(velocity, uncond_velocity, guidance_scale, sample, prev_sample, c)
    rows, n = d.shape
    lp = _score(c, d)
    b2 = c.B * c.B

    delta = lp - old_log_prob.to(dtype)
    if old_velocity is not None:
        h = v - _flat(old_velocity, dtype)
        delta = (delta + (c.k * b2) * _mean(h * h)) * c.C
    ratio = exp(delta)
    adv = advantages.to(dtype).clamp(-adv_clip, adv_clip)
    policy, slope, outside = _clipped_policy(ratio, adv, 1.0 - clip_low, 1.0 + clip_high)

    weight = _row_gradient_weight(row_weight, adv)
    g = over(weight, rows) * slope * ratio
    silent = _quiet(c) if row_weight is None else _quiet(c) | (weight == 0)
    g = torch.where(silent, 0.0, g)
    if old_velocity is not None:
        policy = policy / c.abs_dt
        g = (g * c.C) / c.abs_dt
    c_d = over(g * (2 * (c.k * c.B)), n)
    c_h = over(g * (2 * (c.k * b2)), n) if old_velocity is not None else torch.zeros_like(g)

    policy_loss = _weighted_mean(row_weight, policy)
    if ref_velocity is not None:
        e = v - _guided(ref_velocity, ref_uncond_velocity, guidance_scale, dtype)
        kl_rows = torch.where(c.C == 0, 0.0, (c.K * b2) * _mean(e * e))
        kl_grad = over(_row_gradient_weight(kl_row_weight, adv), rows) * kl_weight
        c_e = over(kl_grad * (2 * (c.K * b2)), n)
        kl = _weighted_mean(kl_row_weight, kl_rows)
        loss = policy_loss + kl_weight * kl
    else:
        c_e, kl, loss = torch.zeros_like(g), torch.zeros_like(policy_loss), policy_loss.clone()
    clip_fraction = over(ordered_rows(outside.to(dtype)), rows)
    return loss, policy_loss, kl, clip_fraction, lp, ratio, torch.stack((c_d, c_e, c_h), dim=1)


def _clipped_policy(ratio, adv, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """(policy term, its derivative in the ratio, whether the ratio is outside the clip range)."""
    unclipped, clipped = -adv * ratio, -adv * ratio.clamp(low, high)
    outside = (ratio < low) | (ratio > high)
    active = ~(outside & (clipped > unclipped))
    return torch.maximum(unclipped, clipped), -adv * active, outside


def _row_gradient_weight(weight: Tensor | None, like: Tensor) -> Tensor:
    return torch.ones_like(like) if weight is None else weight.to(like.dtype)


def grpo_loss_backward(
    grad_loss: Tensor,
    coefs: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    old_velocity: Tensor | None,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of grad_loss * loss in the velocities; coefs from the forward pass."""
    c = coefficients(table, step, compute_dtype(sample))
    v, d = _residual(velocity, uncond_velocity, guidance_scale, sample, prev_sample, c)
    c_d, c_e, c_h = (grad_loss.to(d.dtype) * coefs).unbind(1)
    dv = _term(c_d, d)
    if ref_velocity is not None:
        v_ref = _guided(ref_velocity, ref_uncond_velocity, guidance_scale, d.dtype)
        dv = dv + _term(c_e, v - v_ref)
    if old_velocity is not None:
        dv = dv + _term(c_h, v - _flat(old_velocity, d.dtype))
    return _split_gradient(dv, velocity, uncond_velocity, guidance_scale, uncond_grad)


def in_turn(arguments: type, forward, backward, args: tuple) -> tuple[Tensor, ...]:
    """Computes a loss and its gradients by its two ops, for a grad_loss known beforehand.

    arguments: the NamedTuple of those of forward. args: these, then grad_loss (a number) and
    uncond_grad. Returns the results of forward, then those of backward.
    """
    *args, grad_loss, uncond_grad = args
    outputs = forward(*args)
    loss, *_, coefs = outputs
    grad = torch.full_like(loss, grad_loss)
    return *outputs, *backward(grad, coefs, *arguments(*args).of_backward(), uncond_grad)


def grpo_loss_gradient(*args) -> tuple[Tensor, ...]:
    """Computes what grpo_loss_forward and grpo_loss_backward do; `args` as in in_turn.

    For backends that save a pass over memory with it.
    """
    return in_turn(LossArguments, grpo_loss_forward, grpo_loss_backward, args)


class NftArguments(NamedTuple):
    """Arguments of the op nft_loss_forward, in its order."""

    velocity: Tensor
    uncond_velocity: Tensor | None
    guidance_scale: float
    sample: Tensor
    x0: Tensor
    old_velocity: Tensor
    sigma: Tensor
    optimality: Tensor
    ref_velocity: Tensor | None
    ref_uncond_velocity: Tensor | None
    row_weight: Tensor | None
    kl_row_weight: Tensor | None
    beta: float
    floor: float
    kl_weight: float

    def of_backward(self) -> tuple:
        """Lists the arguments of nft_loss_backward between its coefs and its uncond_grad."""
        return (
            self.velocity, self.uncond_velocity, self.guidance_scale, self.sample, self.x0,
            self.old_velocity, self.sigma, self.ref_velocity, self.ref_uncond_velocity, self.beta,
        )  # fmt: skip


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B] in the compute dtype, NaN outside [0, 1]."""
    x = x.to(dtype)
    return torch.where((x >= 0) & (x <= 1), x, float("nan"))


def _nft_errors(
    velocity, uncond, guidance_scale, sample, x0, old_velocity, sigma, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(v, h, p, q), each [B, D]: v, v - v_old, x0+ - x0 and x0- - x0."""
    dtype = compute_dtype(sample)
    v = _guided(velocity, uncond, guidance_scale, dtype)
    old = _flat(old_velocity, dtype)
    sigma = _unit(sigma, dtype)[:, None]
    h = v - old
    d = (_flat(sample, dtype) - sigma * old) - _flat(x0, dtype)
    t = (sigma * beta) * h
    return v, h, d - t, d + t


def _nft_side(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """(normaliser a, error), each [B], of one side's x0+- - x0 [B, D]."""
    normaliser = _mean(x.abs()).clamp(min=floor)
    return normaliser, _mean(x * x) / normaliser


def nft_loss_forward(*args) -> tuple[Tensor, ...]:
    """Computes the loss of DiffusionNFT. args: NftArguments.

    Returns (loss, positive_loss, negative_loss, kl, positive_error [B], negative_error [B],
    old_deviation [B], coefs [B, 3]).
    """
    a = NftArguments(*args)
    dtype = compute_dtype(a.sample)
    v, h, p, q = _nft_errors(
        a.velocity, a.uncond_velocity, a.guidance_scale, a.sample, a.x0, a.old_velocity, a.sigma,
        a.beta,
    )  # fmt: skip
    rows, n = p.shape
    r = _unit(a.optimality, dtype)
    (scale_p, error_p), (scale_q, error_q) = _nft_side(p, a.floor), _nft_side(q, a.floor)
    positive_loss = _weighted_mean(a.row_weight, r * error_p)
    negative_loss = _weighted_mean(a.row_weight, (1 - r) * error_q)
    loss = positive_loss + negative_loss

    weight = _row_gradient_weight(a.row_weight, r)
    share, slope = over(weight, rows), 2 * (_unit(a.sigma, dtype) * a.beta)
    c_p = -over(((share * r) * slope) / scale_p, n)
    c_q = over(((share * (1 - r)) * slope) / scale_q, n)
    c_p, c_q = (torch.where(weight == 0, 0.0, c) for c in (c_p, c_q))
    if a.ref_velocity is not None:
        e = v - _guided(a.ref_velocity, a.ref_uncond_velocity, a.guidance_scale, dtype)
        kl = _weighted_mean(a.kl_row_weight, _mean(e * e))
        loss = loss + a.kl_weight * kl
        c_e = over(over(_row_gradient_weight(a.kl_row_weight, r), rows) * a.kl_weight * 2, n)
    else:
        kl, c_e = torch.zeros_like(loss), torch.zeros_like(c_p)
    coefs = torch.stack((c_p, c_q, c_e), dim=1)
    return loss, positive_loss, negative_loss, kl, error_p, error_q, _mean(h * h), coefs


def nft_loss_backward(
    grad_loss: Tensor,
    coefs: Tensor,
    velocity: Tensor,
    uncond_velocity: Tensor | None,
    guidance_scale: float,
    sample: Tensor,
    x0: Tensor,
    old_velocity: Tensor,
    sigma: Tensor,
    ref_velocity: Tensor | None,
    ref_uncond_velocity: Tensor | None,
    beta: float,
    uncond_grad: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the gradients of grad_loss * loss in the velocities; coefs from the forward pass."""
    v, _, p, q = _nft_errors(
        velocity, uncond_velocity, guidance_scale, sample, x0, old_velocity, sigma, beta
    )
    c_p, c_q, c_e = (grad_loss.to(p.dtype) * coefs).unbind(1)
    dv = _term(c_p, p) + _term(c_q, q)
    if ref_velocity is not None:
        v_ref = _guided(ref_velocity, ref_uncond_velocity, guidance_scale, p.dtype)
        dv = dv + _term(c_e, v - v_ref)
    return _split_gradient(dv, velocity, uncond_velocity, guidance_scale, uncond_grad)


def nft_loss_gradient(*args) -> tuple[Tensor, ...]:
    """Computes what nft_loss_forward and nft_loss_backward do; `args` as in in_turn."""
    return in_turn(NftArguments, nft_loss_forward, nft_loss_backward, args)


def initial_noise(seeds: Tensor, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Draws standard normals [B, *shape] of the reserved step counter, rounded to dtype."""
    steps = torch.full_like(seeds, philox.INITIAL_STEP)
    numel = torch.Size(shape).numel()
    return philox.normals(seeds, steps, numel).to(dtype).view(seeds.shape[0], *shape)
