"""On-policy distillation (OPD): the student's steps are pulled to a teacher's, on the student's own
samples.

The teacher is the same model with another adapter, `optim.teacher`. On the trained steps of the
student's rollout, with v and v_teacher the velocities after guidance, the loss is the KL of the
steps' Gaussians, in the convention of `optim.kl` (flowgrpo_kernels.transitions):

    loss = mean over rows and trained steps of K B^2 mean (v - v_teacher)^2

It is on-policy distillation as for language models (GKD, arXiv 2306.13649) with the reverse KL,
which is exact here, for Gaussians. Rewards are computed and logged, and do not count.

Deliberate departures:

1. Every step of the window counts alike, whatever its ratio: the samples are those of the rollout
   in all optimizer steps of an iteration.
2. `optim.beta` is not read: the KL is to the teacher.
3. A row counts also where its reward failed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.config import Config, OptimConfig
from flowgrpo.objectives import grpo
from flowgrpo.objectives.interface import Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import kernel_scale, velocities
from flowgrpo.records import Batch
from flowgrpo_kernels import grpo_loss


def weigh(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Return advantages 0 and weights 1 for the rows of rewards [K, G], float32 [B] each."""
    return torch.zeros(rewards.numel()), torch.ones(rewards.numel())


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute the KL to the teacher of one micro-step."""
    scale = config.sample.guidance_scale
    inputs = (batch.sample, batch.sigma, batch.conditioning, batch.uncond, scale)
    with torch.no_grad(), policy.teacher():
        teacher, teacher_uncond = velocities(policy, *inputs)
    velocity, uncond = velocities(policy, *inputs)
    # With advantages 0 the policy term is 0, and so is its gradient.
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
        ref_velocity=teacher,
        ref_uncond_velocity=teacher_uncond,
        kl_weight=1.0,
        row_weight=batch.weights,
    )
    metrics = {"loss": out.loss.detach(), "teacher_kl": out.kl.detach()}
    return Loss(out.loss, metrics, out.ratio.detach())


OBJECTIVE = Objective(
    weigh=weigh,
    micro_steps=grpo.chunks_by_trained_steps,
    prepare=grpo.prepare,
    gather=grpo.gather_trained_steps,
    loss=loss,
    options=("optim.anchor", "optim.steps_per_forward", "optim.teacher"),
)
