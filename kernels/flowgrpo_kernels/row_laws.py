"""Reference of transition_rows in plain PyTorch: oracle, fallback, numerical contract.

Formulas are in transition_rows.py. Everything is float64, every operation rounded on its own in the
order below, which the kernel of transition_rows.py and csrc/transition_rows.cpp repeat; then one
rounding to float32. log, exp and sin are polynomials of their own, so that the bits depend neither
on a backend nor on a library.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .transitions import MAX_STEPS

LAWS = ("flow_sde", "dance_sde", "cps", "ode", "precise", "dance_precise", "sigma_linear")
GAUSSIAN, NORMALIZER, SCORE_QUIET, KL_GAUSSIAN = 1, 2, 4, 8

# One for every backend, to the last bit.
LN2, LN2_HIGH, LN2_LOW = (
    float.fromhex(x)
    for x in ("0x1.62e42fefa39efp-1", "0x1.62e42fee00000p-1", "0x1.a39ef35793c76p-33")
)
LOG2E, HALF_PI = math.log2(math.e), math.pi / 2
LOG_SQRT_2PI = float.fromhex("0x1.d67f1c864beb5p-1")
LARGEST, TINY = torch.finfo(torch.float32).max, torch.finfo(torch.float64).tiny
SQRT_HALF_BITS = 0x3FE6A09E667F3BCD
COUNTER_SCALE = 8388608.0


def log_of(x: Tensor) -> Tensor:
    """Logarithm of normal float64 numbers: 2 atanh of (f - 1) / (f + 1), f near 1."""
    bits = x.contiguous().view(torch.int64)
    e = (bits - SQRT_HALF_BITS) >> 52
    f = (bits - e * (1 << 52)).view(torch.float64)
    z = (f - 1.0) / (f + 1.0)
    w = z * z
    p = torch.full_like(w, 1.0 / 23.0)
    for i in range(21, 0, -2):
        p = p * w + 1.0 / i
    return e.to(torch.float64) * LN2 + (z * 2.0) * p


def exp_of(x: Tensor) -> Tensor:
    """Exponential of float64 numbers that are not positive; 0 below -700."""
    y = torch.where(x >= 0.0, 0.0, torch.where(x >= -700.0, x, -700.0))
    k = torch.floor(y * LOG2E + 0.5)
    r = (y - k * LN2_HIGH) - k * LN2_LOW
    p = torch.full_like(r, 1.0 / 14.0)
    for i in range(13, 0, -1):
        p = _over(p * r + 1.0, i)
    p = p * r + 1.0
    return torch.where(y == -700.0, 0.0, p * ((k.to(torch.int64) + 1023) << 52).view(torch.float64))


def sin_of(u: Tensor) -> Tensor:
    """sin(u pi / 2) of float64 numbers in [0, 1]."""
    x = u * HALF_PI
    w = x * x
    p = torch.ones_like(w)
    for i in range(23, 1, -2):
        p = 1.0 - _over(p * w, i * (i - 1))
    return x * p


def _over(x: Tensor, divisor: int) -> Tensor:
    """Divides by a tensor: by a number PyTorch would, on a GPU, multiply with its reciprocal."""
    return x / torch.full_like(x, divisor)


def transition_rows(
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: Tensor,
    sigma_max: Tensor,
    noise_step: Tensor | None,
    rows: int,
    law: int,
    flags: int,
    near_one: float,
) -> Tensor:
    """Computes the rows: float32 [rows, 10]; a row is NaN where its inputs make no step."""
    s, p, a, m = (
        x.to(torch.float64).reshape(-1).expand(rows)
        for x in (sigma, sigma_next, noise_level, sigma_max)
    )
    gap, dt = s - p, p - s
    valid = (s > p) & (p >= 0.0) & (s <= 1.0) & (a >= 0.0) & (a <= LARGEST)
    preserving = law in (2, 4, 5)
    q = None
    if law == 0:
        inside = torch.where(1.0 - s <= near_one, m, s)
        valid = valid & (inside < 1.0)
        std = a * torch.sqrt(s / (1.0 - inside))
    elif law == 1:
        std = a.clone()
    elif law == 6:
        std = a + (m - a) * s
        valid = valid & (std >= 0.0)
    elif law == 2:
        u = torch.where(a <= 1.0, a, 2.0 - a)
        valid = valid & (a <= 2.0)
        std, q = p * sin_of(u), p * sin_of(1.0 - u)
    elif preserving:
        if law == 4:
            ratio = (p * (1.0 - s)) / (s * (1.0 - p))
            none = ratio < TINY
            power = exp_of((a * a) * log_of(torch.where(none, 1.0, ratio)))
            power = torch.where(none & (a > 0.0), 0.0, power)
        else:
            x = 1.0 / torch.where(p == 0.0, 1.0, p) - 1.0 / s
            power = exp_of(-((a * a) * torch.where(x < 0.0, 0.0, x)))
        left = 1.0 - power
        std, q = p * torch.sqrt(torch.where(left < 0.0, 0.0, left)), p * torch.sqrt(power)
    else:
        std = torch.zeros_like(s)

    if preserving:
        drift_x, drift_v, c = (1.0 - p) + q, (1.0 - s) * q - s * (1.0 - p), std
    else:
        drift_x = ((std * std) * dt) / (2.0 * s) + 1.0
        drift_v = (((std * std) * (1.0 - s)) / (2.0 * s) + 1.0) * dt
        c = std * torch.sqrt(torch.where(gap < 0.0, 0.0, gap))

    silent = c.to(torch.float32) == 0.0
    noisy, spread = torch.where(silent, 1.0, c), torch.where(silent, 1.0, std)
    gaussian = 0.5 / (noisy * noisy)
    k = gaussian if flags & GAUSSIAN else torch.ones_like(c)
    c0 = torch.zeros_like(c)
    if flags & GAUSSIAN and flags & NORMALIZER:
        c0 = log_of(noisy) + LOG_SQRT_2PI
    big_k = gaussian if flags & KL_GAUSSIAN else 0.5 / (spread * spread)
    c, c0, big_k = (torch.where(silent, 0.0, x) for x in (c, c0, big_k))
    k = torch.where(silent, 1.0 if flags & SCORE_QUIET else 0.0, k)
    if noise_step is None:
        counter = torch.floor(s * COUNTER_SCALE)
    else:
        counter = noise_step.to(torch.float64).reshape(-1).expand(rows)
    valid = valid & (counter >= 0.0) & (counter < MAX_STEPS)
    columns = (drift_x, drift_v, c, k, c0, big_k, gap, counter, std, s)
    table = torch.stack(columns, 1).to(torch.float32)
    valid = valid & torch.isfinite(table).all(1)
    poison = torch.full_like(table, float("nan"))
    # An integer still.
    poison[:, 7] = 0.0
    return torch.where(valid[:, None], table, poison)
