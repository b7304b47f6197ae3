"""Drop-in for Precise's `sde_step_with_logprob` (precise_sde/diffusers_patch/sde_with_logprob.py).

    from flowgrpo_kernels.compat import precise

    with precise.patch(their_pipeline, their_trainer):
        ...

Same arguments, same return tuple, noise from the same torch generator. log_prob is Gaussian for
every sde_type, cps too. What differs:

1. x' is rounded to the dtype of `sample`, or to `storage`, before it is scored (no difference for
   float32 samples).
2. A step without noise (noise_level 0, a step to sigma 0) has log_prob 0, no gradient and no noise.
   theirs draws and scores noise of 1e-6.
3. No host synchronisation: theirs looks each timestep up on the host, and computes the deviations
   of the whole schedule at each step. A timestep that the scheduler does not have raises on the CPU
   and gives a row of NaN on a GPU.
4. The coefficients are computed in float64 and rounded once; results agree to float32 rounding.
5. `sample` and `prev_sample` are constants for the gradient; one that requires a gradient raises.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..arguments import flag, number
from .patch import Patch, owners, replacement
from .steps import draw, latents, score, storage_dtype, take_step
from .tables import cached, find_step, rows_at, schedule

LAWS = {
    "flow_grpo": "flow_sde", "dance_grpo": "dance_sde", "cps": "cps", "precise": "precise",
    "dance_precise": "dance_precise",
}  # fmt: skip


def sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "flow_grpo",
    compute_log_prob: bool = True,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Steps to (prev_sample, log_prob [B] or None, prev_sample_mean); all float32.

    Args:
        self: a FlowMatchEulerDiscreteScheduler after set_timesteps.
        timestep: a number, 0-dim, [1] or [B], equal to entries of self.timesteps.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
        storage: the dtype that x' will be stored in; None: that of sample.
    """
    if not isinstance(sde_type, str) or sde_type not in LAWS:
        raise ValueError(f"sde_type must be one of {tuple(LAWS)}, got {sde_type!r}")
    sample, model_output, prev_sample = latents(
        "prev_sample", sample=sample, model_output=model_output, prev_sample=prev_sample
    )
    level, scored = number("noise_level", noise_level), flag("compute_log_prob", compute_log_prob)
    sigmas, device, law = self.sigmas, sample.device, LAWS[sde_type]
    table = cached(
        sigmas, (law, "gaussian", level, device),
        lambda: schedule(sigmas, law, level, device, gaussian=True),
    )  # fmt: skip
    index = find_step(timestep, self.timesteps, sample.shape[0], device)
    step, _ = rows_at(table, index, sample.shape[0])
    if prev_sample is None:
        noise = None if seeds is not None else draw(model_output, generator)
        result = take_step(
            model_output, sample, table.table, step,
            seeds=seeds, noise=noise, storage=storage_dtype(storage),
        )  # fmt: skip
    else:
        result = score(model_output, sample, prev_sample, table.table, step)
    return result.prev_sample.float(), result.log_prob if scored else None, result.mean


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces sde_step_with_logprob in modules; a context manager with revert().

    ValueError for a module whose function has other arguments.

    options: seeds, storage, fixed for every call.
    """
    name = "sde_step_with_logprob"
    return Patch(
        (module, name, replacement(module, name, sde_step_with_logprob, options))
        for module in owners(modules, name)
    )
