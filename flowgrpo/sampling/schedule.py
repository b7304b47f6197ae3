"""The steps of a sampler: sigmas, the transition table, and which of its rows a sample takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config, ConfigError, SampleConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import Policy
from flowgrpo_kernels import Transitions, cps, dance_sde, flow_sde, ode

TRANSITIONS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}


@dataclass(frozen=True)
class Schedule:
    """Sigmas and transitions of a sampler, computed once in float64 and put on the device."""

    sigmas: Tensor
    """float32 [T+1]: the noise level that the model gets at each step; the last is 0."""
    transitions: Transitions
    """Row i: step i by the SDE; row T + i: step i by the ODE."""
    weights: Tensor
    """float32 [T]: C / |B| of the SDE's steps, see `step_weights`."""

    @property
    def steps(self) -> int:
        """T."""
        return self.sigmas.numel() - 1


def training_schedule(policy: Policy, config: SampleConfig, kl: str = "std_dev") -> Schedule:
    """Build the training sampler of a policy: `sample.transition` above, the ODE below it.

    Raises:
        ConfigError: a step adds too much noise, or the sigmas are none.
    """
    sigmas = policy.sigmas(config.steps)
    try:
        stochastic = TRANSITIONS[config.transition](sigmas, config.noise_level, kl=kl)
        transitions = Transitions.cat(stochastic, ode(sigmas))
    # The kernels refuse steps that leave the range of latents, and say what makes them do so.
    except ValueError as error:
        raise ConfigError(
            f"sample.transition {config.transition} with sample.noise_level {config.noise_level:g} "
            f"and the {config.steps} steps of the model's scheduler is no sampler: {error}."
        ) from error
    low, high = config.window_bounds
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        transitions.to(policy.device),
        step_weights(stochastic, low, high).to(policy.device),
    )


def ode_schedule(policy: Policy, steps: int) -> Schedule:
    """Build the deterministic sampler of `steps` steps."""
    sigmas = policy.sigmas(steps)
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        ode(sigmas).to(policy.device),
        torch.zeros(steps, device=policy.device),
    )


def step_weights(transitions: Transitions, low: int, high: int) -> Tensor:
    """Compute C / |B| of each step, float32 [T], of mean 1 over the steps [low, high).

    The gradient of log_prob in the velocity is (B / C) eps / D, so these weights give every step
    the same scale of gradient.
    """
    table = transitions.table.to("cpu", torch.float64)
    weights = table[:, 2] / table[:, 1].abs()
    return (weights / weights[low:high].mean()).to(torch.float32)


def windows(groups: int, config: Config, iteration: int) -> Tensor:
    """Draw the window of each group: the trained steps of each row, int64 [W, B]; with
    `sample.scouts` those of each candidate, int64 [W, K N]."""
    low, high = config.sample.window_bounds
    length = config.sample.trained_steps
    choices = high - low - length + 1
    shift = seeds.below(choices, config.run.seed, seeds.WINDOW, iteration, np.arange(groups))
    size = config.sample.scouts or config.sample.group_size
    start = torch.from_numpy(low + shift).repeat_interleave(size)
    return start[None, :] + torch.arange(length)[:, None]


def table_rows(trained_steps: Tensor, steps: int) -> Tensor:
    """Look up the table row of each step, int64 [T, B]: the SDE at `trained_steps` [W, B], else
    the ODE.

    Raises:
        ConfigError: a trained step is no step of the schedule.
    """
    if trained_steps.numel():
        first, last = int(trained_steps.min()), int(trained_steps.max())
        require(
            0 <= first <= last < steps,
            f"a window covers the steps {first} to {last}, but the schedule has the steps 0 to "
            f"{steps - 1}; change sample.window_range or sample.steps.",
        )
    rows = torch.arange(steps)[:, None].expand(steps, trained_steps.shape[1]) + steps
    return rows.clone().scatter_(0, trained_steps, trained_steps)
