"""Transition tables: one float32 row of coefficients for every step of a sampler.

With s = sigma_i, s' = sigma_{i+1}, dt = s' - s < 0 and a = noise_level, a step of every sampler of
the Flow-GRPO family is affine and Gaussian (sigma falls from 1 at noise to 0 at data):

    mu       = A x + B v
    x'       = mu + C eps                        eps ~ N(0, I)
    log_prob = -k mean[(x' - mu)^2] - c0         mean over the D elements of a sample
    KL       = K B^2 mean[(v - v_ref)^2]

    flow_sde   S = a sqrt(s / (1 - s)), with sigma_1 for s inside 1 - s where s = 1
               A = 1 + S^2 dt / 2s    B = (1 + S^2 (1 - s) / 2s) dt    C = S sqrt(-dt)
               k = 1 / 2C^2           c0 = log C + log sqrt(2 pi)
    dance_sde  as flow_sde with S = eta, a constant
    cps        S = s' sin(a pi/2), q = sqrt(s'^2 - S^2)
               A = (1 - s') + q       B = -s (1 - s') + (1 - s) q      C = S     k = 1     c0 = 0
    ode        A = 1                  B = dt                           C = k = c0 = K = 0

Objectives of the forward process score no step of a sampler but the matching error of a sample that
was noised anew, x_s = (1 - s) x_0 + s eps. With v* = eps - x_0 as prev_sample that is a row, too:

    matching   A = 0                  B = C = K = 1                    k = weight  c0 = 0
               log_prob = -weight mean[(v - v*)^2]

Sources: flow_sde and its treatment of s = 1 follow flow_grpo's `sde_step_with_logprob` (Flow-GRPO,
arXiv 2505.05470, eq. 9), dance_sde follows DanceGRPO's `flux_step`, cps follows Flow-CPS.

K is 1 / 2S^2 for kl="std_dev", the convention of flow_grpo's code since July 2025 (no dt in it: its
beta of 0.04 is about the paper's 0.004), or 1 / 2C^2 for kl="gaussian", the KL between the two
Gaussians up to the mean over D. For cps both are the same.

Departures from flow_grpo:
1. The table is computed once, on the host, in float64, and rounded to float32.
2. A row with C = 0 (an ODE step, a noise level of 0, the last cps step) has k = c0 = K = 0: its
   log_prob, KL and gradient are 0 by definition. flow_grpo's value is NaN or a plain squared error.
   Only a table of your own, or transition_rows(score_quiet=True), scores rows without noise.
3. A first sigma within 2^-22 of 1 is 1. In float32 DanceGRPO's shift t / (1 + (shift - 1) t) gives
   1 - 2^-23, 1 - 2^-24 or 1 + 2^-23 at t = 1 for one shift in twelve (of 1.01, 1.02 .. 12). With
   such a sigma inside 1 - s, as flow_grpo has it, S would be 3000 to 4000 times a.
4. S of flow_sde has a pole at s = 1, so a schedule that begins just below 1 (0.999 of UniPC's flow
   sigmas) steps far out of the range of latents: C is 49 for 0.9999 -> 0.5. Rows with C above 5 or
   |A| above 12.5 are refused. The schedules of SD3 and FLUX (1 to 1000 steps, shifts up to 12) stay
   below 3.4 and 5.1 at a noise level of 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .arguments import check_tensor, integer, number

# Columns of the table. `abs_dt` is |dt|, `noise_step` the step number that enters the noise counter
# (an integer, exact in float32), `std_dev` is S, `sigma` is s.
COLUMNS = ("A", "B", "C", "k", "c0", "K", "abs_dt", "noise_step", "std_dev", "sigma")
NUM_COLUMNS = len(COLUMNS)
KINDS = ("flow_sde", "dance_sde", "cps", "ode", "matching")
# The noise counter holds the step in 32 bits and a float32 column carries it exactly up to 2^24.
MAX_STEPS = 1 << 24
# Latents have a standard deviation of about 1. What C = 5 comes with at s = 1 is A = 1 - 12.5.
MAX_C = 5.0
MAX_A = 12.5
# Four roundings of a float32 below 1: further from 1 no float32 schedule that means 1 begins.
ROUNDING_OF_ONE = 2.0**-22
_LOG_SQRT_2PI = 0.5 * math.log(2.0 * math.pi)


@dataclass(frozen=True, eq=False)
class Transitions:
    """Coefficients of R steps.

    table: float32 [R, 10], columns as in `COLUMNS`. sigmas: float64 [R + 1] on the CPU, or None for
    concatenated tables. kinds: the name of each row's transition: one of `KINDS`, or a name of your
    own. Names decide two things: rows of "ode" need no noise, and grpo_loss refuses Guard for rows
    of "cps" and "matching", whose k is not 1 / 2C^2.
    """

    table: Tensor
    sigmas: Tensor | None
    kinds: tuple[str, ...]
    # int64 [R], 0 .. R-1 on the table's device: an int step becomes a view of it, without a copy to
    # the device.
    row_numbers: Tensor = field(repr=False)

    @classmethod
    def from_table(cls, table: Tensor, sigmas: Tensor | None, kinds: Sequence[str]) -> Transitions:
        """Checks a table (float32 [R, 10], any device) and wraps it.

        Reads it on the host once; RuntimeError while a CUDA graph is captured.
        """
        check_tensor("table", table)
        if table.ndim != 2 or table.shape[1] != NUM_COLUMNS or table.dtype != torch.float32:
            raise ValueError(
                f"table must be float32 [R, {NUM_COLUMNS}] with columns {COLUMNS}, "
                f"got {table.dtype} {list(table.shape)}"
            )
        if not 0 < table.shape[0] <= MAX_STEPS:
            raise ValueError(f"table must have 1 to {MAX_STEPS} rows, got {table.shape[0]}")
        if not isinstance(kinds, Sequence) or not all(isinstance(kind, str) for kind in kinds):
            raise TypeError(f"kinds must be a sequence of names, got {kinds!r:.60}")
        if len(kinds) != table.shape[0] or not all(kinds):
            raise ValueError(
                f"kinds must hold a name for each of {table.shape[0]} rows, got {kinds}"
            )
        if sigmas is not None and not isinstance(sigmas, Tensor):
            raise TypeError(f"sigmas must be a tensor or None, got {type(sigmas).__name__}")
        if sigmas is not None and sigmas.shape != (table.shape[0] + 1,):
            raise ValueError(f"sigmas must be [{table.shape[0] + 1}], got {list(sigmas.shape)}")
        _check_capture("Transitions.from_table", table.device)
        # A table without memory has no values to check.
        if table.device.type != "meta" and not bool(torch.isfinite(table).all()):
            raise ValueError("table must hold finite coefficients, got NaN or infinity")
        row_numbers = torch.arange(table.shape[0], device=table.device)
        return cls(table.contiguous(), sigmas, tuple(kinds), row_numbers)

    @property
    def num_steps(self) -> int:
        """R, the number of rows."""
        return self.table.shape[0]

    @property
    def device(self) -> torch.device:
        """Device of the table."""
        return self.table.device

    @property
    def deterministic(self) -> bool:
        """Tells whether every row is an ODE step, so that no noise is needed."""
        return all(kind == "ode" for kind in self.kinds)

    def column(self, name: str) -> Tensor:
        """Returns one column of the table by name: float32 [R]."""
        if not isinstance(name, str) or name not in COLUMNS:
            raise ValueError(f"name must be one of {COLUMNS}, got {name!r}")
        return self.table[:, COLUMNS.index(name)]

    def to(self, device: torch.device | str) -> Transitions:
        """Moves the table to `device`; returns itself where that is where it is.

        Else it copies, so call it outside a loop; RuntimeError while a CUDA graph is captured.
        """
        try:
            device = torch.device(device)
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise TypeError(f"device must be a torch.device or its name: {error}") from None
        if _is_current(device, self.table.device):
            return self
        if self.table.device.type == "meta":
            raise ValueError(f"device must be meta: a table on meta has no values for {device}")
        _check_capture("Transitions.to", device, self.table.device)
        table, row_numbers = self.table.to(device), self.row_numbers.to(device)
        return Transitions(table, self.sigmas, self.kinds, row_numbers)

    @staticmethod
    def cat(*schedules: Transitions) -> Transitions:
        """Puts tables one below another: row R1 + i is step i of the second.

        The noise counter of a row stays the step within its own schedule, so a sample draws the
        same noise whichever schedule it is stepped by. With this, rows with different windows share
        a batch.
        """
        if not schedules or not all(isinstance(s, Transitions) for s in schedules):
            names = [type(s).__name__ for s in schedules]
            raise TypeError(f"schedules must be one or more Transitions, got {names}")
        devices = [str(s.device) for s in schedules]
        if len(set(devices)) > 1:
            raise ValueError(f"schedules must be on one device, got {devices}")
        _check_capture("Transitions.cat", schedules[0].device)
        table = torch.cat([s.table for s in schedules])
        kinds = [kind for s in schedules for kind in s.kinds]
        sigmas = schedules[0].sigmas if len(schedules) == 1 else None
        return Transitions.from_table(table, sigmas, kinds)


def flow_sde(sigmas, noise_level: float = 0.7, kl: str = "std_dev") -> Transitions:
    """Flow-GRPO's SDE. sigmas: T + 1 strictly descending numbers in [0, 1], sequence or tensor."""
    s = _sigmas(sigmas)
    a = _noise_level(noise_level)

    def std_dev(i: int) -> float:
        inside = s[1] if s[i] == 1.0 else s[i]
        return a * math.sqrt(s[i] / (1.0 - inside))

    return _gaussian_sde("flow_sde", s, std_dev, kl)


