"""DiffusionNFT (arXiv 2509.16117): towards what is better than its group, away from what is worse,
on re-noised results and without a likelihood.

With x_0 a result of the old policy's rollout, x_s = (1 - s) x_0 + s eps (matching.py), v_old and v
the velocities of the old and the trained policy there, A the advantage and b `optim.nft_beta`
(the loss on implicit positive and negative policies, with its self-normalised regression):

    r       = 1/2 + A / 2c                              A clamped to +- c, c = adv_clip
    v+, v-  = v_old + b (v - v_old), v_old - b (v - v_old)
    x+, x-  = x_s - s v+, x_s - s v-
    e+-     = mean (x+- - x_0)^2 / mean |x+- - x_0|     the divisor at least 1e-5, no gradient
    loss    = mean over rows and levels [ (c / b) (r e+ + (1 - r) e-) + beta mean (v - v_ref)^2 ]

With v = v_old both errors are equal, and the gradient is that of A e+: the direction of AWM with
`optim.level_weight` "normalized". The rollout is the deterministic sampler's, by the old policy
(runs/state.py), and v_old is computed once before the first optimizer step.

The authors' settings for SD3.5-M: b 1 or 0.1, beta 0.0001, lr 3e-4, old_decay 0.5, old_decay_rise
0.001, advantage_std "global"; every step of a rollout's schedule is a level, in random order.

Deliberate departures from the paper and its code:

1. Levels are drawn as in matching.py, `optim.levels` of them.
2. Rows of a dropped group have weight 0, as in grpo.py.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from flowgrpo.config import Config
from flowgrpo.objectives import matching
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import MIXTURE, SCOUTS, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import guide, kernel_scale, velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import nft_loss


def prepare(
    policy: Policy, schedule: Schedule, experience: Experience, config: Config
) -> tuple[Schedule, Experience]:
    """Draw the levels and compute the old policy's velocities, by the update's own forwards."""
    schedule, experience = matching.prepare(policy, schedule, experience, config)
    draws, scale = experience.draws, config.sample.guidance_scale
    shape = (*draws.sigmas.shape, *policy.latent_shape)
    # Guidance is computed in float32; without it a velocity is what the model returned.
    dtype = policy.dtype if experience.uncond is None else torch.float32
    old_velocities = torch.empty(shape, dtype=dtype, device=policy.device)
    micro_steps = matching.chunks_by_levels(config, len(experience.advantages))
    with policy.frozen_weights():
        for old in matching.old_forwards(policy, schedule, experience, micro_steps, config):
            old_velocities[old.draw, old.rows] = guide(old.velocity, old.uncond, scale)
    return schedule, replace(experience, draws=replace(draws, velocities=old_velocities))


def gather(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Re-noise the results of the chunk `rows`, which come as `prev_sample`."""
    batch = matching.gather(schedule, experience, rows, numbers)
    results = experience.trajectory.latents[-1, rows]
    return replace(batch, prev_sample=results.repeat(len(numbers), *[1] * (results.ndim - 1)))


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute DiffusionNFT's loss of one micro-step."""
    optim, bound = config.optim, config.optim.adv_clip
    reference = None
    if optim.beta > 0:
        reference = matching.reference_velocity(policy, batch, config)
    velocity, uncond = velocities(policy, *matching.inputs_of(batch, config))
    out = nft_loss(
        velocity,
        batch.sample,
        batch.prev_sample,
        batch.old_velocity,
        batch.sigma,
        0.5 + batch.advantages.clamp(-bound, bound) / (2 * bound),
        beta=optim.nft_beta,
        ref_velocity=reference,
        kl_weight=optim.beta,
        row_weight=batch.weights * (bound / optim.nft_beta),
        kl_row_weight=batch.weights,
        uncond_velocity=uncond,
        guidance_scale=kernel_scale(uncond, config.sample.guidance_scale),
    )
    metrics = {
        "loss": out.loss.detach(),
        "kl": out.kl.detach(),
        "positive_error": out.positive_error.mean(),
        "negative_error": out.negative_error.mean(),
        "old_deviation": out.old_deviation.mean(),
    }
    return Loss(out.loss, metrics, None)


OBJECTIVE = Objective(
    weigh=advantages,
    micro_steps=matching.chunks_by_levels,
    prepare=prepare,
    gather=gather,
    loss=loss,
    rollout="deterministic",
    old_policy=True,
    options=(
        "optim.levels",
        "optim.nft_beta",
        "optim.old_decay",
        "optim.old_decay_rise",
        *MIXTURE,
        *SCOUTS,
    ),
)
