"""Flow-DPO: the better of two results is preferred to the worse, by more than the model before
training prefers it.

A pair is the best and the worst image of a group (online DPO) or, with `sample.curated`, one of the
curated set's, without rollout and reward. Both are noised anew (matching.py)
to the same level s by the same eps; with e_w and e_l their matching errors, b `optim.dpo_beta` and
sigmoid(x) = 1 / (1 + exp(-x)):

    margin = -(b / 2) [(e_w - e_w of v_ref) - (e_l - e_l of v_ref)]
    loss   = mean over pairs and levels [ -log sigmoid(margin) + beta mean (v - v_ref)^2 ]

The loss is Diffusion-DPO's (arXiv 2311.12908, equation 14) in velocities, as Flow-DPO has it (arXiv
2501.13918), with errors that are means over the elements, as in flow_grpo, whose b is 100.

Deliberate departures from flow_grpo's train_sd3_dpo.py:

1. The reference stays the model before training: theirs may be renewed every some steps.
2. Pairs without a difference, groups whose rewards are all equal, have weight 0, and the others are
   scaled up in turn. So have those of a group whose reward failed.
3. v is the velocity after guidance: the one that images are sampled with.
4. Theirs has no KL term; beta 0 is that.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from flowgrpo.config import Config, OptimConfig
from flowgrpo.objectives import matching
from flowgrpo.objectives.advantages import advantages
from flowgrpo.objectives.interface import SCOUTS, Loss, Objective
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import velocities
from flowgrpo.records import Batch, Experience
from flowgrpo.sampling.schedule import Schedule


def weigh(rewards: Tensor, config: OptimConfig) -> tuple[Tensor, Tensor]:
    """Compute advantages, by which the best and the worst are looked up, and the weights of the
    rows, float32 [B] each, from rewards [K, G]; 0 in groups that are dropped or have no worse."""
    relative, weights = advantages(rewards, config)
    differ = (rewards.amax(dim=1) > rewards.amin(dim=1)).repeat_interleave(rewards.shape[1])
    weights = weights * differ
    return relative, weights / weights.mean().clamp(min=1 / weights.numel())


def micro_steps(config: Config, rows: int) -> list[tuple[slice, range]]:
    """Pair chunks of groups, two rows of each, with each of their draws."""
    return matching.groups_by_levels(config, rows // config.sample.group_size, 2)


def micro_steps_of_pairs(config: Config, rows: int) -> list[tuple[slice, range]]:
    """Pair chunks of a curated set's pairs, B / 2 an iteration, with each of their draws."""
    return matching.groups_by_levels(config, rows // 2, 2)


def gather_pairs(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Re-noise the better, then the worse images of the pairs `rows`, with the better's noise."""
    better = torch.arange(rows.start, rows.stop, device=experience.advantages.device)
    index = torch.cat([better, better + len(experience.advantages) // 2])
    return matching.renoise(schedule, experience, index, numbers, better.repeat(2))


def gather(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Re-noise the best, then the worst results of the groups `rows`, with the best's noise."""
    by_group = experience.advantages.view(len(experience.conditioning), -1)[rows]
    first = torch.arange(rows.start, rows.stop, device=by_group.device) * by_group.shape[1]
    best, worst = first + by_group.argmax(dim=1), first + by_group.argmin(dim=1)
    index, noise_of = torch.cat([best, worst]), torch.cat([best, best])
    return matching.renoise(schedule, experience, index, numbers, noise_of)


def loss(policy: Policy, batch: Batch, config: Config) -> Loss:
    """Compute Flow-DPO's loss of one micro-step: its first rows are preferred to the others."""
    optim = config.optim
    reference = matching.reference_velocity(policy, batch, config)
    velocity, uncond = velocities(policy, *matching.inputs_of(batch, config))
    # The same weights for both: those of kind "normalized" are of the reference's errors.
    batch = matching.weighted(batch, reference, None, config)
    gain = matching.score(batch, velocity, uncond, config)
    better, worse = (gain - matching.score(batch, reference, None, config)).chunk(2)
    margin, weights = (optim.dpo_beta / 2) * (better - worse), batch.weights.chunk(2)[0]
    preference = (weights * F.softplus(-margin)).mean()
    kl = torch.zeros_like(preference)
    if optim.beta > 0:
        distance = -matching.score(batch, velocity, uncond, config, reference)
        kl = (batch.weights * distance).mean()
    total = preference + optim.beta * kl
    metrics = {
        "loss": total,
        "preference_loss": preference,
        "kl": kl,
        "margin": margin.mean(),
        "pair_accuracy": (margin > 0).float().mean(),
    }
    return Loss(total, {name: value.detach() for name, value in metrics.items()}, None)


OPTIONS = ("optim.levels", "optim.level_weight", "optim.dpo_beta")

OFFLINE = Objective(
    weigh=advantages,
    micro_steps=micro_steps_of_pairs,
    prepare=matching.prepare,
    gather=gather_pairs,
    loss=loss,
    rollout="none",
    reference=True,
    options=(*OPTIONS, "sample.curated"),
    by_rows=False,
    pairs=True,
)
"""With `sample.curated`: the pairs of a curated set."""

OBJECTIVE = Objective(
    weigh=weigh,
    micro_steps=micro_steps,
    prepare=matching.prepare,
    gather=gather,
    loss=loss,
    rollout="deterministic",
    reference=True,
    options=(*OPTIONS, *SCOUTS),
    offline=OFFLINE,
    by_rows=False,
)