def dance_sde(sigmas, noise_level: float = 0.3, kl: str = "std_dev") -> Transitions:
    """DanceGRPO's SDE with a constant std_dev; noise_level is its `eta`."""
    s = _sigmas(sigmas)
    eta = _noise_level(noise_level)
    return _gaussian_sde("dance_sde", s, lambda i: eta, kl)


def cps(sigmas, noise_level: float = 0.8, kl: str = "std_dev") -> Transitions:
    """Coefficients-preserving sampling (Flow-CPS). noise_level in [0, 2]; k = 1 as in flow_grpo."""
    s = _sigmas(sigmas)
    a = _noise_level(noise_level)
    if a > 2.0:
        raise ValueError(f"noise_level of cps must be in [0, 2], got {noise_level}")
    check_kl(kl)
    rows = []
    for i in range(len(s) - 1):
        std = s[i + 1] * math.sin(a * math.pi / 2.0)
        q = s[i + 1] * abs(math.cos(a * math.pi / 2.0))
        drift_x = (1.0 - s[i + 1]) + q
        drift_v = -s[i] * (1.0 - s[i + 1]) + (1.0 - s[i]) * q
        big_k = _half_inverse_square(std) if std > 0.0 else 0.0
        rows.append(_row(drift_x, drift_v, std, 1.0, 0.0, big_k, s, i, std))
    return _build(rows, s, "cps")


