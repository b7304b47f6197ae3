"""Online reward-weighted regression (ORW): flow matching on an iteration's results, each weighted
by the exponential of its reward.

With e the matching error of a re-noised result (matching.py), r its reward and tau a temperature:

    a    = exp(r / tau) / mean of exp(r / tau) in its group
    loss = mean over rows and levels [ a w e + beta mean (v - v_ref)^2 ]

It is what the paper compares Flow-GRPO with (arXiv 2505.05470); the loss is that of ORW-CFM-W2
(arXiv 2502.06061), whose regulariser is the second term: the distance of the
velocities bounds the Wasserstein distance to the model before training.

Deliberate departures from ORW-CFM-W2:

1. Weights are normalised in the group, so no prompt counts more because its rewards are higher.
2. The distance is taken at the re-noised results.
3. Rows of a dropped group have weight 0, as in grpo.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.config import OptimConfig
from flowgrpo.objectives import matching, sft
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import SCOUTS, Objective


def weigh(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Compute exp(r / tau) over its mean in the group, in place of advantages, and the weights of
    the rows, float32 [B] each, from rewards [K, G]."""
    _, weights = advantages(rewards, config)
    scored = torch.where(weights.view_as(rewards) > 0, rewards.to(torch.float64), 0.0)
    relative = torch.softmax(scored / config.tau, dim=1) * rewards.shape[1]
    return relative.to(torch.float32).flatten(), weights


OBJECTIVE = Objective(
    weigh=weigh,
    micro_steps=matching.chunks_by_levels,
    prepare=matching.prepare,
    gather=matching.gather,
    loss=sft.loss,
    rollout="deterministic",
    options=("optim.levels", "optim.level_weight", "optim.tau", *SCOUTS),
)
