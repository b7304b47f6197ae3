"""Drop-in for flow_grpo's `sde_step_with_logprob` (diffusers_patch/sd3_sde_with_logprob.py).

    from flowgrpo_kernels.compat.flow_grpo import sde_step_with_logprob

or, without touching their files, in every module that imported theirs:

    with patch(sd3_pipeline_with_logprob, train_script):
        ...

Same arguments, same return tuple, noise from the same torch generator. What differs:

1. x' is rounded to the dtype of `sample` before it is scored, so the log_prob of a latent stored in
   bfloat16 or float16 is the one that a replay computes. theirs scores the unrounded float32 x'.
   With float32 samples there is no difference. The returned tensor is float32, as theirs.
2. A step without noise (noise_level 0, the last step of "cps") has log_prob 0 and no gradient.
   theirs returns NaN for "sde" and minus the squared error for "cps".
3. No host synchronisation per row: timesteps are compared with the scheduler's on the device. A
   timestep that the scheduler does not have raises on the CPU and gives a row of NaN on a GPU.
4. The coefficients are computed in float64 and rounded once; results agree to float32 rounding.
5. `sample` and `prev_sample` are constants for the gradient of log_prob; one that requires a
   gradient raises. prev_sample_mean is differentiable in everything, as theirs.

peer_log_prob=True computes log_prob by their expression instead (differences 1, 2 and 5 are gone,
and with them the bitwise ratio of 1 for 16-bit storage).
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from ..arguments import check_tensor, flag, number
from ..log_prob import log_prob as score
from ..sde_step import sde_step
from ..transitions import COLUMNS, Transitions, cps, flow_sde
from .patch import Patch
from .tables import cached, latents, rows

_KINDS = {"sde": flow_sde, "cps": cps}


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
    peer_log_prob: bool = False,
) -> tuple[Tensor, ...]:
    """Steps to (prev_sample, log_prob [B], prev_sample_mean, std_dev_t [N, 1, ...][, sqrt_dt]).

    All are float32; N is the number of timesteps.

    Args:
        self: a FlowMatchEulerDiscreteScheduler after set_timesteps.
        timestep: a number, 0-dim, [1] or [B], equal to entries of self.timesteps.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
    """
    if not isinstance(sde_type, str) or sde_type not in _KINDS:
        raise ValueError(f"sde_type must be 'sde' or 'cps', got {sde_type!r}")
    sample, model_output, prev_sample = latents(
        "prev_sample", sample=sample, model_output=model_output, prev_sample=prev_sample
    )
    noise_level = number("noise_level", noise_level)
    return_sqrt_dt = flag("return_sqrt_dt", return_sqrt_dt)
    peer_log_prob = flag("peer_log_prob", peer_log_prob)
    if not all(isinstance(getattr(self, name, None), Tensor) for name in ("sigmas", "timesteps")):
        raise TypeError(
            "self must be a scheduler with the tensors sigmas and timesteps, got "
            f"{type(self).__name__}"
        )
    transitions = _transitions(self.sigmas, sde_type, noise_level, sample.device)
    step = _step(self, timestep, sample)
    storage = sample.dtype
    model_output = model_output.float()

    # Of each row's step, [N, 1, ...].
    columns = rows(transitions.table, step).view(-1, len(COLUMNS), *[1] * (sample.ndim - 1))
    a, b, c, abs_dt, std_dev_t = (
        columns[:, COLUMNS.index(name)] for name in ("A", "B", "C", "abs_dt", "std_dev")
    )
    mean = a * sample.float() + b * model_output

    if step.shape[0] != sample.shape[0]:
        step = step.expand(sample.shape[0])
    if prev_sample is None:
        noise = None if seeds is not None else _randn(model_output, generator)
        with torch.no_grad():
            prev_sample, log_prob = sde_step(
                model_output.detach(), sample.detach(), transitions, step, seeds=seeds, noise=noise
            )
        if peer_log_prob and storage != torch.float32:
            prev_sample, _ = sde_step(
                model_output.detach(), sample.detach().float(), transitions, step,
                seeds=seeds, noise=noise,
            )  # fmt: skip
        differentiable = torch.is_grad_enabled() and model_output.requires_grad
    else:
        log_prob, differentiable = None, True
    if peer_log_prob:
        log_prob = _peer_log_prob(prev_sample.float(), mean, c, sde_type)
    elif log_prob is None or differentiable:
        log_prob = score(model_output, sample, prev_sample, transitions, step)
    result = (prev_sample.float(), log_prob, mean, std_dev_t)
    return (*result, torch.sqrt(abs_dt)) if return_sqrt_dt else result


def patch(*modules: ModuleType, **options) -> Patch:
    """Replaces sde_step_with_logprob in modules; a context manager with revert().

    options: seeds, peer_log_prob, fixed for every call.
    """
    return Patch("sde_step_with_logprob", sde_step_with_logprob, modules, options)


def _transitions(sigmas: Tensor, sde_type: str, noise_level: float, device) -> Transitions:
    """Builds the table of a scheduler's sigmas, or takes the cached one."""
    key = (sde_type, noise_level, str(device))
    return cached(sigmas, key, lambda: _KINDS[sde_type](sigmas, noise_level).to(device))


def _step(scheduler, timestep, sample: Tensor) -> Tensor:
    """Finds each timestep among the scheduler's: int64 [N], -1 where it is not."""
    known = scheduler.timesteps
    if known.device != sample.device:
        known = cached(known, str(sample.device), lambda: known.to(sample.device))
    if isinstance(timestep, Tensor):
        check_tensor("timestep", timestep)
        if timestep.device.type == "meta" != sample.device.type:
            raise ValueError("timestep must hold values, got a tensor on meta")
    try:
        timesteps = torch.as_tensor(timestep, dtype=known.dtype, device=sample.device).reshape(-1)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"timestep must be a number or a tensor, got {type(timestep).__name__}"
        ) from error
    count = timesteps.shape[0]
    if count not in (1, sample.shape[0]):
        raise ValueError(f"timestep must hold 1 or {sample.shape[0]} values, got {count}")
    equal = timesteps[:, None] == known[None, :]
    step = torch.where(equal.any(1), equal.to(torch.int64).argmax(1), -1)
    if sample.device.type == "cpu" and bool((step < 0).any()):
        values = timesteps.tolist()
        raise ValueError(f"timestep must be among the scheduler's timesteps, got {values}")
    return step


def _randn(like: Tensor, generator) -> Tensor:
    """Draws float32 normals from the caller's generator, maybe on the CPU, or one per sample."""
    if isinstance(generator, (list, tuple)):
        if len(generator) != like.shape[0]:
            raise ValueError(f"generator must hold {like.shape[0]}, got {len(generator)}")
        return torch.cat([_randn(row, g) for row, g in zip(like.split(1), generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device).to(like.device)


def _peer_log_prob(prev_sample: Tensor, mean: Tensor, c: Tensor, sde_type: str) -> Tensor:
    """Computes log_prob [B] by the peer's expression."""
    square = (prev_sample.detach() - mean) ** 2
    if sde_type == "cps":
        log_prob = -square
    else:
        log_prob = -square / (2 * c**2) - torch.log(c) - 0.5 * math.log(2 * math.pi)
    return log_prob.mean(dim=tuple(range(1, log_prob.ndim)))