def ode(sigmas) -> Transitions:
    """Euler steps of the probability-flow ODE: x' = x + dt v; log_prob, KL and gradient are 0."""
    s = _sigmas(sigmas)
    rows = [_row(1.0, s[i + 1] - s[i], 0.0, 0.0, 0.0, 0.0, s, i, 0.0) for i in range(len(s) - 1)]
    return _build(rows, s, "ode")


def matching(sigmas, weight=1.0) -> Transitions:
    """Rows that score a velocity v by its distance to a target v*, for `log_prob` and `grpo_loss`.

        log_prob = -weight mean[(v - v*)^2]        KL = mean[(v - v_ref)^2]

    prev_sample is v*: eps - x_0 for the flow-matching error of x_s = (1 - s) x_0 + s eps, or
    another velocity. Row i belongs to sigmas[i]; a sampler has no use for it.

    Args:
        sigmas: R noise levels in [0, 1] in any order, sequence or tensor.
        weight: finite and at least 0, one number or R of them.

    Returns:
        R rows, on the CPU. C is 1, for a row without noise has log_prob 0.
    """
    s = _numbers("sigmas", sigmas)
    if not all(0.0 <= x <= 1.0 for x in s):
        raise ValueError("sigmas must be inside [0, 1]; divide timesteps by 1000 first")
    weights = _numbers("weight", weight, len(s))
    if not all(w >= 0.0 for w in weights):
        raise ValueError(f"weight must be at least 0, got {min(weights)}")
    rows = [
        [0.0, 1.0, 1.0, w, 0.0, 1.0, 0.0, float(i), 0.0, x]
        for i, (x, w) in enumerate(zip(s, weights, strict=True))
    ]
    table = torch.tensor(rows, dtype=torch.float64, device="cpu").to(torch.float32)
    if not bool(torch.isfinite(table).all()):
        raise ValueError(f"weight must be within the range of float32, got {max(weights)}")
    return Transitions.from_table(table, None, ["matching"] * len(rows))


