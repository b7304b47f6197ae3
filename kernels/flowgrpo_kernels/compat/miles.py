"""Backends for miles-diffusion's `--sde-step-backend-path`: they score its recorded transitions.

    --sde-step-backend-path flowgrpo_kernels.compat.miles.FlowSdeStepBackend     # sde_type sde
    --sde-step-backend-path flowgrpo_kernels.compat.miles.CpsSdeStepBackend      # sde_type cps

Both forms of `sde_step_logprob` are taken: with the sigmas that the rollout stepped with, and the
earlier one with timesteps, which a scheduler turns into sigmas (flow) or a divisor (cps). What
differs from miles' own backends:

1. No host synchronisation: theirs looks each timestep up and reads sigmas[1]. A timestep that the
   scheduler does not have, and sigma pairs that do not fall, raise on the CPU and give rows of NaN
   on a GPU (FLOWGRPO_DEBUG=1 raises).
2. A step without noise (noise_level 0, the last step of cps) has log_prob 0 and no gradient. theirs
   is NaN, or minus the squared error for cps.
3. The coefficients are computed in float64 and rounded once; results agree to float32 rounding.
4. Inputs of 16 bits are read as they are; they need no cast to float32 before the call.
5. sample and prev_sample are constants for the gradient; one that requires a gradient raises.

Both are made of theirs' layers: resolve_sigmas, prev_sample_mean_and_std and log_prob. As long as a
subclass overrides none of them, a transition is scored in one pass; else layer by layer, as theirs.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..arguments import number
from ..log_prob import log_prob
from ..transitions import COLUMNS, Transitions
from .steps import latents, score
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

# torch.isclose(sigma, 1): the rollout's test for a sigma that means 1.
NEAR_ONE = 1e-5 + 1e-8
LAYERS = ("resolve_sigmas", "prev_sample_mean_and_std", "log_prob")
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


class _Backend:
    """Scores transitions by one law."""

    law: str
    gaussian = True

    def __init__(self, scheduler=None, *, sde_timestep_divisor: float = 1.0) -> None:
        """Takes what miles gives a backend.

        Args:
            scheduler: with sigmas and timesteps; needed for the flow SDE by timesteps.
            sde_timestep_divisor: what a timestep of cps is divided by to give its sigma.
        """
        self.scheduler = scheduler
        self.sde_timestep_divisor = number("sde_timestep_divisor", sde_timestep_divisor)

    def sde_step_logprob(
        self,
        model_output: Tensor,
        *transition: Tensor,
        prev_sample: Tensor,
        noise_level: float | Tensor,
        sigmas: Tensor | None = None,
        next_sigmas: Tensor | None = None,
        sigma_max: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores to (prev_sample, log_prob [B], prev_sample_mean, std_dev_t [N, 1, ...]); float32.

        Args:
            transition: sample, beside sigmas, next_sigmas and sigma_max ([B] or 0-dim); or
                timesteps, next_timesteps, sample.
        """
        count = 1 if sigmas is not None else 3
        if len(transition) != count:
            names = "sample" if count == 1 else "timesteps, next_timesteps, sample"
            raise TypeError(
                f"sde_step_logprob takes model_output and then {names}, got "
                f"{len(transition)} tensors after model_output"
            )
        sample, model_output, prev_sample = latents(
            "", sample=transition[-1], model_output=model_output, prev_sample=prev_sample
        )
        batch, device = sample.shape[0], sample.device
        if sigmas is not None and next_sigmas is None:
            raise TypeError("next_sigmas must be given with sigmas, got None")
        if _overrides(type(self)):
            times = transition[:2]
            result = self._by_layers(
                model_output, sample, prev_sample, times, noise_level, sigmas, next_sigmas,
                sigma_max,
            )  # fmt: skip
            return prev_sample.float(), *result
        if isinstance(noise_level, Tensor):
            noise_level = per_row("noise_level", noise_level, device)
        if sigmas is not None:
            if sigma_max is not None:
                sigma_max = per_row("sigma_max", sigma_max, device)
            step, table = self._from_pairs(
                per_row("sigmas", sigmas, device), per_row("next_sigmas", next_sigmas, device),
                sigma_max, noise_level, batch,
            )  # fmt: skip
            rows = self._rows(table, step, sigmas, next_sigmas, noise_level, sigma_max)
        else:
            step, rows, table = self._from_timesteps(*transition[:2], noise_level, batch, device)
        result = score(model_output, sample, prev_sample, table, step)
        std_dev = column(rows, "std_dev", sample.ndim)
        return prev_sample.float(), result.log_prob, result.mean, std_dev

    def _by_layers(
        self, model_output, sample, prev_sample, times, noise_level, sigmas, next_sigmas, sigma_max
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Composes the layers: (log_prob, prev_sample_mean, std_dev_t)."""
        view, more = (-1, *[1] * (sample.ndim - 1)), {}
        if sigmas is None:
            sigma, sigma_prev = self.resolve_sigmas(*times, ndim=sample.ndim)
        else:
            sigma, sigma_prev = sigmas.view(view), next_sigmas.view(view)
            more = {"sigma_max": None if sigma_max is None else sigma_max.view(view)}
        mean, noise_std, std_dev = self.prev_sample_mean_and_std(
            model_output.float(), sample.float(), sigma, sigma_prev, noise_level=noise_level, **more
        )
        return self.log_prob(prev_sample.float(), mean, noise_std), mean, std_dev

    def resolve_sigmas(
        self, timesteps: Tensor, next_timesteps: Tensor, *, ndim: int
    ) -> tuple[Tensor, Tensor]:
        """Finds (sigma, the next one) of timesteps [B], each [B, 1, ...] of `ndim` dimensions."""
        device = timesteps.device
        pair = self._sigmas_at(timesteps, next_timesteps, timesteps.numel(), device)
        return tuple(x.view(-1, *[1] * (ndim - 1)) for x in pair)

    def prev_sample_mean_and_std(
        self,
        model_output: Tensor,
        sample: Tensor,
        sigma: Tensor,
        sigma_prev: Tensor,
        *,
        noise_level: float | Tensor,
        sigma_max: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes (mean of x', float32 [B, ...]; standard deviation of x'; std_dev_t).

        Args:
            sigma, sigma_prev: of the transition, [B, 1, ...] or one for all.
            sigma_max: for sigmas that mean 1; None: the scheduler's second sigma.

        Returns:
            The mean is differentiable in model_output; the others are [N, 1, ...].
        """
        sample, model_output = latents("", sample=sample, model_output=model_output)
        device = sample.device
        if sigma_max is None and self.law == "flow_sde":
            sigma_max = second(self._schedule(), device)
        if isinstance(noise_level, Tensor):
            noise_level = per_row("noise_level", noise_level, device)
        if sigma_max is not None:
            sigma_max = per_row("sigma_max", sigma_max, device)
        inputs = (per_row("sigma", sigma, device), per_row("sigma_prev", sigma_prev, device))
        step, table = self._from_pairs(*inputs, sigma_max, noise_level, sample.shape[0])
        rows = self._rows(table, step, *inputs, noise_level, sigma_max)
        # Any x' will do.
        mean = score(model_output, sample, sample, table, step).mean
        return mean, column(rows, "C", sample.ndim), column(rows, "std_dev", sample.ndim)

    def log_prob(self, prev_sample: Tensor, prev_mean: Tensor, noise_std: Tensor) -> Tensor:
        """Scores x' under its mean and standard deviation: float32 [B], differentiable in the mean.

        noise_std: [B, 1, ...] or one for all. Where it is 0 the result is 0.
        """
        prev_sample, mean = latents(
            "", constants=False, prev_sample=prev_sample.detach(), model_output=prev_mean
        )
        c = noise_std.detach().reshape(-1).float()
        silent = c == 0
        # x' - (0 x + 1 mean): the mean is in the velocity's place.
        columns = {"C": c, "k": torch.ones_like(c)}
        if self.gaussian:
            spread = torch.where(silent, 1.0, c)
            columns |= {"k": 0.5 / (spread * spread), "c0": spread.log() + _LOG_SQRT_2PI}
        table = c.new_zeros(len(c), len(COLUMNS))
        for name, values in columns.items():
            table[:, COLUMNS.index(name)] = torch.where(silent, 0.0, values)
        table[:, COLUMNS.index("B")] = 1.0
        numbers = torch.arange(len(c), device=c.device)
        transitions = Transitions(table, None, (self.law,) * len(c), numbers)
        return log_prob(mean, prev_sample, prev_sample, transitions, numbers.expand(len(mean)))

    def _from_pairs(self, sigma, sigma_next, sigma_max, noise_level, batch: int):
        """(row of each sample, int64 [B]; table)."""
        if not isinstance(noise_level, Tensor):
            noise_level = number("noise_level", noise_level)
        table, step = rows_of_pairs(
            "sigmas", self.law, sigma, sigma_next, noise_level,
            sigma_max if self.law == "flow_sde" else None, batch, near_one=NEAR_ONE,
        )  # fmt: skip
        return step, table

    def _rows(self, table, step, sigma, sigma_next, noise_level, sigma_max) -> Tensor:
        """Copies the rows of a transition: one where one holds for all samples, else one each."""
        one = all(
            not isinstance(x, Tensor) or x.numel() == 1
            for x in (sigma, sigma_next, noise_level, sigma_max)
        )
        return table.index_select(0, step[:1] if one else step)

    def _schedule(self) -> Tensor:
        """Returns the scheduler's sigmas; TypeError where there are none."""
        sigmas = getattr(self.scheduler, "sigmas", None)
        if not isinstance(sigmas, Tensor) or not hasattr(self.scheduler, "timesteps"):
            raise TypeError(
                "scheduler must have the tensors sigmas and timesteps to score by timesteps, got "
                f"{type(self.scheduler).__name__}"
            )
        return sigmas

    def _sigmas_at(self, timesteps, next_timesteps, batch: int, device) -> tuple[Tensor, Tensor]:
        """(sigma, the next one) of timesteps, 0-dim or [N]."""
        raise NotImplementedError

    def _from_timesteps(self, timesteps, next_timesteps, noise_level, batch: int, device):
        """(row of each sample, int64 [B]; a copy of the rows [N, 10]; table)."""
        pair = self._sigmas_at(timesteps, next_timesteps, batch, device)
        return self._with_rows(*pair, None, noise_level, batch)

    def _with_rows(self, sigma, sigma_next, sigma_max, noise_level, batch: int):
        step, table = self._from_pairs(sigma, sigma_next, sigma_max, noise_level, batch)
        rows = self._rows(table, step, sigma, sigma_next, noise_level, sigma_max)
        return step, rows, table


class FlowSdeStepBackend(_Backend):
    """Flow-GRPO's SDE, as miles' DiffusersSdeStepBackend."""

    law = "flow_sde"

    def _sigmas_at(self, timesteps, next_timesteps, batch: int, device):
        sigmas = self._schedule()
        index = find_step(timesteps, self.scheduler.timesteps, batch, device)
        return pair_at(sigmas, index, device)

    def _from_timesteps(self, timesteps, next_timesteps, noise_level, batch: int, device):
        sigmas = self._schedule()
        if isinstance(noise_level, Tensor):
            pair = self._sigmas_at(timesteps, next_timesteps, batch, device)
            return self._with_rows(*pair, second(sigmas, device), noise_level, batch)
        level = number("noise_level", noise_level)
        index = find_step(timesteps, self.scheduler.timesteps, batch, device)
        key = (self.law, level, device)
        table = cached(sigmas, key, lambda: schedule(sigmas, self.law, level, device))
        step, rows = rows_at(table, index, batch)
        return step, rows, table.table


class CpsSdeStepBackend(_Backend):
    """Coefficients-preserving sampling, as miles' CpsSdeStepBackend."""

    law = "cps"
    gaussian = False

    def _sigmas_at(self, timesteps, next_timesteps, batch: int, device):
        return tuple(
            per_row(name, x, device).float() / self.sde_timestep_divisor
            for name, x in (("timesteps", timesteps), ("next_timesteps", next_timesteps))
        )


@functools.cache
def _overrides(backend: type) -> bool:
    """Tells whether a class has a layer of its own."""
    return any(getattr(backend, name) is not getattr(_Backend, name) for name in LAYERS)
