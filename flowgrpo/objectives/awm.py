"""Advantage Weighted Matching (AWM, arXiv 2509.25050): the clipped policy gradient on re-noised
results.

The log-probability of a result is replaced by the matching error of it, noised anew (matching.py),
with A the advantage and v_old, v_ref the velocities at the rollout and before training:

    log p  = -w e(v)
    r      = exp(log p - log p of v_old)
    policy = max(-A r, -A clip(r, 1 - c, 1 + c))        A clamped to +- adv_clip
    loss   = mean over rows and levels [ policy + beta mean (v - v_ref)^2 ]

At r = 1 the gradient is that of A w e: what is better than its group is matched, what is worse is
moved away from. The rollout is the deterministic sampler's, and any step of it could be left out.

The authors' settings for SD3.5-M: 6 levels, lr 3e-4, advantages clamped to 1, clip range 1, beta
0.003 (GenEval, OCR) or 0.0001 (PickScore).

Deliberate departures from the paper and its code:

1. Their weight for SD3.5-M, "ghuber", takes a power of e, so that large errors count less; here
   `optim.level_weight` "normalized" does.
2. Their second KL, to an average of the weights, is left out.
3. With one optimizer step an iteration the old value is the present one: no forward computes it,
   the ratio is 1 by definition, and there is nothing to check.
4. Rows of a dropped group have weight 0, as in grpo.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flowgrpo.config import Config
from flowgrpo.objectives import matching
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import MIXTURE, SCOUTS, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import kernel_scale, velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import grpo_loss


def prepare(
    policy: Policy, schedule: Schedule, experience: Experience, config: Config
) -> tuple[Schedule, Experience]:
    """Draw the levels and, where an iteration has several optimizer steps, compute the old
    log-probabilities and the weights of kind "normalized" by the update's own forwards."""
    schedule, experience = matching.prepare(policy, schedule, experience, config)
    if config.optim.updates_per_iteration == 1:
        return schedule, experience
    log_probs = torch.zeros_like(experience.draws.sigmas)
    table = schedule.transitions
    micro_steps = matching.chunks_by_levels(config, len(experience.advantages))
    with policy.frozen_weights():
        for old in matching.old_forwards(policy, schedule, experience, micro_steps, config):
            batch, values = old.batch, (old.velocity, old.uncond, config)
            if config.optim.level_weight == "normalized":
                weights = matching.normalizer(batch, *values)
                table = matching.with_weights(table, batch.table_row, weights)
            batch = replace(batch, transitions=table)
            log_probs[old.draw, old.rows] = matching.score(batch, *values)
    draws = replace(experience.draws, log_probs=log_probs)
    return replace(schedule, transitions=table), replace(experience, draws=draws)


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute AWM's loss of one micro-step."""
    optim = config.optim
    reference = None
    if optim.beta > 0:
        reference = matching.reference_velocity(policy, batch, config)
    velocity, uncond = velocities(policy, *matching.inputs_of(batch, config))
    batch, old = matching.weighted(batch, velocity, uncond, config), batch.old_log_prob
    if old is None:
        old = matching.score(batch, velocity.detach(), uncond, config)
    out = grpo_loss(
        velocity,
        batch.sample,
        batch.prev_sample,
        old,
        batch.advantages,
        batch.transitions,
        batch.table_row,
        uncond_velocity=uncond,
        guidance_scale=kernel_scale(uncond, config.sample.guidance_scale),
        ref_velocity=reference,
        kl_weight=optim.beta,
        clip_range=optim.clip_range,
        adv_clip=optim.adv_clip,
        row_weight=batch.weights,
    )
    metrics = {
        "loss": out.loss.detach(),
        "policy_loss": out.policy_loss.detach(),
        "kl": out.kl.detach(),
        "matching_error": -out.log_prob.detach().mean(),
        "clip_fraction": out.clip_fraction.detach(),
    }
    return Loss(out.loss, metrics, None if batch.old_log_prob is None else out.ratio.detach())


OBJECTIVE = Objective(
    weigh=advantages,
    micro_steps=matching.chunks_by_levels,
    prepare=prepare,
    gather=matching.gather,
    loss=loss,
    rollout="deterministic",
    options=("optim.levels", "optim.level_weight", *MIXTURE, *SCOUTS),
)
