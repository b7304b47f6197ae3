"""The interface of an objective, and what its loss returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from flowgrpo.config import Config, OptimConfig
from flowgrpo.policies import Policy
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule

MIXTURE = ("optim.sft_weight", "sample.curated")
"""Fields of a mixture with supervised learning, for `Objective.options`."""
SCOUTS = ("sample.scouts", "sample.scout_forwards")
"""Fields of scouts, for `Objective.options` of those that compare the rewards of a group."""


@dataclass(frozen=True)
class Loss:
    """Loss of one micro-step and its metrics; all on the device."""

    loss: Tensor
    """0-dim, to be differentiated."""
    metrics: dict[str, Tensor]
    """0-dim each, averaged over the micro-steps of an iteration."""
    ratio: Tensor | None
    """float32 [M]: checked to be 1 in the first update; None for a loss without a ratio."""


@dataclass(frozen=True)
class Objective:
    """One way to learn from the images of an iteration and their rewards."""

    weigh: Callable[[Tensor, OptimConfig], tuple[Tensor, Tensor]]
    """Rewards float64 [K, G], NaN where they failed -> advantages and weights, float32 [B] each."""
    micro_steps: Callable[[Config, int], list[tuple[slice, range]]]
    """Micro-steps of so many rows in their order, each with the rows and numbers for `gather`.

    The optimizer steps take equal shares of those of an iteration, so `optim.updates_per_iteration`
    divides their number. Rows may also number pairs or groups, see `by_rows`.
    """
    prepare: Callable[[Policy, Schedule, Experience, Config], tuple[Schedule, Experience]]
    """Called once, before the first micro-step, with the weights and the schedule of the rollout.
    Returns the schedule and the experience that `gather` gets."""
    gather: Callable[[Schedule, Experience, slice, range], Batch]
    """Rows and numbers of one micro-step -> its samples, M of them in every micro-step."""
    loss: Callable[[Policy, Batch, Config], Loss]
    """The loss of a micro-step. Captured in a CUDA graph, so it must not wait for the device."""
    rollout: Literal["stochastic", "deterministic", "none"] = "stochastic"
    """Sampler of the rollout: that of `sample.transition`, or the deterministic one, whose steps
    are not trained; then only the results are looked at, the last of a trajectory's states. none:
    the results are images or pairs of `sample.curated`, with advantages and weights 1."""
    reference: bool = False
    """The model before training is needed whatever `optim.beta` is."""
    old_policy: bool = False
    """Rollouts are those of an old policy, which follows the trained one (runs/state.py)."""
    options: tuple[str, ...] = ()
    """Fields of the configuration that this objective reads and not every other does. One that
    another objective lists, and this one does not, must have its default."""
    differentiable: bool = False
    """The rewards must pass a gradient on to the pixels: the loss asks them itself, on the host as
    well, so it cannot be captured."""
    offline: Objective | None = None
    """The row in its place where `sample.curated` is set: one without a rollout."""
    by_rows: bool = True
    """Micro-steps are of chunks of rows, in the order of the rollout, so that a process needs its
    own rows alone. Else they number groups or pairs, and it gets the results of all."""
    pairs: bool = False
    """Without a rollout: results are pairs, row p the better and row B/2 + p the worse of one."""
