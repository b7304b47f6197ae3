"""Supervised fine-tuning (SFT): flow matching on the best result of each group.

It is what the paper compares Flow-GRPO with (arXiv 2505.05470): rejection sampling, or RAFT (arXiv
2304.06767) with one image of a group. With e the matching error of a re-noised result (matching.py)
and b(k) the image of group k with the highest reward, the first if there are several:

    loss = mean over groups and levels [ w e of b(k) + beta mean (v - v_ref)^2 ]

With `sample.curated` there is no rollout and no reward: b are images of a curated set, as many of
them an iteration as a rollout would have (curated.py). With `optim.sft_weight` another objective
gets the same, in one more micro-step of each optimizer step and without the KL term:

    loss of the mixture = its own + sft_weight mean over curated images w e

Deliberate departures:

1. v is the velocity after guidance: the one that images are sampled with.
2. A group whose reward failed has weight 0, and the others are scaled up in turn.
3. The paper's has no KL term; beta 0 is that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.config import Config, OptimConfig, replace
from flowgrpo.objectives import matching
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import SCOUTS, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule


def weigh(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Compute 1 for the best of a group and 0 for the others, in place of advantages, and the
    weights of the rows, float32 [B] each, from rewards [K, G]."""
    _, weights = advantages(rewards, config)
    best = rewards.nan_to_num(0.0).argmax(dim=1)
    chosen = torch.nn.functional.one_hot(best, rewards.shape[1])
    return chosen.to(torch.float32).flatten(), weights


def micro_steps(config: Config, rows: int) -> list[tuple[slice, range]]:
    """Pair chunks of groups with each of their draws."""
    return matching.groups_by_levels(config, rows // config.sample.group_size, 1)


def gather(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Re-noise the best results of the groups `rows`."""
    by_group = experience.advantages.view(len(experience.conditioning), -1)[rows]
    first = torch.arange(rows.start, rows.stop, device=by_group.device)
    index = first * by_group.shape[1] + by_group.argmax(dim=1)
    return matching.renoise(schedule, experience, index, numbers)


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute the mean of the matching errors of one micro-step, each times its row's advantage,
    and the KL term."""
    error, kl = matching.match(policy, batch, config)
    total = (batch.weights * batch.advantages * error).mean()
    kl = torch.zeros_like(total) if kl is None else (batch.weights * kl).mean()
    total = total + config.optim.beta * kl
    metrics = {"loss": total, "kl": kl, "matching_error": error.mean()}
    return Loss(total, {name: value.detach() for name, value in metrics.items()}, None)


def supervise(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute the mean of the matching errors alone: the supervised part of a mixture."""
    value = matching.match(policy, batch, replace(config, **{"optim.beta": 0.0})).error.mean()
    return Loss(value, {"sft_loss": value.detach()}, None)


OPTIONS = ("optim.levels", "optim.level_weight")

OFFLINE = Objective(
    weigh=advantages,
    micro_steps=matching.chunks_by_levels,
    prepare=matching.prepare,
    gather=matching.gather,
    loss=loss,
    rollout="none",
    options=(*OPTIONS, "sample.curated"),
)
"""With `sample.curated`: flow matching on the images of a curated set."""

OBJECTIVE = Objective(
    weigh=weigh,
    micro_steps=micro_steps,
    prepare=matching.prepare,
    gather=gather,
    loss=loss,
    rollout="deterministic",
    options=(*OPTIONS, *SCOUTS),
    offline=OFFLINE,
    by_rows=False,
)
