"""Objectives: what an update minimises over a batch of rows at one trained step each.

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

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.policies import Policy
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.rollout import Schedule, guided, prepared, velocity
from flowgrpo_kernels import grpo_loss, log_prob


@dataclass(frozen=True)
class Loss:
    """One micro-step's loss and what is logged of it; all on the device."""

    loss: Tensor
    """0-dim, to be differentiated."""
    metrics: dict[str, Tensor]
    """0-dim each, averaged over the micro-steps of an iteration."""
    ratio: Tensor
    """float32 [rows]."""


def as_rolled_out(policy: Policy, plan: Schedule, experience: Experience) -> Experience:
    """`experience` with the conditioning of its rollout: the same products, so the same bits."""
    given = experience.conditioning, experience.uncond
    conditioning, uncond = prepared(policy, plan, *given)
    return replace(experience, conditioning=conditioning, uncond=uncond)


def gather(plan: Schedule, experience: Experience, rows: slice, turns: range) -> Batch:
    """The chunk `rows` at its trained steps number `turns`, one after another."""
    trajectory = experience.trajectory
    index = torch.arange(rows.start, rows.stop, device=trajectory.positions.device)
    index = index.repeat(len(turns))
    place = trajectory.positions[turns.start : turns.stop, rows].flatten()
    velocities, uncond = trajectory.velocities, experience.uncond
    return Batch(
        sample=trajectory.latents[place, index],
        prev_sample=trajectory.latents[place + 1, index],
        sigma=plan.sigmas[place],
        transitions=plan.transitions,
        step=trajectory.steps[turns.start : turns.stop, rows].flatten(),
        conditioning=experience.conditioning.rows_at(trajectory.groups[index], place),
        uncond=None if uncond is None else uncond.rows_at(torch.zeros_like(place), place),
        old_log_prob=trajectory.log_probs[place, index],
        old_velocity=None if velocities is None else velocities[place, index],
        advantages=experience.advantages[index],
        weights=experience.weights[index],
        step_weights=plan.weights[place],
    )


def grpo(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Flow-GRPO's loss of one micro-step."""
    optim = config.optim
    inputs = (batch.sample, batch.sigma, batch.conditioning, batch.uncond)
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if optim.beta > 0:
        with torch.no_grad(), policy.reference():
            reference = velocity(policy, *inputs)
    now, uncond = velocity(policy, *inputs)
    weight = batch.weights
    out = grpo_loss(
        now,
        batch.sample,
        batch.prev_sample,
        batch.old_log_prob,
        batch.advantages,
        batch.transitions,
        batch.step,
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


def replay(
    policy: Policy,
    plan: Schedule,
    experience: Experience,
    micro_steps: Sequence[tuple[slice, range]],
    config: Config,
) -> Experience:
    """`experience` with the old log-probabilities computed again, by the forwards of the update.

    Their ratios are then 1 whatever computed the rollout, as long as one forward repeats itself:
    the anchor for forwards that differ from the rollout's in kernels or number of rows. The price
    is one forward for each trained step.
    """
    trajectory = experience.trajectory
    log_probs = trajectory.log_probs.clone()
    velocities = None if trajectory.velocities is None else trajectory.velocities.clone()
    for rows, turns in micro_steps:
        batch = gather(plan, experience, rows, turns)
        # With gradients, which nothing uses: without them a forward may take other kernels.
        now, uncond = velocity(policy, batch.sample, batch.sigma, batch.conditioning, batch.uncond)
        now, uncond = now.detach(), None if uncond is None else uncond.detach()
        scale = config.sample.guidance_scale
        found = log_prob(
            now,
            batch.sample,
            batch.prev_sample,
            batch.transitions,
            batch.step,
            uncond_velocity=uncond,
            guidance_scale=scale,
        )
        place = trajectory.positions[turns.start : turns.stop, rows].flatten()
        index = torch.arange(rows.start, rows.stop, device=place.device).repeat(len(turns))
        log_probs[place, index] = found
        if velocities is not None:
            velocities[place, index] = guided(now, uncond, scale)
    anchored = replace(trajectory, log_probs=log_probs, velocities=velocities)
    return replace(experience, trajectory=anchored)
