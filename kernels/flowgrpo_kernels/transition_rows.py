"""Rows of a transition table from device tensors: sigma pairs and noise levels, no host read.

With s = sigma, s' = sigma_next, a = noise_level, m = sigma_max, dt = s' - s, all of a row:

    flow_sde       S = a sqrt(s / (1 - s)), with m for s inside 1 - s where 1 - s <= near_one
    dance_sde      S = a
    sigma_linear   S = a + (m - a) s                       flow_grpo's step for Wan; a is S at s = 0
                   A = 1 + S^2 dt / 2s      B = (1 + S^2 (1 - s) / 2s) dt           C = S sqrt(-dt)
    cps            S = s' sin(a pi/2)       q = s' |cos(a pi/2)|
    precise        S = s' sqrt(1 - r)       q = s' sqrt(r)     r = (s' (1 - s) / (s (1 - s')))^(a^2)
    dance_precise  likewise                                    r = exp(-a^2 (1/s' - 1/s))
                   A = (1 - s') + q         B = (1 - s) q - s (1 - s')              C = S
    ode            A = 1                    B = dt                                  C = S = 0

    k = 1 / 2C^2 and c0 = log C + log sqrt(2 pi), or k = 1 and c0 = 0 (by default for cps)
    K = 1 / 2S^2, or 1 / 2C^2 with kl="gaussian"

The laws of transitions.py, with the same treatment of C = 0; precise and dance_precise are those of
Precise (arXiv 2605.23522). Differences from transitions.py:

1. Nothing is read back, so nothing is refused by value on a GPU: a row whose inputs make no step (a
   sigma pair that does not fall or leaves [0, 1], a noise level that is NaN or negative, above 2
   for cps, a coefficient beyond float32) is NaN in all it computes. On the CPU, and with
   FLOWGRPO_DEBUG=1 on a GPU, it raises.
2. There is no bound on C and A, and no sigma but 1 itself is taken for 1, unless near_one says so.
3. log, exp and sin are polynomials of row_laws.py, so that the bits do not depend on a backend.

The numerical contract is in row_laws.py.
"""

from __future__ import annotations

import functools
import struct

import torch
from torch import Tensor

from . import checks, row_laws
from .arguments import check_tensor, finite, flag, integer, number
from .autograd import readable
from .backends import dispatch, triton
from .backends.triton import constant, jit, tl
from .row_laws import (
    COUNTER_SCALE,
    GAUSSIAN,
    HALF_PI,
    KL_GAUSSIAN,
    LARGEST,
    LAWS,
    LN2,
    LN2_HIGH,
    LN2_LOW,
    LOG2E,
    LOG_SQRT_2PI,
    NORMALIZER,
    SCORE_QUIET,
    SQRT_HALF_BITS,
    TINY,
)
from .transitions import MAX_STEPS, NUM_COLUMNS, Transitions, check_kl


def _fake(sigma, sigma_next, noise_level, sigma_max, noise_step, rows, law, flags, near_one):
    return sigma.new_empty((rows, NUM_COLUMNS), dtype=torch.float32)


transition_rows_op = dispatch.define(
    "transition_rows",
    "(Tensor sigma, Tensor sigma_next, Tensor noise_level, Tensor sigma_max, Tensor? noise_step, "
    "SymInt rows, int law, int flags, float near_one) -> Tensor",
    row_laws.transition_rows,
    _fake,
    in_float64=True,
)

LANES = 32
LANES_C, COLUMNS_C = constant(LANES), constant(NUM_COLUMNS)
LN2_C, LN2_HIGH_C, LN2_LOW_C = constant(LN2), constant(LN2_HIGH), constant(LN2_LOW)
LOG2E_C, HALF_PI_C = constant(LOG2E), constant(HALF_PI)
LOG_SQRT_2PI_C, LARGEST_C, TINY_C = constant(LOG_SQRT_2PI), constant(LARGEST), constant(TINY)
SQRT_HALF_BITS_C, COUNTER_SCALE_C = constant(SQRT_HALF_BITS), constant(COUNTER_SCALE)
MAX_STEPS_C = constant(float(MAX_STEPS))


@jit
def log_of_kernel(b_x):
    """Repeats log_of."""
    bits = b_x.to(tl.int64, bitcast=True)
    e = (bits - SQRT_HALF_BITS_C) >> 52
    f = (bits - (e << 52)).to(tl.float64, bitcast=True)
    z = (f - 1.0) / (f + 1.0)
    w = z * z
    p = tl.zeros_like(w) + 1.0 / 23.0
    for j in tl.static_range(11):
        p = p * w + 1.0 / (21 - 2 * j)
    return e.to(tl.float64) * LN2_C + (z * 2.0) * p


