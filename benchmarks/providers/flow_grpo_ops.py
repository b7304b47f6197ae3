"""flow_grpo's step and loss, op for op: the baseline of the fused kernels.

`step` is flow_grpo's `sde_step_with_logprob` ('sde' branch): the step index of every row looked up
in the scheduler's timesteps (on a GPU two host synchronisations a row), sigmas indexed by a Python
list, inputs cast to float32, the same products and sums in the same order, the mean over all
dimensions but the batch. `loss` is the training script's micro-step: the step at the stored
prev_sample, clipped ratio, the KL to a reference step, and the metrics that the script keeps.
Nothing is fused, cached or left out, and nothing is added.

The lookup is apart from the arithmetic, so that torch.compile can be given the arithmetic as one
graph: its most favourable use, since the lookup's data-dependent control flow would break it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sigmas(NamedTuple):
    """sigma and sigma_prev [B, 1, ...] of each row's step, and the schedule's second sigma."""

    sigma: Tensor
    sigma_prev: Tensor
    sigma_max: float


class Scheduler:
    """Two tables that the step reads from a diffusers flow-match scheduler."""

    def __init__(self, sigmas: Tensor) -> None:
        self.sigmas = sigmas.float()
        self.timesteps = self.sigmas[:-1] * 1000.0

    def index_for_timestep(self, timestep: Tensor) -> int:
        """Step of a timestep: two waits for a GPU."""
        indices = (self.timesteps == timestep).nonzero()
        return indices[1 if len(indices) > 1 else 0].item()

    def lookup(self, timestep: Tensor, ndim: int) -> Sigmas:
        """Sigmas of the steps of timestep [B], for samples of `ndim` dimensions."""
        index = [self.index_for_timestep(t) for t in timestep]
        prev_index = [i + 1 for i in index]
        shape = (-1, *([1] * (ndim - 1)))
        return Sigmas(
            self.sigmas[index].view(shape),
            self.sigmas[prev_index].view(shape),
            self.sigmas[1].item(),
        )


def arithmetic(
    sigmas: Sigmas,
    model_output: Tensor,
    sample: Tensor,
    prev_sample: Tensor | None = None,
    noise_level: float = 0.7,
    noise: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(prev_sample, log_prob [B], mean, std_dev [B, 1, ...]) once the sigmas are known.

    noise: standard normals to use instead of drawing some, for comparisons.
    """
    model_output, sample = model_output.float(), sample.float()
    if prev_sample is not None:
        prev_sample = prev_sample.float()
    sigma, sigma_prev, sigma_max = sigmas
    dt = sigma_prev - sigma
    std_dev = torch.sqrt(sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))) * noise_level
    mean = (
        sample * (1 + std_dev**2 / (2 * sigma) * dt)
        + model_output * (1 + std_dev**2 * (1 - sigma) / (2 * sigma)) * dt
    )
    if prev_sample is None:
        if noise is None:
            noise = torch.randn(model_output.shape, device=sample.device, dtype=model_output.dtype)
        prev_sample = mean + std_dev * torch.sqrt(-1 * dt) * noise
    log_prob = (
        -((prev_sample.detach() - mean) ** 2) / (2 * ((std_dev * torch.sqrt(-1 * dt)) ** 2))
        - torch.log(std_dev * torch.sqrt(-1 * dt))
        - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    log_prob = log_prob.mean(dim=tuple(range(1, log_prob.ndim)))
    return prev_sample, log_prob, mean, std_dev


def guided(
    sigmas: Sigmas,
    velocity: Tensor,
    uncond: Tensor | None,
    scale: float,
    sample: Tensor,
    noise_level: float = 0.7,
    noise: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Guidance of the rollout, then the arithmetic of the step."""
    if uncond is not None:
        velocity = uncond + scale * (velocity - uncond)
    return arithmetic(sigmas, velocity, sample, None, noise_level, noise)


def micro_step(
    sigmas: Sigmas,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    ref_sigmas: Sigmas | None = None,
    ref_velocity: Tensor | None = None,
    beta: float = 0.0,
    clip_range: float = 1e-4,
    adv_clip: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one micro-step once the sigmas are known; backward is the caller's."""
    _, log_prob, mean, std_dev = arithmetic(sigmas, velocity, sample, prev_sample)
    if beta > 0:
        with torch.no_grad():
            _, _, mean_ref, _ = arithmetic(ref_sigmas, ref_velocity, sample, prev_sample)
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - clip_range, 1.0 + clip_range)
    policy_loss = torch.mean(torch.maximum(unclipped, clipped))
    total = policy_loss
    metrics = {
        "approx_kl": 0.5 * torch.mean((log_prob - old_log_prob) ** 2),
        "clipfrac": torch.mean((torch.abs(ratio - 1.0) > clip_range).float()),
        "clipfrac_gt_one": torch.mean((ratio - 1.0 > clip_range).float()),
        "clipfrac_lt_one": torch.mean((1.0 - ratio > clip_range).float()),
        "policy_loss": policy_loss,
        "ratio": ratio,
    }
    if beta > 0:
        dims = tuple(range(1, mean.ndim))
        kl_loss = ((mean - mean_ref) ** 2).mean(dim=dims, keepdim=True) / (2 * std_dev**2)
        metrics["kl_loss"] = kl_loss = torch.mean(kl_loss)
        total = policy_loss + beta * kl_loss
    return total, metrics


def step(scheduler: Scheduler, velocity, timestep, sample, uncond=None, scale=1.0):
    """One rollout step as flow_grpo runs it. timestep: [B]."""
    return guided(scheduler.lookup(timestep, sample.ndim), velocity, uncond, scale, sample)


def loss(
    scheduler: Scheduler, velocity, timestep, sample, prev_sample, old_log_prob, advantages,
    ref_velocity=None, beta: float = 0.0, compiled=None,
):  # fmt: skip
    """One micro-step as flow_grpo runs it, without backward. compiled: micro_step compiled."""
    sigmas = scheduler.lookup(timestep, sample.ndim)
    # The reference's step looks its indices up again.
    ref_sigmas = scheduler.lookup(timestep, sample.ndim) if beta > 0 else None
    return (compiled or micro_step)(
        sigmas, velocity, sample, prev_sample, old_log_prob, advantages, ref_sigmas, ref_velocity,
        beta,
    )  # fmt: skip
