"""Drop-in for MixGRPO's `flow_grpo_step` and `dance_grpo_step` (fastvideo/utils/sampling_utils.py).

    from flowgrpo_kernels.compat import mixgrpo

    with mixgrpo.patch(sampling_utils, train_script):     # every module that imported them
        ...

Same arguments, same return tuples, noise from the same torch generator and in the same dtype. What
differs:

1. x' is rounded to the dtype of `latents`, or to `storage`, before it is scored (no difference for
   float32 latents, which is what MixGRPO feeds).
2. Arithmetic is float32 throughout. theirs multiplies a bfloat16 model_output in bfloat16.
3. No host synchronisation: theirs reads sigmas[1] at each step; here the table for `sigmas` is made
   once, by reading them, and kept with the tensor.
4. A step without noise has log_prob 0 and no gradient. theirs is NaN for "sde".
5. `latents` and `prev_sample` are constants for the gradient; one that requires a gradient raises.
   pred_original and the mean come from the same pass, differentiable in model_output.
6. What determistic returns as x' has no gradient; theirs has the ODE step's.

As in theirs, dance_grpo_step's log_prob has no constants (its line that adds them has no effect),
and determistic takes the ODE step of this model_output even in a replay, and scores it under the
SDE. seeds= draws the noise from the samples' own seeds. Their dpm_step is left as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import flag, integer, number
from ..checks import resolve_step
from ..transitions import COLUMNS, Transitions, cps, dance_sde, flow_sde, ode
from .dance_grpo import as_ode_mean
from .patch import Patch, owners, replacement
from .steps import draw, score, storage_dtype, take_step
from .steps import latents as checked
from .tables import cached, column

NAMES = ("flow_grpo_step", "dance_grpo_step")
_TYPES = ("sde", "cps")
# What theirs takes for "cps" without a noise_level.
_CPS_LEVEL = 0.8


def flow_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor | Sequence[float],
    index: int | Tensor,
    prev_sample: Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    determistic: bool = False,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Steps to (prev_sample, pred_original, log_prob [B], mean, standard deviation of x').

    sigmas: [T + 1], 1 -> 0; a tensor, whose table is cached, or a sequence of numbers.
    index: the step, an int, or a 0-dim or [B] int64 tensor. The standard deviation is 0-dim for one
    step, else [B, 1, ...].
    """
    latents, model_output, prev_sample = checked(
        "prev_sample", latents=latents, model_output=model_output, prev_sample=prev_sample
    )
    determistic, level = flag("determistic", determistic), _level(sde_type, eta, noise_level)
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample were both given; give one of them")
    make = flow_sde if sde_type == "sde" else cps
    table, step, one = _table(
        sigmas, index, latents, (sde_type, level), lambda: make(sigmas, level)
    )
    storage = storage_dtype(storage)
    if determistic:
        quiet, _, _ = _table(sigmas, index, latents, ("ode",), lambda: ode(sigmas))
        with torch.no_grad():
            prev_sample = take_step(
                model_output.detach(), latents, quiet, step, storage=storage
            ).prev_sample
    if prev_sample is None:
        noise = None if seeds is not None else draw(model_output, generator, model_output.dtype)
        result = take_step(
            model_output, latents, table, step, seeds=seeds, noise=noise, storage=storage,
            with_x0=True,
        )  # fmt: skip
    else:
        result = score(model_output, latents, prev_sample, table, step, with_x0=True)
    if one is not None:
        spread = table[one, COLUMNS.index("C")].clone()
    else:
        spread = column(table.index_select(0, step), "C", latents.ndim)
    return result.prev_sample, result.x0, result.log_prob, result.mean, spread


def dance_grpo_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor | Sequence[float],
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    sde_type: str = "sde",
    noise_level: float | None = None,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Steps to (prev_sample, pred_original, log_prob [B]) with grpo, else (mean, pred_original).

    sigmas, index: as for flow_grpo_step. sde_solver=False takes the mean for x', and for "sde" the
    ODE's mean.
    """
    latents, model_output, prev_sample = checked(
        "prev_sample", latents=latents, model_output=model_output, prev_sample=prev_sample
    )
    grpo, sde_solver = flag("grpo", grpo), flag("sde_solver", sde_solver)
    level = _level(sde_type, eta, noise_level)
    table, step, _ = _table(
        sigmas, index, latents, ("dance", sde_type, level, sde_solver),
        lambda: cps(sigmas, level) if sde_type == "cps" else _dance(sigmas, level, sde_solver),
    )  # fmt: skip
    if not grpo:
        result = score(model_output, latents, latents.detach(), table, step, with_x0=True)
        return result.mean, result.x0
    if prev_sample is None:
        noise = draw(latents, None) if sde_solver and seeds is None else None
        result = take_step(
            model_output, latents, table, step, seeds=seeds if sde_solver else None, noise=noise,
            storage=storage_dtype(storage), with_x0=True,
        )  # fmt: skip
    else:
        result = score(model_output, latents, prev_sample, table, step, with_x0=True)
    return result.prev_sample, result.x0, result.log_prob


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces both functions in modules that have one of them; a context manager with revert().

    ValueError for a module that has neither, or one with other arguments.

    options: seeds, storage, fixed for every call.
    """
    ours = {"flow_grpo_step": flow_grpo_step, "dance_grpo_step": dance_grpo_step}
    entries = []
    for module in owners(modules, " and ".join(NAMES)):
        names = [name for name in NAMES if callable(getattr(module, name, None))]
        if not names:
            raise ValueError(f"{getattr(module, '__name__', module)} has none of {NAMES}")
        entries += [
            (module, name, replacement(module, name, ours[name], options)) for name in names
        ]
    return Patch(entries)


def _level(sde_type: str, eta: float, noise_level: float | None) -> float:
    """Checks the type of SDE and returns the noise level that theirs would take."""
    if not isinstance(sde_type, str) or sde_type not in _TYPES:
        raise ValueError(f"sde_type must be one of {_TYPES}, got {sde_type!r}")
    eta = number("eta", eta)
    if noise_level is not None:
        return number("noise_level", noise_level)
    return eta if sde_type == "sde" else _CPS_LEVEL


def _table(sigmas, index, latents: Tensor, key: tuple, make) -> tuple[Tensor, Tensor, int | None]:
    """(table, step int64 [B], the step where it is an int) of the call."""
    device = latents.device
    transitions = cached(sigmas, (*key, device), lambda: make().to(device))
    if isinstance(index, Tensor):
        step = resolve_step(index, transitions, latents, "index")
        return transitions.table, step, None
    index = integer("index", index)
    return transitions.table, resolve_step(index, transitions, latents, "index"), index


def _dance(sigmas, level: float, sde_solver: bool) -> Transitions:
    """dance_sde without the constants of log_prob; without sde_solver its mean is the ODE's."""
    transitions = dance_sde(sigmas, level)
    table = transitions.table.clone()
    table[:, COLUMNS.index("c0")] = 0.0
    transitions = Transitions.from_table(table, transitions.sigmas, transitions.kinds)
    return transitions if sde_solver else as_ode_mean(transitions)
