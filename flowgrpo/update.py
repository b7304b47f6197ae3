"""The optimizer steps of one iteration: micro-steps forward and backward, and the ratio check.

A micro-step is one forward and backward; `Objective.micro_steps` lists those of an iteration. For
grpo they are the chunks of the rollout, in its order, so that each forward repeats the rollout's
bits and the ratios of the first update are exactly 1. The largest deviation is measured every time
(`check_ratio`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowgrpo import cuda_graphs
from flowgrpo.config import Config
from flowgrpo.objectives import Loss, Objective
from flowgrpo.objectives.curated import Curated
from flowgrpo.objectives.sft import supervise
from flowgrpo.policies import Policy, deterministic
from flowgrpo.records import Batch, Experience
from flowgrpo.runs.monitor import DivergedError
from flowgrpo.runs.state import State
from flowgrpo.sampling.schedule import Schedule


class RatioError(RuntimeError):
    """Ratios of a first update that are not 1: rollout and update disagree on the velocity."""


def update(
    schedule: Schedule,
    state: State,
    micro_step: MicroStep,
    experience: Experience,
    config: Config,
    curated: Curated | None = None,
) -> dict[str, Any]:
    """Take the optimizer steps of one iteration, each over an equal share of the micro-steps and,
    with `optim.sft_weight`, one more on images of the set `curated`.

    Returns:
        The means of the objective's metrics over all micro-steps, the gradient norm of each
        optimizer step before clipping, and the largest |ratio - 1| before the first.
    """
    policy, objective, optim = micro_step.policy, micro_step.objective, config.optim
    micro_steps = objective.micro_steps(config)
    share = len(micro_steps) // optim.updates_per_iteration
    with state.rollout_weights():
        schedule, experience = objective.prepare(policy, schedule, experience, config)
    # None without a weight: the set may be all that there is to learn from.
    supervision = curated.supervision(config, state.iteration) if optim.sft_weight else None
    sums: dict[str, Tensor] = {}
    error, norms = torch.zeros((), device=policy.device), []
    for number in range(optim.updates_per_iteration):
        with micro_step.accumulating():
            for rows, numbers in micro_steps[number * share : (number + 1) * share]:
                batch = objective.gather(schedule, experience, rows, numbers)
                metrics, deviation = micro_step(batch, config, share)
                # Sums are new tensors: what a graph returned is overwritten by its next replay.
                for name, value in metrics.items():
                    sums[name] = sums.get(name, 0) + value
                if number == 0:
                    error = torch.maximum(error, deviation)
            if supervision is not None:
                batch, weight = supervision.batch(number), optim.sft_weight * share
                metrics, _ = micro_step(batch, config, share, supervise, weight)
                for name, value in metrics.items():
                    # Of fewer micro-steps than the others, and so of as many more each.
                    sums[name] = sums.get(name, 0) + value * share
        norms.append(state.step())
    state.follow()
    parameters = [p.detach() for p in state.parameters.values()]
    weight = torch.stack(torch._foreach_norm(parameters, math.inf)).amax()
    # The only read from the device since the rewards: it waits for all of the above.
    worst, weight, *values = torch.stack([error, weight, *sums.values(), *norms]).tolist()
    check_ratio(worst, optim.ratio_tolerance)
    totals, grad_norms = values[: len(sums)], values[len(sums) :]
    check_weights(weight, [*totals, *grad_norms])
    means = {name: total / len(micro_steps) for name, total in zip(sums, totals, strict=True)}
    return {**means, "grad_norm": grad_norms, "max_ratio_error": worst}


def run_micro_step(
    policy: Policy,
    loss: Callable[[Policy, Batch, Config], Loss],
    batch: Batch,
    config: Config,
    share: int,
    weight: float = 1.0,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run forward and backward of one of the `share` micro-steps of an optimizer step.

    The gradients are those of `weight` times the loss, times `loss_scale`. Returns the objective's
    metrics and the largest |ratio - 1| (0 for a loss without ratio), all on the device.
    """
    out = loss(policy, batch, config)
    scale = loss_scale(policy, len(batch.sample), share) * weight
    # Not the forward too: torch.compile would compile it again for another setting.
    with deterministic.deterministic_backward():
        (out.loss / (share / scale)).backward()
    if out.ratio is None:
        return out.metrics, torch.zeros((), device=policy.device)
    return out.metrics, (out.ratio - 1).abs().amax()


