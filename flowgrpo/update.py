"""The optimizer steps of one iteration: micro-steps forward and backward, and the ratio check.

A micro-step is one chunk of rows at one of its turns (`Objective.turns`). The chunks are those of
the rollout, in its order, so that each forward repeats the rollout's bits and the ratios of the
first update are exactly 1. The largest deviation is measured every time (`check_ratio`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowgrpo import cuda_graphs
from flowgrpo.config import Config
from flowgrpo.objectives import Loss, Objective
from flowgrpo.policies import Policy, deterministic
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.runs.monitor import DivergedError
from flowgrpo.runs.state import State
from flowgrpo.sampling.rollout import chunks, prepare_both
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import log_prob


class RatioError(RuntimeError):
    """The first ratios of an update were not 1: rollout and update disagree on the velocity."""


def update(
    schedule: Schedule,
    state: State,
    micro_step: MicroStep,
    experience: Experience,
    config: Config,
) -> dict[str, Any]:
    """Take the optimizer steps of one iteration, each over its own share of the chunks.

    Returns:
        The means of the objective's metrics over all micro-steps, the gradient norm of each
        optimizer step before clipping, and the largest |ratio - 1| before the first.
    """
    policy, objective = micro_step.policy, micro_step.objective
    sample, optim = config.sample, config.optim
    turns = objective.turns(config)
    micro_steps = [(rows, t) for rows in chunks(sample.rows, sample.batch_size) for t in turns]
    experience = with_prepared_conditioning(policy, schedule, experience)
    if optim.anchor == "replay":
        with policy.frozen_weights():
            experience = replay(policy, schedule, objective, experience, micro_steps, config)
    share = len(micro_steps) // optim.updates_per_iteration
    scale = loss_scale(policy, sample.batch_size * optim.steps_per_forward, share)
    sums: dict[str, Tensor] = {}
    error, norms = torch.zeros((), device=policy.device), []
    for number in range(optim.updates_per_iteration):
        with micro_step.accumulating(scale):
            for rows, turn in micro_steps[number * share : (number + 1) * share]:
                batch = objective.gather(schedule, experience, rows, turn)
                metrics, deviation = micro_step(batch, config, share)
                # Sums are new tensors: what a graph returned is overwritten by its next replay.
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0) + value
                if number == 0:
                    error = torch.maximum(error, deviation)
        norms.append(state.step())
    # All that is read from the device since the rewards, at once.
    worst, *values = torch.stack([error, *sums.values(), *norms]).tolist()
    check_ratio(worst, optim.ratio_tolerance)
    means = {name: value / len(micro_steps) for name, value in zip(sums, values, strict=False)}
    return {**means, "grad_norm": values[len(sums) :], "max_ratio_error": worst}


def run_micro_step(
    policy: Policy,
    loss: Callable[[Policy, Batch, Config], Loss],
    batch: Batch,
    config: Config,
    share: int,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run forward and backward of one of the `share` micro-steps of an optimizer step.

    The gradients are those of the loss times `loss_scale`. Returns the objective's metrics and the
    largest |ratio - 1| (0 for a loss without ratio), all on the device.
    """
    out = loss(policy, batch, config)
    scale = loss_scale(policy, len(batch.sample), share)
    # Not the forward too: torch.compile would compile it again for another setting.
    with deterministic.deterministic_backward():
        (out.loss / (share / scale)).backward()
    if out.ratio is None:
        return out.metrics, torch.zeros((), device=policy.device)
    return out.metrics, (out.ratio - 1).abs().amax()


def loss_scale(policy: Policy, rows: int, share: int) -> float:
    """What the loss of a micro-step of `rows` rows, one of `share`, is multiplied by.

    A mean over rows, elements and micro-steps has gradients of about 1 / (rows x elements x share)
    in a velocity, 1e-8 for SD3.5-medium, and float16 has nothing below 6e-8. Scaled they are about
    1/16, which leaves room for sums over the tokens below 65504. A power of two, which is divided
    out of the float32 gradients without a rounding. 1 for other types, whose range is float32's.
    """
    if policy.dtype != torch.float16:
        return 1.0
    return 2.0 ** math.floor(math.log2(rows * math.prod(policy.latent_shape) * share / 16))


