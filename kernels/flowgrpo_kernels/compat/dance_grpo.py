"""Drop-in for DanceGRPO's `flux_step` (fastvideo/train_grpo_flux.py).

    from flowgrpo_kernels.compat.dance_grpo import flux_step

or `with patch(train_grpo_flux): ...`. Same arguments, same return tuple. What differs:

1. x' is rounded to the dtype of `latents`, or to `storage`, before it is scored (no difference for
   float32 latents, which is what DanceGRPO feeds).
2. Arithmetic is float32 throughout. theirs multiplies a bfloat16 model_output in bfloat16.
3. eta = 0 gives log_prob 0 and no gradient; theirs fails in the logarithm of 0.
4. No host synchronisation: the table for `sigmas` is made once, by reading them, and kept with the
   tensor.
5. `latents` and `prev_sample` are constants for the gradient; one that requires a gradient raises.
6. pred_original and the mean come from the same pass, differentiable in model_output.

seeds= draws the noise from the samples' own seeds instead of torch's global generator. There is no
switch to their 16-bit arithmetic: pass model_output.float() to theirs to compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import flag, integer, number
from ..checks import resolve_step
from ..transitions import COLUMNS, Transitions, dance_sde
from .patch import Patch, owners, replacement
from .steps import draw, score, storage_dtype, take_step
from .steps import latents as checked
from .tables import cached


def flux_step(
    model_output: Tensor,
    latents: Tensor,
    eta: float,
    sigmas: Tensor | Sequence[float],
    index: int | Tensor,
    prev_sample: Tensor | None,
    grpo: bool,
    sde_solver: bool,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Steps to (prev_sample, pred_original, log_prob [B]) with grpo, else (mean, pred_original).

    sigmas: [T + 1], 1 -> 0; a tensor, whose table is cached, or a sequence of numbers.
    index: the step, an int, or a 0-dim or [B] int64 tensor.
    sde_solver=False keeps the ODE mean and adds noise of eta sqrt(dt).
    """
    latents, model_output, prev_sample = checked(
        "prev_sample", latents=latents, model_output=model_output, prev_sample=prev_sample
    )
    eta, grpo, sde_solver = (
        number("eta", eta), flag("grpo", grpo), flag("sde_solver", sde_solver),
    )  # fmt: skip
    index = index if isinstance(index, Tensor) else integer("index", index)
    key = (eta, sde_solver, str(latents.device))
    transitions = cached(sigmas, key, lambda: _transitions(sigmas, eta, sde_solver, latents.device))
    table, step = transitions.table, resolve_step(index, transitions, latents, "index")
    if not grpo:
        # What is scored does not matter: mean and pred_original are of the same pass.
        result = score(model_output, latents, latents.detach(), table, step, with_x0=True)
        return result.mean, result.x0
    if prev_sample is None:
        noise = None if seeds is not None else draw(latents, None)
        result = take_step(
            model_output, latents, table, step,
            seeds=seeds, noise=noise, storage=storage_dtype(storage), with_x0=True,
        )  # fmt: skip
    else:
        result = score(model_output, latents, prev_sample, table, step, with_x0=True)
    return result.prev_sample, result.x0, result.log_prob


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces flux_step in modules; a context manager with revert().

    ValueError for a module whose function has other arguments.

    options: seeds, storage, fixed for every call.
    """
    name = "flux_step"
    return Patch(
        (module, name, replacement(module, name, flux_step, options))
        for module in owners(modules, name)
    )


def _transitions(sigmas: Tensor, eta: float, sde_solver: bool, device) -> Transitions:
    """Builds the table; without sde_solver the mean is that of the ODE."""
    transitions = dance_sde(sigmas, eta)
    if not sde_solver:
        transitions = as_ode_mean(transitions)
    return transitions.to(device)


def as_ode_mean(transitions: Transitions) -> Transitions:
    """Puts the ODE's mean into a table of an SDE, and leaves its noise."""
    table = transitions.table.clone()
    table[:, COLUMNS.index("A")] = 1.0
    table[:, COLUMNS.index("B")] = -transitions.column("abs_dt")
    return Transitions.from_table(table, transitions.sigmas, transitions.kinds)
