"""Rewards -> advantages: how much better than its group an image is.

    advantage_kg = (r_kg - mean_g r_kg) / (std + 1e-4)

std is the population standard deviation of the row's group (the paper, equation 4), of all rewards
of the iteration (flow_grpo's global_std) or absent (Dr. GRPO). A group whose rewards are all equal
says nothing, and gets exactly 0: its rows stay in the batch, so the geometry of the forwards stays.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.config import OptimConfig

EPS = 1e-4


def advantages(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Compute advantages and weights of the rows, float32 [K*G] each, from rewards [K, G].

    A group with a reward that is not finite is dropped: advantage 0 and weight 0; the weights of
    the other rows are scaled so that the mean over all rows is 1. If no group is left, all are 0.
    """
    if rewards.ndim != 2:
        raise ValueError(
            f"rewards has shape {tuple(rewards.shape)}, but [K, G] (prompts, samples of a prompt) "
            "is expected."
        )
    rewards = rewards.to(torch.float64)
    complete = rewards.isfinite().all(dim=1, keepdim=True)
    # Dropped groups become 0 before any arithmetic, so that NaN cannot spread.
    rewards = rewards.masked_fill(~complete, 0.0)
    # The mean of equal numbers may differ from them in the last bit; a comparison does not.
    equal = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)
    centred = (rewards - rewards.mean(dim=1, keepdim=True)).masked_fill(equal, 0.0)
    if config.advantage_std == "group":
        centred = centred / (rewards.std(dim=1, correction=0, keepdim=True) + EPS)
    elif config.advantage_std == "global" and complete.any():
        centred = centred / (rewards[complete[:, 0]].std(correction=0) + EPS)
    weights = complete.expand_as(rewards).to(torch.float32)
    weights = weights / weights.mean().clamp(min=1 / weights.numel())
    return centred.to(torch.float32).flatten(), weights.flatten()
