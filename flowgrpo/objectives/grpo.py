"""Flow-GRPO: the clipped policy gradient on the stochastic steps of a rollout.

The loss is that of the paper (arXiv 2505.05470, equation 5), with r the ratio of the step's
probability now to that in the rollout, A the advantage and v, v_ref the velocities with and without
adapters:

    policy = max(-A r, -A clip(r, 1 - c, 1 + c))        A clamped to +- adv_clip
    loss   = mean over rows [ policy + beta K B^2 mean (v - v_ref)^2 ]

With optim.guard the ratio is GRPO-Guard's (arXiv 2510.22319; flowgrpo_kernels.grpo_loss). With
optim.dppo there is no clip but Flow-DPPO's mask, with v_old the velocity of the rollout and d the
threshold: what has moved away further than d gives no gradient until it is back.

    KL     = B^2 / (2 C^2) mean (v - v_old)^2           of the step's Gaussians, per element
    policy = -A r, or 0 where KL >= d and A log r > 0

Deliberate departures from the paper and from flow_grpo:

1. With step_weighting "std" the policy term of a step is weighted by C / |B| (mean 1 over the steps
   that may be trained). The gradient of log_prob in v is (B / C) eps / D, so flow_grpo's steps
   differ in scale by a factor of about 30 (SD3, T = 10), and the late ones decide the direction.
   The KL term is not weighted.
2. Rows of a dropped group (a reward that failed) have weight 0; the others are scaled up in turn.
3. The reference velocity is computed only if beta > 0.
4. Flow-DPPO's KL is that of the whole step, as its authors' with `add_kl_coefficient`.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from flowgrpo.config import Config
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import MIXTURE, SCOUTS, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import guide, kernel_scale, velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.rollout import chunks, prepare_both
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import grpo_loss, log_prob
from flowgrpo_kernels.transitions import COLUMNS


def chunks_by_trained_steps(config: Config, rows: int) -> list[tuple[slice, range]]:
    """Pair the rollout's chunks of rows, in its order, with the trained steps 0 to W - 1 of a row,
    `optim.steps_per_forward` of them a micro-step."""
    steps, size = range(config.sample.trained_steps), config.optim.steps_per_forward
    return [
        (chunk, steps[i : i + size])
        for chunk in chunks(rows, config.sample.batch_size)
        for i in steps[::size]
    ]


def prepare(
    policy: Policy, schedule: Schedule, experience: Experience, config: Config
) -> tuple[Schedule, Experience]:
    """Give the experience the conditioning of its rollout and, with `optim.anchor` "replay", the
    old log-probabilities of the update's own forwards."""
    experience = with_prepared_conditioning(policy, schedule, experience)
    if config.optim.anchor == "replay":
        with policy.frozen_weights():
            experience = replay(policy, schedule, experience, config)
    return schedule, experience


def with_prepared_conditioning(
    policy: Policy, schedule: Schedule, experience: Experience
) -> Experience:
    """Return `experience` with its conditioning prepared for `schedule`, as the rollout had it."""
    conditioning, uncond = prepare_both(
        policy, schedule, experience.conditioning, experience.uncond
    )
    return replace(experience, conditioning=conditioning, uncond=uncond)


def replay(
    policy: Policy, schedule: Schedule, experience: Experience, config: Config
) -> Experience:
    """Return `experience` with the old log-probabilities computed anew, by the update's forwards.

    Their ratios are then 1 whatever computed the rollout, as long as one forward repeats itself:
    the anchor for forwards that differ from the rollout's in kernels or number of rows. The price
    is one forward for each micro-step.
    """
    trajectory, scale = experience.trajectory, config.sample.guidance_scale
    log_probs = trajectory.log_probs.clone()
    old_velocities = None if trajectory.velocities is None else trajectory.velocities.clone()
    for rows, numbers in chunks_by_trained_steps(config, len(experience.advantages)):
        batch = gather_trained_steps(schedule, experience, rows, numbers)
        # With gradients, which nothing uses: without them a forward may take other kernels.
        with policy.in_parts(len(numbers)):
            velocity, uncond = velocities(
                policy, batch.sample, batch.sigma, batch.conditioning, batch.uncond, scale
            )
        velocity, uncond = velocity.detach(), None if uncond is None else uncond.detach()
        index, step = _rows_and_steps(experience, rows, numbers)
        log_probs[step, index] = log_prob(
            velocity,
            batch.sample,
            batch.prev_sample,
            batch.transitions,
            batch.table_row,
            uncond_velocity=uncond,
            guidance_scale=kernel_scale(uncond, scale),
        )
        if old_velocities is not None:
            old_velocities[step, index] = guide(velocity, uncond, scale)
    anchored = replace(trajectory, log_probs=log_probs, velocities=old_velocities)
    return replace(experience, trajectory=anchored)


