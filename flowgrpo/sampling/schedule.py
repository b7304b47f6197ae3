"""The steps of a sampler: sigmas, the transition table, and which of its rows a sample takes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds as random
from flowgrpo.config import Config, SampleConfig
from flowgrpo.config.validation import require
from flowgrpo.policies import Policy
from flowgrpo_kernels import Transitions, cps, dance_sde, flow_sde, ode

TRANSITIONS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}


@dataclass(frozen=True)
class Schedule:
    """The steps of a sampler, computed once in float64 and put on the device."""

    sigmas: Tensor
    """float32 [T+1]: what the model is told at each step."""
    transitions: Transitions
    """Row i: step i by the SDE; row T + i: step i by the ODE."""
    weights: Tensor
    """float32 [T]: C / |B| of the SDE's steps, see `step_weights`."""

    @property
    def steps(self) -> int:
        """T."""
        return self.sigmas.numel() - 1


def training_schedule(policy: Policy, sample: SampleConfig, kl: str = "std_dev") -> Schedule:
    """The training sampler of a policy."""
    sigmas = policy.sigmas(sample.steps)
    stochastic = TRANSITIONS[sample.transition](sigmas, sample.noise_level, kl=kl)
    both = Transitions.cat(stochastic, ode(sigmas))
    low, high = sample.window_bounds
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        both.to(policy.device),
        step_weights(stochastic, low, high).to(policy.device),
    )


def ode_schedule(policy: Policy, steps: int) -> Schedule:
    """The deterministic sampler of `steps` steps."""
    sigmas = policy.sigmas(steps)
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        ode(sigmas).to(policy.device),
        torch.zeros(steps, device=policy.device),
    )


def step_weights(transitions: Transitions, low: int, high: int) -> Tensor:
    """float32 [T]: C / |B|, of mean 1 over the steps [low, high).

    The gradient of log_prob in the velocity is (B / C) eps / D, so these weights give every step
    the same scale of gradient.
    """
    table = transitions.table.to("cpu", torch.float64)
    weights = table[:, 2] / table[:, 1].abs()
    return (weights / weights[low:high].mean()).to(torch.float32)


def windows(groups: int, config: Config, iteration: int) -> Tensor:
    """int64 [W, B]: the trained steps of each row, the same for all rows of a group."""
    low, high = config.sample.window_bounds
    length = config.sample.trained_steps
    count, number = high - low - length + 1, np.arange(groups)
    start = low + random.below(count, config.run.seed, random.WINDOW, iteration, number)
    start = torch.from_numpy(start).repeat_interleave(config.sample.group_size)
    return start[None, :] + torch.arange(length)[:, None]


def table_rows(trained_steps: Tensor, steps: int) -> Tensor:
    """int64 [T, B]: the table row of each step, stochastic at `trained_steps` [W, B], else ODE.

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