@jit
def exp_of_kernel(b_x):
    """Repeats exp_of."""
    zero = tl.zeros_like(b_x)
    y = tl.where(b_x >= 0.0, zero, tl.where(b_x >= -700.0, b_x, zero - 700.0))
    k = tl.floor(y * LOG2E_C + 0.5)
    r = (y - k * LN2_HIGH_C) - k * LN2_LOW_C
    p = tl.zeros_like(r) + 1.0 / 14.0
    for j in tl.static_range(13):
        p = (p * r + 1.0) / (13.0 - j)
    p = p * r + 1.0
    scale = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(y == -700.0, zero, p * scale)


@jit
def sin_of_kernel(b_u):
    """Repeats sin_of."""
    x = b_u * HALF_PI_C
    w = x * x
    p = tl.zeros_like(w) + 1.0
    for j in tl.static_range(11):
        p = 1.0 - (p * w) / ((23.0 - 2 * j) * (22.0 - 2 * j))
    return x * p


@jit
def transition_rows_kernel(
    sigma_ptr,  # [N], or [1] with a stride of 0, as the next four
    next_ptr,
    level_ptr,
    max_ptr,
    counter_ptr,  # int64, or None
    table_ptr,  # [rows, columns]
    sigma_stride,
    next_stride,
    level_stride,
    max_stride,
    counter_stride,
    rows,
    near_one,
    LAW: tl.constexpr,
    FLAGS: tl.constexpr,
):
    """Writes LANES rows; one program each."""
    o = tl.program_id(0) * LANES_C + tl.arange(0, LANES_C)
    mask = o < rows
    s = tl.load(sigma_ptr + o * sigma_stride, mask=mask, other=1.0).to(tl.float64)
    p = tl.load(next_ptr + o * next_stride, mask=mask, other=0.0).to(tl.float64)
    a = tl.load(level_ptr + o * level_stride, mask=mask, other=0.0).to(tl.float64)
    m = tl.load(max_ptr + o * max_stride, mask=mask, other=0.0).to(tl.float64)
    zero = tl.zeros([LANES_C], dtype=tl.float64)
    one = zero + 1.0
    gap = s - p
    dt = p - s
    valid = (s > p) & (p >= 0.0) & (s <= 1.0) & (a >= 0.0) & (a <= LARGEST_C)
    q = zero
    if LAW == 0:
        inside = tl.where(1.0 - s <= zero + near_one, m, s)
        valid = valid & (inside < 1.0)
        std = a * tl.sqrt(s / (1.0 - inside))
    elif LAW == 1:
        std = a
    elif LAW == 6:
        std = a + (m - a) * s
        valid = valid & (std >= 0.0)
    elif LAW == 2:
        u = tl.where(a <= 1.0, a, 2.0 - a)
        valid = valid & (a <= 2.0)
        std = p * sin_of_kernel(u)
        q = p * sin_of_kernel(1.0 - u)
    elif LAW == 3:
        std = zero
    else:
        if LAW == 4:
            ratio = (p * (1.0 - s)) / (s * (1.0 - p))
            none = ratio < TINY_C
            power = exp_of_kernel((a * a) * log_of_kernel(tl.where(none, one, ratio)))
            power = tl.where(none & (a > 0.0), zero, power)
        else:
            x = 1.0 / tl.where(p == 0.0, one, p) - 1.0 / s
            power = exp_of_kernel(-((a * a) * tl.where(x < 0.0, zero, x)))
        left = 1.0 - power
        std = p * tl.sqrt(tl.where(left < 0.0, zero, left))
        q = p * tl.sqrt(power)

    if (LAW == 2) | (LAW == 4) | (LAW == 5):
        drift_x = (1.0 - p) + q
        drift_v = (1.0 - s) * q - s * (1.0 - p)
        c = std
    else:
        drift_x = ((std * std) * dt) / (2.0 * s) + 1.0
        drift_v = (((std * std) * (1.0 - s)) / (2.0 * s) + 1.0) * dt
        c = std * tl.sqrt(tl.where(gap < 0.0, zero, gap))

    silent = c.to(tl.float32) == 0.0
    noisy = tl.where(silent, one, c)
    spread = tl.where(silent, one, std)
    gaussian = 0.5 / (noisy * noisy)
    k = one
    c0 = zero
    if FLAGS & 1:
        k = gaussian
        if FLAGS & 2:
            c0 = log_of_kernel(noisy) + LOG_SQRT_2PI_C
    big_k = gaussian if FLAGS & 8 else 0.5 / (spread * spread)
    c = tl.where(silent, zero, c)
    c0 = tl.where(silent, zero, c0)
    big_k = tl.where(silent, zero, big_k)
    k = tl.where(silent, one if FLAGS & 4 else zero, k)
    if counter_ptr is None:
        counter = tl.floor(s * COUNTER_SCALE_C)
    else:
        counter = tl.load(counter_ptr + o * counter_stride, mask=mask, other=0).to(tl.float64)
    valid = valid & (counter >= 0.0) & (counter < MAX_STEPS_C)
    valid = valid & fits(drift_x) & fits(drift_v) & fits(c) & fits(k) & fits(c0) & fits(big_k)
    valid = valid & fits(gap) & fits(std)
    base = table_ptr + o * COLUMNS_C
    store_column(base, 0, mask, valid, drift_x)
    store_column(base, 1, mask, valid, drift_v)
    store_column(base, 2, mask, valid, c)
    store_column(base, 3, mask, valid, k)
    store_column(base, 4, mask, valid, c0)
    store_column(base, 5, mask, valid, big_k)
    store_column(base, 6, mask, valid, gap)
    tl.store(base + 7, tl.where(valid, counter.to(tl.float32), 0.0), mask=mask)
    store_column(base, 8, mask, valid, std)
    store_column(base, 9, mask, valid, s)


