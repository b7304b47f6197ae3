"""Objectives: what an update learns from, and what it minimises. One row of `OBJECTIVES` each.

`optim.objective` names the row. The loop (train.py, update.py) reads from it how rewards become
advantages and weights, which samples a micro-step looks at, and the loss.

`grpo` is Flow-GRPO's loss (arXiv 2505.05470, equation 5), with r the ratio of the step's
probability now to that in the rollout, A the advantage and v, v_ref the velocities with and without
adapters:

    policy = max(-A r, -A clip(r, 1 - c, 1 + c))        A clamped to +- adv_clip
    loss   = mean over rows [ policy + beta K B^2 mean (v - v_ref)^2 ]

Deliberate departures from the paper and from flow_grpo:

1. With step_weighting "std" the policy term of a step is weighted by C / |B| (mean 1 over the steps
   that may be trained). The gradient of log_prob in v is (B / C) eps / D, so flow_grpo's steps
   differ in scale by a factor of about 30 (SD3, T = 10), and the late ones decide the direction.
   The KL term is not weighted.
2. Rows of a dropped group (a reward that failed) have weight 0; the others are scaled up in turn.
3. The reference velocity is computed only if beta > 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo.advantages import advantages
from flowgrpo.config import Config, ConfigError, OptimConfig
from flowgrpo.config.validation import similar
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import grpo_loss


@dataclass(frozen=True)
class Loss:
    """One micro-step's loss and what is logged of it; all on the device."""

    loss: Tensor
    """0-dim, to be differentiated."""
    metrics: dict[str, Tensor]
    """0-dim each, averaged over the micro-steps of an iteration."""
    ratio: Tensor | None
    """float32 [rows]: checked to be 1 in the first update; None where the loss has no ratio."""


@dataclass(frozen=True)
class Objective:
    """One way to learn from the images of an iteration and their rewards."""

    weigh: Callable[[Tensor, OptimConfig], tuple[Tensor, Tensor]]
    """Rewards float64 [K, G] -> advantages and weights, float32 [B] each."""
    turns: Callable[[Config], list[range]]
    """The micro-steps that every chunk of rows takes, each with the numbers that `gather` gets."""
    gather: Callable[[Schedule, Experience, slice, range], Batch]
    """A chunk's rows and the numbers of one micro-step -> the samples that it looks at."""
    loss: Callable[[Policy, Batch, Config], Loss]
    """What the micro-step minimises. Captured in a CUDA graph: it must not wait for the device."""


def trained_steps(config: Config) -> list[range]:
    """Split the trained steps 0 to W - 1 of a row: `optim.steps_per_forward` a micro-step."""
    steps, size = range(config.sample.trained_steps), config.optim.steps_per_forward
    return [steps[i : i + size] for i in steps[::size]]


def gather_trained_steps(
    schedule: Schedule, experience: Experience, rows: slice, turns: range
) -> Batch:
    """Collect the chunk `rows` at its trained steps number `turns`, one step after another."""
    trajectory = experience.trajectory
    index = torch.arange(rows.start, rows.stop, device=trajectory.trained_steps.device)
    index = index.repeat(len(turns))
    step = trajectory.trained_steps[turns.start : turns.stop, rows].flatten()
    old_velocities, uncond = trajectory.velocities, experience.uncond
    return Batch(
        sample=trajectory.latents[step, index],
        prev_sample=trajectory.latents[step + 1, index],
        sigma=schedule.sigmas[step],
        transitions=schedule.transitions,
        table_row=trajectory.table_rows[turns.start : turns.stop, rows].flatten(),
        conditioning=experience.conditioning.rows_at(trajectory.groups[index], step),
        uncond=None if uncond is None else uncond.rows_at(torch.zeros_like(step), step),
        old_log_prob=trajectory.log_probs[step, index],
        old_velocity=None if old_velocities is None else old_velocities[step, index],
        advantages=experience.advantages[index],
        weights=experience.weights[index],
        step_weights=schedule.weights[step],
    )


def grpo(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute Flow-GRPO's loss of one micro-step."""
    optim = config.optim
    inputs = (batch.sample, batch.sigma, batch.conditioning, batch.uncond)
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if optim.beta > 0:
        with torch.no_grad(), policy.reference():
            reference = velocities(policy, *inputs)
    now, uncond = velocities(policy, *inputs)
    weight = batch.weights
    out = grpo_loss(
        now,
        batch.sample,
        batch.prev_sample,
        batch.old_log_prob,
        batch.advantages,
        batch.transitions,
        batch.table_row,
        uncond_velocity=uncond,
        guidance_scale=config.sample.guidance_scale,
        ref_velocity=reference[0],
        ref_uncond_velocity=reference[1],
        kl_weight=optim.beta,
        clip_range=optim.clip_range,
        adv_clip=optim.adv_clip,
        row_weight=weight * batch.step_weights if optim.step_weighting == "std" else weight,
        kl_row_weight=weight,
        old_velocity=batch.old_velocity if optim.guard else None,
    )
    metrics = {
        "loss": out.loss.detach(),
        "policy_loss": out.policy_loss.detach(),
        "kl": out.kl.detach(),
        "clip_fraction": out.clip_fraction.detach(),
    }
    return Loss(out.loss, metrics, out.ratio.detach())


OBJECTIVES: dict[str, Objective] = {
    "grpo": Objective(
        weigh=advantages, turns=trained_steps, gather=gather_trained_steps, loss=grpo
    ),
}
"""`optim.objective` -> its row."""


def objective_of(config: Config) -> Objective:
    """Look up the row that `optim.objective` names.

    Raises:
        ConfigError: there is none by that name.
    """
    name = config.optim.objective
    if name not in OBJECTIVES:
        raise ConfigError(
            f"optim.objective is {name!r}{similar(name, OBJECTIVES)}, but one of "
            f"{', '.join(OBJECTIVES)} is expected; choose one."
        )
    return OBJECTIVES[name]
