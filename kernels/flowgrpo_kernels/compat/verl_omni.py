"""Drop-in for verl-omni's `FlowMatchSDEDiscreteScheduler.sample_previous_step`.

    from flowgrpo_kernels.compat import verl_omni

    verl_omni.patch(FlowMatchSDEDiscreteScheduler)

of verl_omni.pipelines.schedulers (or its module): its `step` calls the method, so that one patch
serves rollout and training. Same arguments, same results, noise from the same torch generator. What
differs:

1. x' is rounded to the dtype of `sample` before it is scored. theirs takes float32 alone, where
   there is no difference; its `step` casts x' afterwards, so that what 16-bit trainers store is not
   what was scored: storage=torch.bfloat16 ends that.
2. A step without noise (noise_level 0, the last step of "cps") has log_prob 0 and no gradient.
   theirs returns NaN, or minus the squared error for "cps".
3. No host synchronisation: timesteps on a GPU are compared with the scheduler's there. A timestep
   that the scheduler does not have raises on the CPU and gives a row of NaN on a GPU, as do noise
   levels that are NaN (FLOWGRPO_DEBUG=1 raises).
4. The coefficients are computed in float64 and rounded once, the rest in float32, also for a 16-bit
   model_output; results agree to float32 rounding.
5. `sample` and `prev_sample` are constants for the gradient; one that requires a gradient raises.

std_dev_t is theirs: S for "sde" and "cps", and eta sqrt(-dt) for "dance_sde", which verl-omni's
Guard, DPPO and KL multiply by sqrt(-dt) once more. seeds= draws the noise from the samples' seeds.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..arguments import flag, number
from ..transition_rows import transition_rows
from .patch import Patch, owners, replacement
from .steps import draw, latents, score, storage_dtype, take_step
from .tables import cached, column, find_step, pair_at, per_row, rows_at, schedule, second

LAWS = {"sde": "flow_sde", "cps": "cps", "dance_sde": "dance_sde"}
CLASS = "FlowMatchSDEDiscreteScheduler"


def sample_previous_step(
    self,
    sample: Tensor,
    model_output: Tensor,
    timestep: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    per_token_timesteps: Tensor | None = None,
    noise_level: float | Tensor = 0.7,
    prev_sample: Tensor | None = None,
    sde_type: str = "sde",
    return_logprobs: bool = True,
    return_sqrt_dt: bool = False,
    include_logprob_normalizer: bool = True,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor | None, ...]:
    """Steps to (prev_sample, log_prob [B] or None, mean, std_dev_t[, sqrt_dt [B]]); all float32.

    Args:
        self: their scheduler after set_timesteps.
        timestep: [B], [1] or 0-dim, of self.timesteps. None: the step self.step_index; then
            std_dev_t is 0-dim, else [N, 1, ...].
        noise_level: a number, or a tensor of 1 or B values of any shape.
        include_logprob_normalizer: False leaves log C + log sqrt(2 pi) out of a Gaussian log_prob.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
        storage: the dtype that x' will be stored in; None: that of sample.
    """
    if not isinstance(sde_type, str) or sde_type not in LAWS:
        raise ValueError(f"sde_type must be one of {tuple(LAWS)}, got {sde_type!r}")
    if per_token_timesteps is not None:
        raise NotImplementedError("per_token_timesteps must be None, as in verl-omni")
    sample, model_output, prev_sample = latents(
        "prev_sample", sample=sample, model_output=model_output, prev_sample=prev_sample
    )
    normalizer = flag("include_logprob_normalizer", include_logprob_normalizer)
    return_logprobs = flag("return_logprobs", return_logprobs)
    return_sqrt_dt = flag("return_sqrt_dt", return_sqrt_dt)
    batch, device, law = sample.shape[0], sample.device, LAWS[sde_type]
    if timestep is None:
        index = self.step_index
        if index is None:
            raise ValueError("timestep must be given before the scheduler has a step_index")
    else:
        index = find_step(timestep, self.timesteps, batch, device)
    sigmas = self.sigmas
    if not isinstance(noise_level, Tensor):
        level = number("noise_level", noise_level)
        table = cached(
            sigmas, (law, level, normalizer, device),
            lambda: schedule(sigmas, law, level, device, normalizer=normalizer),
        )  # fmt: skip
        step, rows = rows_at(table, index, batch)
        table = table.table
    else:
        noise_level = per_row("noise_level", noise_level, device)
        if noise_level.numel() not in (1, batch):
            raise ValueError(
                f"noise_level must hold 1 or {batch} values, got {list(noise_level.shape)}"
            )
        transitions = transition_rows(
            law, *pair_at(sigmas, index, device), noise_level,
            sigma_max=second(sigmas, device), noise_step=index, normalizer=normalizer,
        )  # fmt: skip
        table = rows = transitions.table
        step = transitions.row_numbers.expand(batch)
    if prev_sample is None:
        noise = None
        if seeds is None:
            dtype = model_output.dtype
            noise = draw(model_output, generator, dtype)
        result = take_step(
            model_output, sample, table, step,
            seeds=seeds, noise=noise, storage=storage_dtype(storage),
        )  # fmt: skip
    else:
        result = score(model_output, sample, prev_sample, table, step)
    std_dev = column(rows, "C" if law == "dance_sde" else "std_dev", sample.ndim)
    if timestep is None and rows.shape[0] == 1:
        std_dev = std_dev.reshape(())
    log_prob = result.log_prob if return_logprobs else None
    values = (result.prev_sample.float(), log_prob, result.mean, std_dev)
    if not return_sqrt_dt:
        return values
    return (*values, torch.sqrt(column(rows, "abs_dt", 1)).expand(batch).contiguous())


def patch(*schedulers: type | ModuleType, **options) -> Patch:
    """Replaces sample_previous_step in verl-omni's scheduler; a context manager with revert().

    schedulers: the class, or a module that has it. ValueError for others.

    options: seeds, storage, fixed for every call.
    """
    name = "sample_previous_step"
    entries = []
    for owner in owners(schedulers, name):
        scheduler = getattr(owner, CLASS, None) if isinstance(owner, ModuleType) else owner
        if not isinstance(scheduler, type):
            raise ValueError(f"{getattr(owner, '__name__', owner)} must be, or have, {CLASS}")
        entries.append(
            (scheduler, name, replacement(scheduler, name, sample_previous_step, options))
        )
    return Patch(entries)
