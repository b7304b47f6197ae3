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
6. theirs is made of overridable layers (resolve_sigmas, prev_sample_mean_and_std, log_prob); here
   there is one pass, and no layer to override.
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import number
from ..transition_rows import transition_rows
from .steps import latents, score
from .tables import cached, column, find_step, pair_at, per_row, rows_at, schedule, second

# torch.isclose(sigma, 1): the rollout's test for a sigma that means 1.
NEAR_ONE = 1e-5 + 1e-8


class _Backend:
    """Scores transitions by one law."""

    law: str

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
        if isinstance(noise_level, Tensor):
            noise_level = per_row("noise_level", noise_level, device)
        if sigmas is not None:
            if next_sigmas is None:
                raise TypeError("next_sigmas must be given with sigmas, got None")
            if sigma_max is not None:
                sigma_max = per_row("sigma_max", sigma_max, device)
            step, rows, table = self._from_pairs(
                per_row("sigmas", sigmas, device), per_row("next_sigmas", next_sigmas, device),
                sigma_max, noise_level, batch,
            )  # fmt: skip
        else:
            step, rows, table = self._from_timesteps(*transition[:2], noise_level, batch, device)
        result = score(model_output, sample, prev_sample, table, step)
        std_dev = column(rows, "std_dev", sample.ndim)
        return prev_sample.float(), result.log_prob, result.mean, std_dev

    def _from_pairs(self, sigma, sigma_next, sigma_max, noise_level, batch: int):
        """(step int64 [B], rows [N, 10], table)."""
        transitions = transition_rows(
            self.law, sigma, sigma_next, noise_level, near_one=NEAR_ONE,
            sigma_max=sigma_max if self.law == "flow_sde" else None,
        )  # fmt: skip
        if transitions.num_steps not in (1, batch):
            raise ValueError(f"sigmas must hold 1 or {batch} values, got {transitions.num_steps}")
        return transitions.row_numbers.expand(batch), transitions.table, transitions.table

    def _from_timesteps(self, timesteps, next_timesteps, noise_level, batch: int, device):
        """The same."""
        raise NotImplementedError


class FlowSdeStepBackend(_Backend):
    """Flow-GRPO's SDE, as miles' DiffusersSdeStepBackend."""

    law = "flow_sde"

    def _from_timesteps(self, timesteps, next_timesteps, noise_level, batch: int, device):
        sigmas = getattr(self.scheduler, "sigmas", None)
        if not isinstance(sigmas, Tensor) or not hasattr(self.scheduler, "timesteps"):
            raise TypeError(
                "scheduler must have the tensors sigmas and timesteps to score by timesteps, got "
                f"{type(self.scheduler).__name__}"
            )
        level = (
            noise_level if isinstance(noise_level, Tensor) else number("noise_level", noise_level)
        )
        index = find_step(timesteps, self.scheduler.timesteps, batch, device)
        if not isinstance(level, Tensor):
            key = (self.law, level, str(device))
            table = cached(sigmas, key, lambda: schedule(sigmas, self.law, level, device))
            step, rows = rows_at(table, index, batch)
            return step, rows, table.table
        pair = pair_at(sigmas, index, device)
        return self._from_pairs(*pair, second(sigmas, device), level, batch)


class CpsSdeStepBackend(_Backend):
    """Coefficients-preserving sampling, as miles' CpsSdeStepBackend."""

    law = "cps"

    def _from_timesteps(self, timesteps, next_timesteps, noise_level, batch: int, device):
        pair = [
            per_row(name, x, device).float() / self.sde_timestep_divisor
            for name, x in (("timesteps", timesteps), ("next_timesteps", next_timesteps))
        ]
        return self._from_pairs(*pair, None, noise_level, batch)
