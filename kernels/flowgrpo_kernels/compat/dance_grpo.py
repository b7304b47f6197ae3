"""Drop-in for DanceGRPO's `flux_step` (fastvideo/train_grpo_flux.py).

    from flowgrpo_kernels.compat.dance_grpo import flux_step

or `with patch(train_grpo_flux): ...`. Same arguments, same return tuple. What differs:

1. x' is rounded to the dtype of `latents` before it is scored (no difference for float32 latents,
   which is what DanceGRPO feeds).
2. Arithmetic is float32 throughout. theirs multiplies a bfloat16 model_output in bfloat16.
3. eta = 0 gives log_prob 0 and no gradient; theirs fails in the logarithm of 0.
4. No host synchronisation: the table for `sigmas` is made once and kept with the tensor.
5. `latents` and `prev_sample` are constants for the gradient of log_prob; one that requires a
   gradient raises.

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
from ..log_prob import log_prob as score
from ..sde_step import sde_step
from ..transitions import COLUMNS, Transitions, dance_sde
from .patch import Patch
from .tables import cached, rows
from .tables import latents as checked


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
    a, b, sigma = _coefficients(index, transitions, latents)
    pred_original = latents.float() - sigma * model_output.float()
    if not grpo:
        return a * latents.float() + b * model_output.float(), pred_original
    if prev_sample is None:
        noise = None if seeds is not None else torch.randn_like(latents, dtype=torch.float32)
        with torch.no_grad():
            prev_sample, log_prob = sde_step(
                model_output, latents, transitions, index, seeds=seeds, noise=noise
            )
        if not (torch.is_grad_enabled() and model_output.requires_grad):
            return prev_sample, pred_original, log_prob
    log_prob = score(model_output, latents, prev_sample, transitions, index)
    return prev_sample, pred_original, log_prob


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces flux_step in modules; a context manager with revert()."""
    return Patch("flux_step", flux_step, modules, options)


def _coefficients(index: int | Tensor, transitions: Transitions, latents: Tensor) -> list[Tensor]:
    """Gathers A, B and sigma, each [N, 1, ...], N = 1 for one step."""
    step = resolve_step(index, transitions, latents, "index")
    if isinstance(index, Tensor):
        # Not table[index], which reads a 0-dim index on the host.
        table = rows(transitions.table, step[:1] if index.ndim == 0 else step)
    else:
        table = transitions.table[index : index + 1]
    table = table.view(-1, len(COLUMNS), *[1] * (latents.ndim - 1))
    return [table[:, COLUMNS.index(name)] for name in ("A", "B", "sigma")]


def _transitions(sigmas: Tensor, eta: float, sde_solver: bool, device) -> Transitions:
    """Builds the table; without sde_solver the mean is that of the ODE."""
    transitions = dance_sde(sigmas, eta)
    if not sde_solver:
        table = transitions.table.clone()
        table[:, COLUMNS.index("A")] = 1.0
        table[:, COLUMNS.index("B")] = -transitions.column("abs_dt")
        transitions = Transitions.from_table(table, transitions.sigmas, transitions.kinds)
    return transitions.to(device)
