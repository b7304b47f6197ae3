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
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrpo import cuda_graphs
from flowgrpo.config import Config
from flowgrpo.distributed import sharding
from flowgrpo.distributed.dealing import Dealing, deal
from flowgrpo.distributed.gradients import GradientSum
from flowgrpo.distributed.world import ALONE, World
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
    world: World = ALONE,
    dealing: Dealing | None = None,
) -> dict[str, Any]:
    """Take the optimizer steps of one iteration, each over an equal share of the micro-steps and,
    with `optim.sft_weight`, one more on images of the set `curated`.

    Of several processes each runs the micro-steps that `dealing` gives it (None: all), `experience`
    being of its own rows, and the last one those on curated images.

    Returns:
        The means of the objective's metrics over all micro-steps, the gradient norm of each
        optimizer step before clipping, and the largest |ratio - 1| before the first.
    """
    policy, objective, optim = micro_step.policy, micro_step.objective, config.optim
    if dealing is None:
        sample = config.sample
        micro_steps = objective.micro_steps(config, sample.rows)
        dealing = deal(
            micro_steps,
            optim.updates_per_iteration,
            sample.rows,
            sample.batch_size,
            most_leaves=config.run.leaves,
        )
    share = sum(map(len, dealing.order)) // optim.updates_per_iteration
    figures = Figures(policy.device)
    supervised, norms = bool(optim.sft_weight), []
    with world.together(lockstep=policy.sharded):
        with state.rollout_weights():
            schedule, experience = objective.prepare(policy, schedule, experience, config)
        # None without a weight: the set may be all that there is to learn from.
        supervision = None
        if supervised and world.rank == world.size - 1:
            supervision = curated.supervision(config, state.iteration)
    for number, leaves in enumerate(dealing.steps):
        with micro_step.accumulating(world, dealing, config, supervised) as gradients:
            for leaf in leaves:
                for rows, numbers in leaf.micro_steps:
                    batch = objective.gather(schedule, experience, rows, numbers)
                    metrics, deviation = micro_step(batch, config, share)
                    figures.add(metrics, deviation if number == 0 else None)
                gradients.add(leaf.number)
            if supervision is not None:
                batch, weight = supervision.batch(number), optim.sft_weight * share
                figures.add_supervised(micro_step(batch, config, share, supervise, weight)[0])
                gradients.add_extra()
        norms.append(state.step())
    state.follow()
    weight = sharding.largest(state.parameters.values())
    # The only read from the device since the rewards: it waits for all of the above.
    read, (weight, *grad_norms) = figures.read([weight, *norms])
    reads, weights = zip(*world.gather((read, weight)), strict=True)
    means, worst = mean_figures(reads, dealing)
    check_ratio(worst, optim.ratio_tolerance)
    # Written so that a NaN of any process stays one.
    weight = next(filter(math.isnan, weights), max(weights))
    check_weights(weight, [*means.values(), *grad_norms])
    return {**means, "grad_norm": grad_norms, "max_ratio_error": worst}


@dataclass(frozen=True)
class Read:
    """Figures of the micro-steps of one process."""

    metrics: list[dict[str, float]]
    """Those of each micro-step."""
    deviations: list[float]
    """Largest |ratio - 1| of each micro-step of the first optimizer step."""
    supervised: list[dict[str, float]]
    """Those of each micro-step on curated images."""


class Figures:
    """Collects the figures of micro-steps on the device, to be read at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._names: list[list[str]] = [[], []]
        self._metrics: list[Tensor] = []
        self._deviations: list[Tensor] = []
        self._supervised: list[Tensor] = []

    def add(self, metrics: dict[str, Tensor], deviation: Tensor | None) -> None:
        """Add those of one micro-step; `deviation` only in the first optimizer step."""
        self._names[0] = list(metrics)
        # New tensors: what a graph returned is overwritten by its next replay.
        self._metrics.append(torch.stack(list(metrics.values())))
        if deviation is not None:
            self._deviations.append(deviation.clone())

    def add_supervised(self, metrics: dict[str, Tensor]) -> None:
        """Add those of a micro-step on curated images."""
        self._names[1] = list(metrics)
        self._supervised.append(torch.stack(list(metrics.values())))

    def read(self, others: Sequence[Tensor]) -> tuple[Read, list[float]]:
        """Read all figures, and `others`, 0-dim each, by one copy."""
        groups = (self._metrics, self._deviations, self._supervised, others)
        # In float32, as which all of them are computed but a reward's own.
        values = (value for group in groups for value in group)
        # Norms of weights that are kept in host memory lie there.
        flat = [value.to(self.device).reshape(-1).float() for value in values]
        values = iter(torch.cat(flat).tolist())

        def take(names: Sequence[str], count: int) -> list[dict[str, float]]:
            return [{name: next(values) for name in names} for _ in range(count)]

        metrics = take(self._names[0], len(self._metrics))
        deviations = [next(values) for _ in self._deviations]
        supervised = take(self._names[1], len(self._supervised))
        return Read(metrics, deviations, supervised), list(values)


def mean_figures(reads: Sequence[Read], dealing: Dealing) -> tuple[dict[str, float], float]:
    """Average the figures of all processes in the order of the micro-steps, and find the largest
    |ratio - 1|."""
    steps: dict[int, dict[str, float]] = {}
    for places, read in zip(dealing.order, reads, strict=True):
        steps |= zip(places.tolist(), read.metrics, strict=True)
    # One after the other, so that the order does not depend on the processes.
    means = _means([steps[number] for number in range(len(steps))])
    means |= _means([step for read in reads for step in read.supervised])
    deviations = [value for read in reads for value in read.deviations]
    nan = any(map(math.isnan, deviations))
    return means, math.nan if nan else max(deviations, default=0.0)


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: sum(step[name] for step in steps) / len(steps) for name in (steps or [{}])[0]}


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
    def accumulating(
        self, world: World, dealing: Dealing, config: Config, supervised: bool = False
    ) -> Iterator[GradientSum]:
        """Add up gradients of all processes from 0 while no parameter changes; then take out
        `loss_scale`. `supervised`: the last process adds those of curated images."""
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient.zero_()
        parameters = self.parameters or list(self.policy.parameters())
        fixed, tree = self.graphs is not None, config.reduction == "tree"
        summed = any(map(sharding.is_sharded, parameters))
        gradients = GradientSum(parameters, world, dealing, fixed, tree, summed)
        with world.together(lockstep=self.policy.sharded), self.policy.frozen_weights(fixed=fixed):
            yield gradients
        gradients.finish(supervised)
        if self._scale != 1:
            reached = [p.grad for p in parameters if p.grad is not None]
            torch._foreach_mul_(reached, 1 / self._scale)

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
