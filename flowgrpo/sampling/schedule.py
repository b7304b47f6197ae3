"""The steps of a sampler: sigmas, the transition table, and which of its rows a sample takes."""

from __future__ import annotations

import math
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
    sample = config.sample
    if sample.window_schedule == "progressive":
        starts = np.full(groups, progressive_start(sample, iteration))
    else:
        low, choices = sample.window_bounds[0], sample.last_start - sample.window_bounds[0] + 1
        numbers = np.arange(groups)
        starts = low + seeds.below(choices, config.run.seed, seeds.WINDOW, iteration, numbers)
    start = torch.from_numpy(starts).repeat_interleave(sample.scouts or sample.group_size)
    return start[None, :] + torch.arange(sample.trained_steps)[:, None]


def progressive_start(sample: SampleConfig, iteration: int) -> int:
    """Find where MixGRPO's window begins (arXiv 2507.21802), by the iterations completed before.

    It begins at the first step of the range, stays at step l for

        ceil(tau exp(-k max(0, l - l0)))        tau, k, l0: window_interval, _decay, _decay_from

    iterations, and moves on by `window_stride` steps, at most to the last place that holds a whole
    window. There it stays, or goes back to the first with `window_return`. A function of the
    iteration alone, so that a resumed run needs no state of it.

    Departures from the authors' code: their window becomes shorter at the end of the schedule, and
    empty at last; here all have one length.
    """
    starts = [*range(sample.window_bounds[0], sample.last_start + 1, sample.window_stride)]
    if starts[-1] != sample.last_start and not sample.window_return:
        # The last move is a shorter one.
        starts.append(sample.last_start)
    stays = [
        math.ceil(
            sample.window_interval
            * math.exp(-sample.window_decay * max(0, start - sample.window_decay_from))
        )
        for start in starts
    ]
    if sample.window_return:
        iteration %= sum(stays)
    for start, stay in zip(starts, stays, strict=True):
        if iteration < stay:
            return start
        iteration -= stay
    return starts[-1]


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