def _rows_and_steps(experience: Experience, rows: slice, numbers: range) -> tuple[Tensor, Tensor]:
    """List the rows of a micro-step and the trained steps they are at, int64 [M] each: all rows at
    their first step, then all at their next."""
    trained_steps = experience.trajectory.trained_steps
    index = torch.arange(rows.start, rows.stop, device=trained_steps.device)
    step = trained_steps[numbers.start : numbers.stop, rows].flatten()
    return index.repeat(len(numbers)), step


def gather_trained_steps(
    schedule: Schedule, experience: Experience, rows: slice, numbers: range
) -> Batch:
    """Collect the chunk `rows` at its trained steps `numbers`, of 0 to W - 1."""
    trajectory = experience.trajectory
    index, step = _rows_and_steps(experience, rows, numbers)
    old_velocities, uncond = trajectory.velocities, experience.uncond
    return Batch(
        sample=trajectory.latents[step, index],
        prev_sample=trajectory.latents[step + 1, index],
        sigma=schedule.sigmas[step],
        transitions=schedule.transitions,
        table_row=trajectory.table_rows[numbers.start : numbers.stop, rows].flatten(),
        conditioning=experience.conditioning.rows_at(trajectory.groups[index], step),
        uncond=None if uncond is None else uncond.rows_at(torch.zeros_like(step), step),
        advantages=experience.advantages[index],
        weights=experience.weights[index],
        old_log_prob=trajectory.log_probs[step, index],
        old_velocity=None if old_velocities is None else old_velocities[step, index],
        step_weights=schedule.weights[step],
    )


@torch.no_grad()
def strayed(batch: Batch, velocity: Tensor, uncond: Tensor | None, config: Config) -> Tensor:
    """Tell which samples are past `optim.dppo_threshold` and move further away, bool [M]."""
    scale, table = config.sample.guidance_scale, batch.transitions.table[batch.table_row]
    b, c = table[:, COLUMNS.index("B")], table[:, COLUMNS.index("C")]
    new_log_prob = log_prob(
        velocity,
        batch.sample,
        batch.prev_sample,
        batch.transitions,
        batch.table_row,
        uncond_velocity=uncond,
        guidance_scale=kernel_scale(uncond, scale),
    )
    step = guide(velocity, uncond, scale).float() - batch.old_velocity.float()
    kl = b.square() / (2 * c.square()) * step.flatten(1).square().mean(dim=1)
    away = batch.advantages * (new_log_prob - batch.old_log_prob) > 0
    return (kl >= config.optim.dppo_threshold) & away


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute Flow-GRPO's loss of one micro-step."""
    optim, scale = config.optim, config.sample.guidance_scale
    inputs = (batch.sample, batch.sigma, batch.conditioning, batch.uncond, scale)
    reference: tuple[Tensor | None, Tensor | None] = (None, None)
    with policy.in_parts(optim.steps_per_forward):
        if optim.beta > 0:
            with torch.no_grad(), policy.reference():
                reference = velocities(policy, *inputs)
        velocity, uncond = velocities(policy, *inputs)
    weights, clip_range = batch.weights, optim.clip_range
    row_weight = weights * batch.step_weights if optim.step_weighting == "std" else weights
    if optim.dppo:
        inside = ~strayed(batch, velocity, uncond, config)
        row_weight, clip_range = row_weight * inside, (1.0, math.inf)
    out = grpo_loss(
        velocity,
        batch.sample,
        batch.prev_sample,
        batch.old_log_prob,
        batch.advantages,
        batch.transitions,
        batch.table_row,
        uncond_velocity=uncond,
        guidance_scale=kernel_scale(uncond, scale),
        ref_velocity=reference[0],
        ref_uncond_velocity=reference[1],
        kl_weight=optim.beta,
        clip_range=clip_range,
        adv_clip=optim.adv_clip,
        row_weight=row_weight,
        kl_row_weight=weights,
        old_velocity=batch.old_velocity if optim.guard else None,
    )
    metrics = {
        "loss": out.loss.detach(),
        "policy_loss": out.policy_loss.detach(),
        "kl": out.kl.detach(),
        "clip_fraction": out.clip_fraction.detach(),
    }
    if optim.dppo:
        metrics["mask_fraction"] = 1 - inside.float().mean()
    return Loss(out.loss, metrics, out.ratio.detach())


OBJECTIVE = Objective(
    weigh=advantages,
    micro_steps=chunks_by_trained_steps,
    prepare=prepare,
    gather=gather_trained_steps,
    loss=loss,
    options=(
        "optim.anchor",
        "optim.guard",
        "optim.dppo",
        "optim.dppo_threshold",
        "optim.steps_per_forward",
        "optim.split_forward",
        *MIXTURE,
        *SCOUTS,
    ),
)
