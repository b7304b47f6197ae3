"""Drop-in for flow_grpo's `sde_step_with_logprob` (diffusers_patch/sd3_sde_with_logprob.py).

    from flowgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

or, without touching their files, in every module that imported theirs:

    with patch(sd3_pipeline_with_logprob, train_script):
        ...

`patch` also replaces `ode_step_with_logprob` where a module has it, and in flow_grpo's Wan pipeline
the function of the same name with other arguments, by `wan_step_with_logprob`. Same arguments, same
return tuple, noise from the same torch generator. What differs:

1. x' is rounded to the dtype of `sample`, or to `storage`, before it is scored, so the log_prob of
   a latent stored in bfloat16 or float16 is the one that a replay computes. theirs scores the
   unrounded float32 x'. With float32 samples there is no difference. flow_grpo's FLUX, Kontext and
   Qwen pipelines hand over float32 and cast x' afterwards: there it takes storage=torch.bfloat16.
   The returned tensor is float32, as theirs.
2. A step without noise (noise_level 0, the last step of "cps") has log_prob 0 and no gradient.
   theirs returns NaN for "sde" and minus the squared error for "cps".
3. No host synchronisation: timesteps on a GPU are compared with the scheduler's there. A timestep
   that the scheduler does not have raises on the CPU and gives a row of NaN on a GPU.
4. The coefficients are computed in float64 and rounded once, at the first step of a schedule, which
   reads its sigmas then; results agree to float32 rounding.
5. `sample` and `prev_sample` are constants for the gradient; one that requires a gradient raises.
6. prev_sample_mean comes from the same pass, differentiable in model_output.

peer_log_prob=True computes log_prob by their expression instead (differences 1, 2 and 5 are gone,
and with them the bitwise ratio of 1 for 16-bit storage).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import flag, number
from ..transitions import Transitions, cps, flow_sde
from .patch import Patch, differs, owners, replacement
from .steps import Step, draw, latents, score, storage_dtype, take_step
from .tables import cached, column, find_step, rows_at, schedule, with_poison

_KINDS = {"sde": flow_sde, "cps": cps}
_TYPES = (*_KINDS, "precise")
# std_dev_t of "precise" is at least that.
_LEAST_STD_DEV = 1e-6


def sde_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
    peer_log_prob: bool = False,
) -> tuple[Tensor, ...]:
    """Steps to (prev_sample, log_prob [B], prev_sample_mean, std_dev_t [N, 1, ...][, sqrt_dt]).

    All are float32; N is the number of timesteps.

    Args:
        self: a FlowMatchEulerDiscreteScheduler after set_timesteps.
        timestep: a number, 0-dim, [1] or [B], equal to entries of self.timesteps.
        sde_type: "sde", "cps", or "precise", whose log_prob is Gaussian.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
        storage: the dtype that x' will be stored in; None: that of sample.
    """
    if not isinstance(sde_type, str) or sde_type not in _TYPES:
        raise ValueError(f"sde_type must be one of {_TYPES}, got {sde_type!r}")
    peer_log_prob = flag("peer_log_prob", peer_log_prob)
    sample, model_output, prev_sample = latents(
        "prev_sample", constants=not peer_log_prob,
        sample=sample, model_output=model_output, prev_sample=prev_sample,
    )  # fmt: skip
    noise_level = number("noise_level", noise_level)
    return_sqrt_dt = flag("return_sqrt_dt", return_sqrt_dt)
    _check_scheduler(self)
    table = _transitions(self.sigmas, sde_type, noise_level, sample.device)
    step = find_step(timestep, self.timesteps, sample.shape[0], sample.device)
    step, rows = rows_at(table, step, sample.shape[0])
    if peer_log_prob:
        if sde_type == "precise":
            raise ValueError("peer_log_prob must be False for sde_type 'precise'")
        result = _as_theirs(
            model_output, sample, prev_sample, table, step, rows, generator, seeds, sde_type
        )
    elif prev_sample is None:
        noise = None if seeds is not None else draw(model_output, generator)
        result = take_step(
            model_output, sample, table.table, step,
            seeds=seeds, noise=noise, storage=storage_dtype(storage),
        )  # fmt: skip
    else:
        result = score(model_output, sample, prev_sample, table.table, step)
    std_dev = column(rows, "std_dev", sample.ndim)
    if sde_type == "precise":
        std_dev = std_dev.clamp(min=_LEAST_STD_DEV)
    return _results(result, std_dev, rows, return_sqrt_dt)


def ode_step_with_logprob(
    self,
    model_output: Tensor,
    mean_model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sde_type: str = "sde",
    return_sqrt_dt: bool = False,
) -> tuple[Tensor, ...]:
    """Steps by x + dt model_output and scores x' around x + dt mean_model_output.

    log_prob is -mean (x' - x - dt mean_model_output)^2, differentiable in mean_model_output; the
    results are those of sde_step_with_logprob, with the std_dev_t of "sde". generator and sde_type
    have no effect, as in theirs.
    """
    sample, model_output, mean_model_output, prev_sample = latents(
        "prev_sample",
        sample=sample, model_output=model_output, mean_model_output=mean_model_output,
        prev_sample=prev_sample,
    )  # fmt: skip
    noise_level = number("noise_level", noise_level)
    return_sqrt_dt = flag("return_sqrt_dt", return_sqrt_dt)
    _check_scheduler(self)
    device = sample.device
    key = ("ode, scored", device)
    table = cached(
        self.sigmas, key, lambda: schedule(self.sigmas, "ode", 0.0, device, score_quiet=True)
    )
    index = find_step(timestep, self.timesteps, sample.shape[0], device)
    step, rows = rows_at(table, index, sample.shape[0])
    if prev_sample is None:
        with torch.no_grad():
            prev_sample = take_step(
                model_output.detach(), sample, table.table, step, storage=torch.float32
            ).prev_sample
    result = score(mean_model_output, sample, prev_sample, table.table, step)
    noisy = _transitions(self.sigmas, "sde", noise_level, device)
    std_dev = column(rows_at(noisy, index, sample.shape[0])[1], "std_dev", sample.ndim)
    return _results(result, std_dev, rows, return_sqrt_dt)


def wan_step_with_logprob(
    self,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    determistic: bool = False,
    return_pixel_log_prob: bool = False,
    return_dt_and_std_dev_t: bool = False,
    *,
    seeds: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Steps as flow_grpo's Wan pipeline does, with S = s_min + (s_max - s_min) sigma.

    s_min and s_max are the last and the second sigma. Returns (prev_sample, log_prob [B],
    prev_sample_mean, S sqrt(-dt)), or (..., S, sqrt(-dt)) with return_dt_and_std_dev_t. With
    determistic, x' is the ODE step of this model_output, scored under the SDE, also in a replay.
    return_pixel_log_prob has no effect, as in theirs.
    """
    sample, model_output, prev_sample = latents(
        "prev_sample", sample=sample, model_output=model_output, prev_sample=prev_sample
    )
    determistic = flag("determistic", determistic)
    flag("return_pixel_log_prob", return_pixel_log_prob)
    both = flag("return_dt_and_std_dev_t", return_dt_and_std_dev_t)
    _check_scheduler(self)
    if prev_sample is not None and generator is not None:
        raise ValueError("generator and prev_sample were both given; give one of them")
    sigmas, device = self.sigmas, sample.device
    table = cached(
        sigmas, ("wan", device),
        lambda: schedule(sigmas, "sigma_linear", sigmas[-1], device),
    )  # fmt: skip
    index = find_step(timestep, self.timesteps, sample.shape[0], device)
    step, rows = rows_at(table, index, sample.shape[0])
    storage = storage_dtype(storage)
    if determistic:
        ode = cached(sigmas, ("ode", device), lambda: schedule(sigmas, "ode", 0.0, device))
        with torch.no_grad():
            prev_sample = take_step(
                model_output.detach(), sample, ode.table, step, storage=storage
            ).prev_sample
    if prev_sample is None:
        noise = None if seeds is not None else draw(model_output, generator)
        result = take_step(
            model_output, sample, table.table, step, seeds=seeds, noise=noise, storage=storage
        )
    else:
        result = score(model_output, sample, prev_sample, table.table, step)
    std_dev, abs_dt, c = (column(rows, name, sample.ndim) for name in ("std_dev", "abs_dt", "C"))
    first = (result.prev_sample.float(), result.log_prob, result.mean)
    return (*first, std_dev, torch.sqrt(abs_dt)) if both else (*first, c)


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces sde_step_with_logprob in modules; a context manager with revert().

    Also ode_step_with_logprob where a module has it. ValueError for a module whose function has
    other arguments than flow_grpo's, or its Wan pipeline's.

    options: seeds, storage, peer_log_prob, fixed for every call.
    """
    name, ode = "sde_step_with_logprob", "ode_step_with_logprob"
    entries = []
    for module in owners(modules, name):
        ours, theirs = sde_step_with_logprob, getattr(module, name, None)
        if callable(theirs) and differs(theirs, ours):
            ours = ours if differs(theirs, wan_step_with_logprob) else wan_step_with_logprob
        entries.append((module, name, replacement(module, name, ours, options)))
        if callable(getattr(module, ode, None)):
            entries.append((module, ode, replacement(module, ode, ode_step_with_logprob, {})))
    return Patch(entries)


def _check_scheduler(scheduler) -> None:
    for name in ("sigmas", "timesteps"):
        if not isinstance(getattr(scheduler, name, None), Tensor):
            raise TypeError(
                "self must be a scheduler with the tensors sigmas and timesteps, got "
                f"{type(scheduler).__name__}"
            )


def _transitions(sigmas: Tensor, sde_type: str, noise_level: float, device) -> Transitions:
    """Builds the table of a scheduler's sigmas, or takes the cached one."""

    def make() -> Transitions:
        if sde_type == "precise":
            return schedule(sigmas, "precise", noise_level, device)
        return with_poison(_KINDS[sde_type](sigmas, noise_level).to(device))

    return cached(sigmas, (sde_type, noise_level, device), make)


def _results(result, std_dev: Tensor, rows: Tensor, return_sqrt_dt: bool) -> tuple[Tensor, ...]:
    """Their tuple."""
    values = (result.prev_sample.float(), result.log_prob, result.mean, std_dev)
    if not return_sqrt_dt:
        return values
    return (*values, torch.sqrt(column(rows, "abs_dt", std_dev.ndim)))


def _as_theirs(model_output, latent, prev_sample, table, step, rows, generator, seeds, sde_type):
    """Their eager mean and log_prob, at their unrounded x'."""
    a, b, c = (column(rows, name, latent.ndim) for name in ("A", "B", "C"))
    mean = a * latent.float() + b * model_output.float()
    if prev_sample is None:
        noise = None if seeds is not None else draw(model_output, generator)
        with torch.no_grad():
            prev_sample = take_step(
                model_output.detach(), latent.detach(), table.table, step,
                seeds=seeds, noise=noise, storage=torch.float32,
            ).prev_sample  # fmt: skip
    square = (prev_sample.detach().float() - mean) ** 2
    if sde_type == "cps":
        log_prob = -square
    else:
        log_prob = -square / (2 * c**2) - torch.log(c) - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob.mean(dim=tuple(range(1, log_prob.ndim)))
    return Step(prev_sample, log_prob, mean, None)
