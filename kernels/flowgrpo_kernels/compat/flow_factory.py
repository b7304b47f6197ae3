"""Drop-in for Flow-Factory's SDE schedulers: the method `step` of both.

    from flowgrpo_kernels.compat import flow_factory

    flow_factory.patch(FlowMatchEulerDiscreteSDEScheduler, UniPCMultistepSDEScheduler)

of flow_factory.scheduler (or their modules), before the training. Same arguments, same results,
noise from the same torch generator. What differs:

1. A step without noise (a noise level of 0, the last step of CPS) has log_prob 0 and no gradient.
   theirs returns NaN, or minus the squared error for CPS.
2. No host synchronisation: timesteps on a GPU are compared with the scheduler's there, also where
   the noise level is inferred, which theirs does by sigma. A timestep that the scheduler does not
   have raises on the CPU and gives a row of NaN on a GPU, as do sigma pairs that do not fall and
   noise levels that are NaN (FLOWGRPO_DEBUG=1 raises).
3. The coefficients are computed in float64 and rounded once; results agree to float32 rounding.
4. `latents` and `next_latents` are constants for the gradient; one that requires a gradient raises.
   next_latents_mean comes from the same pass, differentiable in noise_pred.
5. UniPC's schedule begins at sigma 0.9998, not 1, so that S of its first step is far beyond the
   others'; as in theirs.

UniPC in evaluation mode is their own step. seeds= draws the noise from the samples' own seeds.
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..arguments import flag, number
from ..transitions import Transitions
from .patch import Patch, owners, replacement
from .steps import draw, score, take_step
from .steps import latents as checked
from .tables import (
    cached,
    column,
    find_step,
    pair_at,
    per_row,
    rows_at,
    rows_of_pairs,
    schedule,
    second,
)

log = logging.getLogger("flowgrpo_kernels")

LAWS = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance_sde", "CPS": "cps", "ODE": "ode"}
CLASSES = ("FlowMatchEulerDiscreteSDEScheduler", "UniPCMultistepSDEScheduler")
_FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")
_TUPLES = {
    "UniPCMultistepSDEScheduler": (
        "next_latents", "log_prob", "next_latents_mean", "std_dev_t", "dt",
    ),
}  # fmt: skip
_TUPLE = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")


@dataclass
class StepOutput:
    """Results of a step of a scheduler whose module has no SDESchedulerOutput."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None


def step(
    self,
    noise_pred: Tensor,
    timestep: float | Tensor,
    latents: Tensor,
    next_latents: Tensor | None = None,
    timestep_next: float | Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    noise_level: float | Tensor | None = None,
    compute_log_prob: bool = True,
    return_dict: bool = True,
    return_kwargs: Sequence[str] = _FIELDS,
    dynamics_type: str | None = None,
    sigma_max: float | Tensor | None = None,
    *,
    seeds: Tensor | None = None,
):
    """Steps to their SDESchedulerOutput of return_kwargs, or their tuple; all float32.

    Args:
        self: one of their two schedulers after set_timesteps.
        timestep: one of self.timesteps, or with timestep_next 1000 sigma: a number, 0-dim or [B].
        noise_level: a number, 0-dim or [B]. None: self.noise_level at the scheduler's SDE steps,
            elsewhere 0.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
    """
    latents, noise_pred, next_latents = checked(
        "next_latents", latents=latents, noise_pred=noise_pred, next_latents=next_latents
    )
    kind = self.dynamics_type if dynamics_type is None else dynamics_type
    if not isinstance(kind, str) or kind not in LAWS:
        raise ValueError(f"dynamics_type must be one of {tuple(LAWS)}, got {kind!r}")
    compute_log_prob = flag("compute_log_prob", compute_log_prob)
    if self.is_eval or kind == "ODE":
        noise_level = 0.0
    table, rows, index = _rows(self, kind, timestep, timestep_next, noise_level, sigma_max, latents)
    if next_latents is not None:
        result = score(noise_pred, latents, next_latents, table, index)
    else:
        quiet = kind == "ODE"
        noise = None if quiet or seeds is not None else draw(noise_pred, generator)
        result = take_step(
            noise_pred, latents, table, index, seeds=None if quiet else seeds, noise=noise,
            storage=torch.float32 if quiet else None,
        )  # fmt: skip
    batch = latents.shape[0]
    std_dev, abs_dt = (column(rows, name, latents.ndim) for name in ("std_dev", "abs_dt"))
    if rows.shape[0] != batch:
        std_dev, abs_dt = (x.expand(batch, *x.shape[1:]) for x in (std_dev, abs_dt))
    values = {
        "next_latents": result.prev_sample.float(),
        "next_latents_mean": result.mean,
        "std_dev_t": std_dev,
        "dt": -abs_dt,
        "log_prob": result.log_prob if compute_log_prob else None,
        "noise_pred": noise_pred.float(),
    }
    if not return_dict:
        names = next((_TUPLES[n] for n in _class_names(type(self)) if n in _TUPLES), _TUPLE)
        return tuple(values[name] for name in names)
    unknown = [name for name in return_kwargs if name not in values]
    for name in unknown:
        log.warning("step has no result named %r, asked for in return_kwargs", name)
    return _output_class(type(self))(**{n: values[n] for n in return_kwargs if n in values})