def window(inside: Transitions, outside: Transitions, steps: Iterable[int]) -> Transitions:
    """Takes rows of `inside` at `steps`, rows of `outside` elsewhere (Flow-GRPO-Fast, MixGRPO)."""
    if not isinstance(inside, Transitions) or not isinstance(outside, Transitions):
        raise TypeError("inside and outside must be Transitions")
    if inside.num_steps != outside.num_steps or inside.device != outside.device:
        raise ValueError(
            "inside and outside must have the same number of steps and device, got "
            f"{inside.num_steps} on {inside.device} and {outside.num_steps} on {outside.device}"
        )
    if inside.sigmas is None or outside.sigmas is None:
        raise ValueError("inside and outside must be single schedules, not concatenated tables")
    if not torch.equal(inside.sigmas, outside.sigmas):
        raise ValueError("inside and outside must be built from the same sigmas")
    try:
        steps = list(steps)
    # A 0-dim tensor or array counts as an Iterable.
    except TypeError:
        raise TypeError(f"steps must be integers, got {type(steps).__name__}") from None
    chosen = set()
    for step in steps:
        step = integer("steps", step)
        if not 0 <= step < inside.num_steps:
            raise ValueError(f"steps must be in [0, {inside.num_steps - 1}], got {step}")
        chosen.add(step)
    _check_capture("window", outside.device)
    table = outside.table.clone()
    rows = sorted(chosen)
    table[rows] = inside.table[rows]
    kinds = [inside.kinds[i] if i in chosen else k for i, k in enumerate(outside.kinds)]
    return Transitions.from_table(table, inside.sigmas, kinds)


def _gaussian_sde(kind: str, s: list[float], std_dev, kl: str) -> Transitions:
    check_kl(kl)
    rows = []
    for i in range(len(s) - 1):
        dt = s[i + 1] - s[i]
        std = std_dev(i)
        drift_x = 1.0 + std**2 * dt / (2.0 * s[i])
        drift_v = (1.0 + std**2 * (1.0 - s[i]) / (2.0 * s[i])) * dt
        c = std * math.sqrt(-dt)
        if c > 0.0:
            k, c0 = _half_inverse_square(c), math.log(c) + _LOG_SQRT_2PI
            big_k = _half_inverse_square(std) if kl == "std_dev" else k
        else:
            k = c0 = big_k = 0.0
        _check_bounds(kind, s, i, drift_x, c)
        rows.append(_row(drift_x, drift_v, c, k, c0, big_k, s, i, std))
    return _build(rows, s, kind)


def _check_bounds(kind: str, s: list[float], i: int, a: float, c: float) -> None:
    """Checks that step i neither adds noise nor scales latents far out of their range."""
    slack = 1.0 + 1e-6
    if c <= MAX_C * slack and abs(a) <= MAX_A * slack:
        return
    step, gap = s[i] - s[i + 1], 1.0 - s[i]
    if kind == "flow_sde" and 0.0 < gap < step:
        start = "begin at sigma = 1, as the schedules of SD3 and FLUX do, or " if i == 0 else ""
        hint = (
            f"C grows with step / (1 - sigma), here {step / gap:.3g}: {start}shorten this step or "
            "lower noise_level"
        )
    elif kind == "flow_sde":
        hint = "lower noise_level"
    else:
        hint = "lower noise_level or shorten this step"
    raise ValueError(
        f"sigmas[{i}] = {s[i]:.9g} with the next sigma {s[i + 1]:.9g} gives {kind} C = {c:.4g} and "
        f"A = {a:.4g}, beyond C <= {MAX_C:g} and |A| <= {MAX_A:g} for latents of a standard "
        f"deviation of about 1; {hint}"
    )


def _half_inverse_square(x: float) -> float:
    """Computes 1 / 2x^2 of a positive number, infinite where x^2 is 0 in float64."""
    square = x**2
    return 0.5 / square if square > 0.0 else math.inf


def _row(a, b, c, k, c0, big_k, s, i, std) -> list[float]:
    """Makes one row; a C that is 0 in float32 silences the row's log_prob and KL."""
    if float(torch.tensor(c, dtype=torch.float32, device="cpu")) == 0.0:
        c = k = c0 = big_k = 0.0
    return [a, b, c, k, c0, big_k, s[i] - s[i + 1], float(i), std, s[i]]


