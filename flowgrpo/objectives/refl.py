"""Reward feedback learning (ReFL, arXiv 2304.05977): the gradient of the reward itself, through the
decoded picture and one late step.

A rollout of the deterministic sampler gives the states x_i; one of the last `optim.refl_steps` = n
steps is drawn for each image. With s the noise level of the state, v the velocity after guidance
and R the weighted sum of the rewards:

    x_0  = x_i - s v(x_i, s)
    loss = mean over rows [ -R(decode(x_0)) + beta mean (v - v_ref)^2 ]

The gradient goes through one forward of the transformer, the decoder and the rewards, which must be
differentiable (rewards/differentiable.py). It is what the paper compares Flow-GRPO with (arXiv
2505.05470). With n = 1 it is DRaFT-1 (arXiv 2309.17400).

Deliberate departures from ReFL:

1. The loss is -R: theirs is the ReLU of 2 - R, times 0.001, beside a pretraining loss. A mixture
   with `optim.sft_weight` has the latter.
2. Their step is one of the last 10 of 40.
3. Pixels are not rounded to whole numbers on the way to the rewards, so R differs by a little from
   the reward that is logged, which is that of the rollout's images.
4. Rows of a dropped group have weight 0, as in grpo.py.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config, OptimConfig
from flowgrpo.config.validation import require
from flowgrpo.objectives import grpo
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import MIXTURE, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.sampling.rollout import chunks
from flowgrpo.sampling.schedule import Schedule


def weigh(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Return advantages 0, which the loss does not use, and the weights of the rows, float32 [B]
    each, from rewards [K, G]."""
    _, weights = advantages(rewards, config)
    return torch.zeros_like(weights), weights


def micro_steps(config: Config, rows: int) -> list[tuple[slice, range]]:
    """List the rollout's chunks of rows, in its order."""
    steps, trained = config.sample.steps, config.optim.refl_steps
    require(
        trained <= steps,
        f"optim.refl_steps is {trained}, but a rollout has {steps} steps (sample.steps); lower it.",
    )
    return [(chunk, range(1)) for chunk in chunks(rows, config.sample.batch_size)]


def prepare(
    policy: Policy, schedule: Schedule, experience: Experience, config: Config
) -> tuple[Schedule, Experience]:
    """Draw the step of each row, in place of trained steps, give each its prompt, and prepare the
    conditioning."""
    trajectory, last = experience.trajectory, config.optim.refl_steps
    rows = np.arange(config.sample.rows) if experience.rows is None else experience.rows.numpy()
    place = (config.run.seed, seeds.LEVEL, experience.iteration, rows)
    steps = torch.from_numpy(config.sample.steps - 1 - seeds.below(last, *place))[None]
    trajectory = replace(trajectory, trained_steps=steps.to(policy.device))
    prompts = experience.prompts.take(rows // config.sample.group_size)
    experience = replace(experience, trajectory=trajectory, prompts=prompts)
    return schedule, grpo.with_prepared_conditioning(policy, schedule, experience)


def gather(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Collect the states of the chunk `rows` at the steps that were drawn for them."""
    trajectory = experience.trajectory
    index = torch.arange(rows.start, rows.stop, device=trajectory.trained_steps.device)
    step, groups = trajectory.trained_steps[0, rows], trajectory.groups[rows]
    uncond = experience.uncond
    return Batch(
        sample=trajectory.latents[step, index],
        prev_sample=trajectory.latents[step + 1, index],
        sigma=schedule.sigmas[step],
        transitions=schedule.transitions,
        # Below the stochastic steps the table has the deterministic ones.
        table_row=schedule.steps + step,
        conditioning=experience.conditioning.rows_at(groups, step),
        uncond=None if uncond is None else uncond.rows_at(torch.zeros_like(step), step),
        advantages=experience.advantages[rows],
        weights=experience.weights[rows],
        prompts=experience.prompts.take(range(rows.start, rows.stop)),
    )


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute the rewards of the predicted pictures of one micro-step, with their gradient."""
    optim, scale = config.optim, config.sample.guidance_scale
    inputs = (batch.sample, batch.sigma, batch.conditioning, batch.uncond, scale)
    velocity, uncond = velocities(policy, *inputs)
    guided = guide(velocity, None if uncond is None else uncond.detach(), scale).float()
    level = batch.sigma.view(-1, *[1] * (guided.ndim - 1))
    pixels = policy.pixels(batch.sample - level * guided)
    pixels = (pixels / 2 + 0.5).clamp(0, 1) * 255
    texts, metadata = list(batch.prompts.texts), list(batch.prompts.metadata)
    scores = sum(
        weight * of_pixels(pixels, texts, metadata).to(guided)
        for weight, of_pixels in differentiable_rewards(config.reward)
    )
    # Written so that a row of weight 0 adds 0 whatever its score.
    value = torch.where(batch.weights == 0, 0.0, batch.weights * -scores).mean()
    kl = torch.zeros_like(value)
    if optim.beta > 0:
        with torch.no_grad(), policy.reference():
            reference = guide(*velocities(policy, *inputs), scale).float()
        kl = (batch.weights * (guided - reference).square().flatten(1).mean(dim=1)).mean()
    total = value + optim.beta * kl
    metrics = {"loss": total, "kl": kl, "predicted_reward": scores.mean()}
    return Loss(total, {name: figure.detach() for name, figure in metrics.items()}, None)


OBJECTIVE = Objective(
    weigh=weigh,
    micro_steps=micro_steps,
    prepare=prepare,
    gather=gather,
    loss=loss,
    rollout="deterministic",
    options=("optim.refl_steps", *MIXTURE),
    differentiable=True,
)