def patch(*schedulers: type | ModuleType, **options) -> Patch:
    """Replaces step in Flow-Factory's schedulers; a context manager with revert().

    schedulers: the classes, or modules that have them. ValueError for others.

    options: seeds, fixed for every call.
    """
    classes: list[type] = []
    for owner in owners(schedulers, "step"):
        candidates = [owner] if isinstance(owner, type) else []
        if isinstance(owner, ModuleType):
            candidates = [c for n in CLASSES if isinstance(c := getattr(owner, n, None), type)]
        if not candidates or not any(n in CLASSES for c in candidates for n in _class_names(c)):
            name = getattr(owner, "__name__", owner)
            raise ValueError(f"{name} must be, or have, one of {CLASSES} of Flow-Factory")
        classes += [c for c in candidates if c not in classes]
    return Patch((c, "step", _method(c, options)) for c in classes)


def _method(owner: type, options: dict[str, Any]):
    ours, theirs = replacement(owner, "step", step, options), owner.step
    if "UniPCMultistepSDEScheduler" not in _class_names(owner):
        return ours

    @functools.wraps(step)
    def in_training(self, *args, **kwargs):
        return (theirs if self.is_eval else ours)(self, *args, **kwargs)

    return in_training


@functools.cache
def _class_names(scheduler: type) -> tuple[str, ...]:
    return tuple(c.__name__ for c in scheduler.__mro__)


@functools.cache
def _output_class(scheduler: type) -> type:
    """Finds their class of results in the scheduler's module."""
    for owner in scheduler.__mro__:
        module = sys.modules.get(owner.__module__)
        prefix = owner.__name__.removesuffix("Scheduler")
        for name in (f"{prefix}SchedulerOutput", "SDESchedulerOutput"):
            if isinstance(result_class := getattr(module, name, None), type):
                return result_class
    return StepOutput


def _rows(
    self, kind: str, timestep, timestep_next, noise_level, sigma_max, latents: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(table, rows [N, 10], step int64 [B]) of the call."""
    batch, device, law = latents.shape[0], latents.device, LAWS[kind]
    level_a_row = isinstance(noise_level, Tensor)
    if not level_a_row and noise_level is not None:
        noise_level = number("noise_level", noise_level)
    step = None
    if timestep_next is None or noise_level is None:
        if type(timestep) is int or _is_integer(timestep):
            # Theirs takes an integer for the number of the step.
            step = int(timestep)
            if not 0 <= step < len(self.timesteps):
                raise ValueError(
                    f"timestep must be in [0, {len(self.timesteps) - 1}] as the number of a step, "
                    f"got {step}"
                )
        else:
            step = find_step(timestep, self.timesteps, batch, device)
    number_max = None
    if not isinstance(sigma_max, Tensor) and sigma_max is not None:
        number_max = number("sigma_max", sigma_max)
    if timestep_next is None and not level_a_row and not isinstance(sigma_max, Tensor):
        levels = noise_level if noise_level is not None else _levels(self)
        key = (law, levels if isinstance(levels, float) else tuple(levels), number_max, device)

        def make() -> Transitions:
            level = levels if isinstance(levels, float) else torch.tensor(levels)
            more = {} if not number_max else {"sigma_max": number_max}
            return schedule(self.sigmas, law, level, device, **more)

        table = cached(self.sigmas, key, make)
        index, rows = rows_at(table, step, batch)
        return table.table, rows, index

    if timestep_next is None:
        sigma, sigma_next = pair_at(self.sigmas, step, device)
    else:
        sigma, sigma_next = (
            _sigma("timestep", timestep, device),
            _sigma("timestep_next", timestep_next, device),
        )
    if noise_level is None:
        known = (*_levels(self), float("nan"))
        key = ("levels", known[:-1], device)
        levels = cached(self.sigmas, key, lambda: torch.tensor(known, device=device))
        noise_level = levels[step] if isinstance(step, int) else levels.index_select(0, step)
    elif level_a_row:
        noise_level = per_row("noise_level", noise_level, device)
    if isinstance(sigma_max, Tensor):
        sigma_max = per_row("sigma_max", sigma_max, device)
    else:
        sigma_max = number_max or second(self.sigmas, device)
    table, index = rows_of_pairs(
        "timestep and noise_level", law, sigma, sigma_next, noise_level, sigma_max, batch
    )
    return table, table.index_select(0, index), index


def _is_integer(timestep) -> bool:
    return (
        isinstance(timestep, Tensor)
        and timestep.dtype in (torch.int32, torch.int64)
        and timestep.device.type == "cpu"
        and timestep.numel() == 1
    )


def _sigma(name: str, timestep: float | Tensor, device: torch.device) -> Tensor:
    """timestep / 1000 as a tensor on the device."""
    if not isinstance(timestep, Tensor):
        return torch.full((), number(name, timestep) / 1000, dtype=torch.float32, device=device)
    return per_row(name, timestep, device) / 1000


def _levels(self) -> list[float]:
    """Noise level of each step: the scheduler's at its current SDE steps, elsewhere 0."""
    levels = [0.0] * len(self.timesteps)
    for i in self.current_sde_steps.tolist():
        levels[i] = float(self.noise_level)
    return levels
