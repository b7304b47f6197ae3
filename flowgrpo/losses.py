"""Objectives: what an update minimises over one chunk of rows at one trained step each.

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

from dataclasses import dataclass

import torch
from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.policies import Policy
from flowgrpo.records import Experience
from flowgrpo.rollout import Schedule, velocity
from flowgrpo_kernels import grpo_loss


@dataclass(frozen=True)
class Loss:
    """One micro-step's loss and what is logged of it; all on the device."""

    loss: Tensor
    """0-dim, to be differentiated."""
    metrics: dict[str, Tensor]
    """0-dim each, averaged over the micro-steps of an iteration."""
    ratio: Tensor
    """float32 [rows]."""


def grpo(
    policy: Policy, plan: Schedule, experience: Experience, rows: slice, turn: int, config: Config
) -> Loss:
    """Flow-GRPO's loss of the chunk `rows`, each row at its own trained step number `turn`."""
    trajectory, optim = experience.trajectory, config.optim
    place = trajectory.positions[turn, rows]
    step = trajectory.steps[turn, rows]
    index = torch.arange(rows.start, rows.stop, device=place.device)
    sample = trajectory.latents[place, index]
    prev_sample = trajectory.latents[place + 1, index]
    inputs = (
        sample,
        plan.sigmas[place],
        experience.conditioning.rows(trajectory.groups[rows]),
        experience.uncond,
    )
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    if optim.beta > 0:
        with torch.no_grad(), policy.reference():
            reference = velocity(policy, *inputs)
    now, uncond = velocity(policy, *inputs)
    weight = experience.weights[rows]
    out = grpo_loss(
        now,
        sample,
        prev_sample,
        trajectory.log_probs[place, index],
        experience.advantages[rows],
        plan.transitions,
        step,
        uncond_velocity=uncond,
        guidance_scale=config.sample.guidance_scale,
        ref_velocity=reference[0],
        ref_uncond_velocity=reference[1],
        kl_weight=optim.beta,
        clip_range=optim.clip_range,
        adv_clip=optim.adv_clip,
        row_weight=weight * plan.weights[place] if optim.step_weighting == "std" else weight,
        kl_row_weight=weight,
        old_velocity=trajectory.velocities[place, index] if optim.guard else None,
    )
    metrics = {
        "loss": out.loss.detach(),
        "policy_loss": out.policy_loss.detach(),
        "kl": out.kl.detach(),
        "clip_fraction": out.clip_fraction.detach(),
    }
    return Loss(out.loss, metrics, out.ratio.detach())