def loss_scale(policy: Policy, rows: int, share: int) -> float:
    """Choose the factor of the loss of a micro-step of `rows` samples, one of `share`.

    A mean over rows, elements and micro-steps has gradients of about 1 / (rows x elements x share)
    in a velocity, 1e-8 for SD3.5-medium, and float16 has nothing below 6e-8. Scaled they are about
    1/16, which leaves room for sums over the tokens below 65504. A power of two, which is divided
    out of the float32 gradients without a rounding. 1 for other types, whose range is float32's.
    """
    if policy.dtype != torch.float16:
        return 1.0
    return 2.0 ** math.floor(math.log2(rows * math.prod(policy.latent_shape) * share / 16))


class MicroStep:
    """Runs micro-steps: `run_micro_step` or, with graphs, its replayed form.

    With graphs gradients stay at their addresses.
    """

    def __init__(
        self, policy: Policy, objective: Objective, graphs: cuda_graphs.Graphs | None
    ) -> None:
        self.policy, self.objective, self.graphs = policy, objective, graphs
        self.parameters = list(policy.parameters()) if graphs else []
        self.gradients = [torch.zeros_like(p) for p in self.parameters]
        self._scale = 1.0

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Add up gradients from 0 while no parameter changes; then take out `loss_scale`."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.zero_()
        with self.policy.frozen_weights(fixed=self.graphs is not None):
            yield
        if self._scale != 1:
            gradients = [p.grad for p in self.policy.parameters() if p.grad is not None]
            torch._foreach_mul_(gradients, 1 / self._scale)

    def __call__(
        self,
        batch: Batch,
        config: Config,
        share: int,
        loss: Callable[[Policy, Batch, Config], Loss] | None = None,
        weight: float = 1.0,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run `run_micro_step` on `batch`, one of the `share` micro-steps of an optimizer step.

        Args:
            loss: in place of the objective's.
            weight: factor of the loss.
        """
        # The same in all micro-steps of an optimizer step, which have as many samples each.
        self._scale = loss_scale(self.policy, len(batch.sample), share)
        arguments = (self.policy, loss or self.objective.loss, batch, config, share, weight)
        if self.graphs is None:
            return run_micro_step(*arguments)
        changes, option = self.gradients, "optim.capture"
        return self.graphs(run_micro_step, *arguments, changes=changes, option=option)


def check_weights(weight: float, figures: Sequence[float]) -> None:
    """Raise DivergedError if the largest |weight| after an update, `weight`, is no finite number,
    though all `figures` of the update are."""
    if not math.isfinite(weight) and all(map(math.isfinite, figures)):
        raise DivergedError(
            f"the largest of the trained weights is {weight} after an update whose loss and "
            "gradients were finite, but a finite number is expected; start again with a lower "
            "optim.lr or optim.weight_decay."
        )


def check_ratio(error: float, tolerance: float) -> None:
    """Raise unless the largest |ratio - 1| of the first update, `error`, is within `tolerance`."""
    if math.isnan(error):
        raise DivergedError(
            "the ratios of the first update after a rollout are NaN, but finite numbers are "
            "expected, as the same weights gave the rollout finite velocities; try another "
            "policy.attention or policy.dtype, or start again with a lower optim.lr."
        )
    if error > tolerance:
        raise RatioError(
            f"the first update after a rollout saw |ratio - 1| up to {error:.3g}, but at most "
            f"{tolerance:g} is allowed (optim.ratio_tolerance), because rollout and update must "
            "compute the same velocities; use the same kernels, dtype and batch size in both, or "
            "raise the tolerance."
        )