@jit
def fits(b_x):
    """Tells what is finite in float32."""
    return tl.abs(b_x.to(tl.float32)) <= LARGEST_C


@jit
def store_column(base, COLUMN: tl.constexpr, mask, valid, b_x):
    """Stores one column; NaN in a row whose inputs make no step."""
    tl.store(base + COLUMN, tl.where(valid, b_x.to(tl.float32), float("nan")), mask=mask)


@triton.launcher("transition_rows")
def _launch(
    launch, sigma, sigma_next, noise_level, sigma_max, noise_step, rows, law, flags, near_one
):
    """One launch."""
    table = torch.empty((rows, NUM_COLUMNS), dtype=torch.float32, device=sigma.device)
    if rows == 0:
        return table
    inputs = (sigma, sigma_next, noise_level, sigma_max, noise_step)
    strides = [0 if x is None or x.numel() == 1 else 1 for x in inputs]
    with triton.on(sigma.device):
        launch(
            transition_rows_kernel, -(-rows // LANES), (*inputs, table),
            (*strides, rows, near_one), LAW=law, FLAGS=flags, **triton.ONE_WARP,
        )  # fmt: skip
    return table


def transition_rows(
    law: str,
    sigma: Tensor,
    sigma_next: Tensor,
    noise_level: float | Tensor = 0.0,
    *,
    sigma_max: float | Tensor | None = None,
    noise_step: int | Tensor | None = None,
    gaussian: bool = False,
    normalizer: bool = True,
    score_quiet: bool = False,
    near_one: float = 0.0,
    kl: str = "std_dev",
) -> Transitions:
    """Makes a table of one row for each sigma pair, on the device of sigma and without reading it.

    Args:
        law: one of LAWS; its formula is at the top of this file.
        sigma, sigma_next: 0-dim or [N] floating point, falling within [0, 1].
        noise_level: a number, 0-dim or [N]: a in the formulas.
        sigma_max: a number, 0-dim or [N]: m in the formulas. Needed by flow_sde and sigma_linear.
        noise_step: an int, 0-dim or [N] int64: what counts the noise of seeds=, in [0, 2^24). None:
            floor(sigma 2^23), which differs between the steps of a schedule.
        gaussian: for cps, k = 1 / 2C^2 and its c0 in place of k = 1 (the other laws have them).
        normalizer: False leaves log C + log sqrt(2 pi) out of a Gaussian log_prob.
        score_quiet: rows without noise have k = 1, so that their log_prob is -mean[(x' - mu)^2] and
            not 0.
        near_one: how far below 1 a sigma of flow_sde still is taken for 1, in float32.
        kl: as for flow_sde.

    Returns:
        Transitions of N rows; their kind is the law, or "cps_gaussian". For inputs that make no
        step see the top of this file.
    """
    if not isinstance(law, str) or law not in LAWS:
        raise ValueError(f"law must be one of {LAWS}, got {law!r}")
    check_kl(kl)
    check_tensor("sigma", sigma)
    values = {"sigma": sigma, "sigma_next": sigma_next, "noise_level": noise_level}
    if sigma_max is None:
        if law in ("flow_sde", "sigma_linear"):
            raise ValueError(f"sigma_max must be given for {law}, got None")
        sigma_max = 0.0
    values["sigma_max"] = sigma_max
    tensors = [_on_device(name, x, sigma.device) for name, x in values.items()]
    if noise_step is not None:
        if not isinstance(noise_step, Tensor):
            noise_step = constant_on(integer("noise_step", noise_step), torch.int64, sigma.device)
        check_tensor("noise_step", noise_step)
        if noise_step.dtype != torch.int64:
            raise TypeError(f"noise_step must be int64, got {noise_step.dtype}")
        values["noise_step"] = noise_step
        checks.check_device("noise_step", noise_step, sigma.device, "sigma")
    rows = 1
    for name, x in values.items():
        if isinstance(x, Tensor) and x.ndim > 0:
            if x.ndim > 1 or (x.shape[0] != 1 and rows not in (1, x.shape[0])):
                expected = "0-dim or [N]" if rows == 1 else f"0-dim, [1] or [{rows}]"
                raise ValueError(f"{name} must be {expected}, got {list(x.shape)}")
            rows = x.shape[0] if rows == 1 else rows
    flags = (
        GAUSSIAN * (flag("gaussian", gaussian) or law != "cps")
        + NORMALIZER * flag("normalizer", normalizer)
        + SCORE_QUIET * flag("score_quiet", score_quiet)
        + KL_GAUSSIAN * (kl == "gaussian")
    )
    near_one = float32(finite("near_one", near_one))
    table = transition_rows_op(*tensors, noise_step, rows, LAWS.index(law), flags, near_one)
    _check_rows(law, table, tensors)
    kind = "cps_gaussian" if law == "cps" and gaussian else law
    return Transitions(table, None, (kind,) * rows, torch.arange(rows, device=table.device))


def float32(value: float) -> float:
    """Rounds a number to float32: the type in which kernels take numbers."""
    return struct.unpack("f", struct.pack("f", value))[0]


def _on_device(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """Checks a number or floating-point tensor; a number becomes a tensor on the device."""
    if not isinstance(value, Tensor):
        return constant_on(number(name, value), torch.float64, device)
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    checks.check_device(name, value, device, "sigma")
    return value.detach()


def constant_on(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Returns a 0-dim tensor that holds a number; made once for each device."""
    if torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        # What a capture allocates belongs to its graph.
        return torch.full((), value, dtype=dtype, device=device)
    return _kept_constant(value, dtype, device)


@functools.lru_cache(maxsize=256)
def _kept_constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.full((), value, dtype=dtype, device=device)


def _check_rows(law: str, table: Tensor, inputs: list[Tensor]) -> None:
    """Raises where the host can read the rows without a wait and one of them is NaN."""
    if torch.compiler.is_compiling() or not readable(table):
        return
    if table.device.type != "cpu" and not (checks.DEBUG and table.device.type == "cuda"):
        return
    for row, value in enumerate(table[:, 0].tolist()):
        if value == value:
            continue
        s, p, a, m = (x.reshape(-1).expand(len(table))[row].item() for x in inputs)
        if not (p >= 0.0 and s <= 1.0):
            raise ValueError(
                f"sigma and sigma_next must be inside [0, 1], got {s:g} and {p:g} in row {row}; "
                "divide timesteps by 1000 first"
            )
        if not s > p:
            raise ValueError(
                f"sigma_next must be below sigma, from noise (1) to data (0), got sigma {s:g} and "
                f"sigma_next {p:g} in row {row}"
            )
        if not 0.0 <= a <= (2.0 if law == "cps" else LARGEST):
            bound = "in [0, 2]" if law == "cps" else "finite and >= 0"
            raise ValueError(f"noise_level of {law} must be {bound}, got {a:g} in row {row}")
        raise ValueError(
            f"sigma {s:.9g}, sigma_next {p:.9g}, noise_level {a:.9g} and sigma_max {m:.9g} of row "
            f"{row} give no {law} coefficients within float32"
        )