def _build(rows: list[list[float]], s: list[float], kind: str) -> Transitions:
    # On the host whatever torch's default device is.
    table = torch.tensor(rows, dtype=torch.float64, device="cpu").to(torch.float32)
    if not bool(torch.isfinite(table).all()):
        raise ValueError(
            f"{kind} has coefficients beyond float32 for these sigmas and noise_level; "
            "use larger steps between sigmas or another noise_level"
        )
    sigmas = torch.tensor(s, dtype=torch.float64, device="cpu")
    return Transitions.from_table(table, sigmas, [kind] * len(rows))


def _sigmas(sigmas) -> list[float]:
    if isinstance(sigmas, Tensor):
        check_tensor("sigmas", sigmas)
        sigmas = sigmas.detach()
        if sigmas.is_complex():
            raise TypeError(f"sigmas must be real numbers, got {sigmas.dtype}")
        if sigmas.device.type == "meta":
            raise ValueError("sigmas must hold values, got a tensor on meta")
    try:
        values = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"sigmas must be a tensor or a sequence of numbers, got {type(sigmas).__name__}"
        ) from error
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(f"sigmas must be [T + 1] with T >= 1, got shape {list(values.shape)}")
    if values.numel() - 1 > MAX_STEPS:
        raise ValueError(f"sigmas must have at most {MAX_STEPS} steps, got {values.numel() - 1}")
    result = values.tolist()
    if abs(result[0] - 1.0) <= ROUNDING_OF_ONE:
        result[0] = 1.0
    if not all(math.isfinite(x) and 0.0 <= x <= 1.0 for x in result):
        raise ValueError("sigmas must be finite and inside [0, 1]; divide timesteps by 1000 first")
    if not all(x > y for x, y in pairwise(result)):
        raise ValueError("sigmas must be strictly descending, from noise (1) to data (0)")
    return result


def _numbers(name: str, values, count: int | None = None) -> list[float]:
    """Lists finite numbers: of a sequence or tensor [R] or, with `count`, of one number as well."""
    if isinstance(values, Tensor):
        check_tensor(name, values)
        values = values.detach()
        if values.is_complex():
            raise TypeError(f"{name} must be real numbers, got {values.dtype}")
        if values.device.type == "meta":
            raise ValueError(f"{name} must hold values, got a tensor on meta")
    try:
        numbers = torch.as_tensor(values, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers, got {type(values).__name__}") from error
    if count is not None and numbers.ndim == 0:
        numbers = numbers.expand(count)
    if numbers.ndim != 1 or not 0 < numbers.numel() <= MAX_STEPS:
        raise ValueError(
            f"{name} must be [R] with 1 <= R <= {MAX_STEPS}, got {list(numbers.shape)}"
        )
    if count not in (None, numbers.numel()):
        raise ValueError(f"{name} must be one number or {count}, got {numbers.numel()}")
    if not bool(torch.isfinite(numbers).all()):
        raise ValueError(f"{name} must be finite")
    return numbers.tolist()


def _noise_level(noise_level: float) -> float:
    value = number("noise_level", noise_level)
    if not math.isfinite(value) or value < 0.0:
        raise ValueError(f"noise_level must be finite and >= 0, got {noise_level}")
    return value


def _is_current(target: torch.device, device: torch.device) -> bool:
    """Tells whether a device, maybe without an index as "cuda" is, is one that a tensor is on."""
    if target.type != device.type:
        return False
    if target.index == device.index or device.type in ("cpu", "meta"):
        return True
    if target.index is not None:
        return False
    return torch.get_device_module(device).current_device() == device.index


def _check_capture(action: str, *devices: torch.device) -> None:
    """Checks that the host may wait for the devices: not while a CUDA graph is captured."""
    # Where nothing has used a GPU, nothing is captured; builds without CUDA cannot be asked.
    if not torch.cuda.is_initialized() or all(device.type != "cuda" for device in devices):
        return
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{action} waits for the GPU, which ends the capture of a CUDA graph: make the "
            "transitions before the capture"
        )


def check_kl(kl: str) -> None:
    """Checks the name of a convention of K."""
    if not isinstance(kl, str) or kl not in ("std_dev", "gaussian"):
        raise ValueError(f"kl must be 'std_dev' or 'gaussian', got {kl!r}")