class MicroStep:
    """`run_micro_step`, or with graphs its replayed form: gradients stay at their addresses."""

    def __init__(
        self, policy: Policy, objective: Objective, graphs: cuda_graphs.Graphs | None
    ) -> None:
        self.policy, self.objective, self.graphs = policy, objective, graphs
        self.parameters = list(policy.parameters()) if graphs else []
        self.gradients = [torch.zeros_like(p) for p in self.parameters]

    @contextmanager
    def accumulating(self, scale: float = 1.0) -> Iterator[None]:
        """Add up gradients from 0 while no parameter changes; then divide them by `scale`."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.zero_()
        with self.policy.frozen_weights(fixed=self.graphs is not None):
            yield
        if scale != 1:
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / scale)

    def __call__(
        self, batch: Batch, config: Config, share: int
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run `run_micro_step` on `batch`, one of the `share` micro-steps of an optimizer step."""
        arguments = (self.policy, self.objective.loss, batch, config, share)
        if self.graphs is None:
            return run_micro_step(*arguments)
        changes, option = self.gradients, "optim.capture"
        return self.graphs(run_micro_step, *arguments, changes=changes, option=option)


def check_ratio(error: float, tolerance: float) -> None:
    """Raise unless the largest |ratio - 1| of the first update, `error`, is within `tolerance`."""
    if math.isnan(error):
        raise DivergedError(
            "the ratios of the first update after a rollout are NaN, but finite numbers are "
            "expected; start again with a lower optim.lr."
        )
    if error > tolerance:
        raise RatioError(
            f"the first update after a rollout saw |ratio - 1| up to {error:.3g}, but at most "
            f"{tolerance:g} is allowed (optim.ratio_tolerance), because rollout and update must "
            "compute the same velocities; use the same kernels, dtype and batch size in both, or "
            "raise the tolerance."
        )


def with_prepared_conditioning(
    policy: Policy, schedule: Schedule, experience: Experience
) -> Experience:
    """Return `experience` with the conditioning of its rollout: same products, same bits."""
    conditioning, uncond = prepare_both(
        policy, schedule, experience.conditioning, experience.uncond
    )
    return replace(experience, conditioning=conditioning, uncond=uncond)


def replay(
    policy: Policy,
    schedule: Schedule,
    objective: Objective,
    experience: Experience,
    micro_steps: Sequence[tuple[slice, range]],
    config: Config,
) -> Experience:
    """Return `experience` with the old log-probabilities computed anew, by the update's forwards.

    Their ratios are then 1 whatever computed the rollout, as long as one forward repeats itself:
    the anchor for forwards that differ from the rollout's in kernels or number of rows. The price
    is one forward for each trained step.
    """
    trajectory, scale = experience.trajectory, config.sample.guidance_scale
    log_probs = trajectory.log_probs.clone()
    old_velocities = None if trajectory.velocities is None else trajectory.velocities.clone()
    for rows, turns in micro_steps:
        batch = objective.gather(schedule, experience, rows, turns)
        # With gradients, which nothing uses: without them a forward may take other kernels.
        velocity, uncond = velocities(
            policy, batch.sample, batch.sigma, batch.conditioning, batch.uncond
        )
        velocity, uncond = velocity.detach(), None if uncond is None else uncond.detach()
        step = trajectory.trained_steps[turns.start : turns.stop, rows].flatten()
        index = torch.arange(rows.start, rows.stop, device=step.device).repeat(len(turns))
        log_probs[step, index] = log_prob(
            velocity,
            batch.sample,
            batch.prev_sample,
            batch.transitions,
            batch.table_row,
            uncond_velocity=uncond,
            guidance_scale=scale,
        )
        if old_velocities is not None:
            old_velocities[step, index] = guide(velocity, uncond, scale)
    anchored = replace(trajectory, log_probs=log_probs, velocities=old_velocities)
    return replace(experience, trajectory=anchored)
