"""Scouts: cheap previews of the images of a rollout, of which the best and the worst are kept.

For each prompt N candidates are looked at and G of them sampled in full and learned from:

    scout       take all T steps of the rollout, with its noise, but ask the model at S of them
                only; between two of these the predicted result x0 = x - sigma v is held, so that a
                step that does not ask has the velocity (x - x0) / sigma
    choose      the ceil(G / 2) candidates of the highest reward and the floor(G / 2) of the lowest
    regenerate  sample these by all T steps of the model, from their seeds

The noise of a candidate belongs to its seed (flowgrpo_kernels.noise), so what is sampled in full
begins where its scout began, takes the same noise at the same steps, and nothing of a scout has to
be kept. Between two forwards a step without noise moves along a straight line, so that the scout
of a deterministic rollout is the deterministic sampler of S larger steps, exactly. The ratio of an
update is not touched: what is learned from is sampled and scored as without scouts.

Choosing by reward changes what a group's mean and standard deviation are of: the extremes of N
images instead of G at random, as in Sol-RL (arXiv 2604.06916), whose scouts are in low precision.
How far a scout can be trusted is measured in each iteration (`agreement`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.sampling import finite
from flowgrpo.sampling.rollout import Chunk, chunks, prepare_both
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import initial_noise, sde_step


@dataclass(frozen=True)
class Scouted:
    """Candidates of an iteration that are sampled in full, and what their scouts were worth."""

    rows: Tensor
    """int64 [K G]: their numbers among the K N candidates, group by group."""
    previews: Tensor
    """float64 [K, N]: rewards of all scouts; NaN in a group where a reward failed."""

    @classmethod
    def of(cls, previews: Tensor, group_size: int) -> Scouted:
        """Choose `group_size` candidates of each group by the rewards of their scouts."""
        groups = torch.arange(len(previews))[:, None]
        rows = choose(previews, group_size) + groups * previews.shape[1]
        return cls(rows.flatten(), previews)

    def describe(self, rewards: Tensor) -> dict[str, Any]:
        """Describe the scouts for metrics.jsonl.

        Args:
            rewards: float64 [K, G], of the images sampled in full.
        """
        known = self.previews[self.previews.isfinite().all(dim=1)]
        chosen = self.previews.flatten()[self.rows].view_as(rewards)
        return {
            "images": self.previews.numel(),
            "reward": float(known.mean()),
            "reward_std": float(known.std(correction=0)),
            "agreement": agreement(chosen, rewards),
            "dropped_groups": len(self.previews) - len(known),
        }


def asking_steps(steps: int, forwards: int) -> tuple[int, ...]:
    """List the steps, of `steps`, at which a scout asks the model `forwards` times: at even
    distances, the first among them."""
    return tuple(number * steps // forwards for number in range(forwards))


def scout(policy: Policy, chunk: Chunk, guidance_scale: float, asking: tuple[int, ...]) -> Tensor:
    """Preview the b rows of one chunk, float32 [b, C, H, W]: results of T steps that ask the model
    at the steps `asking` alone, 0 among them."""
    steps, rows = chunk.table_rows.shape
    x = initial_noise(chunk.noise_seeds, policy.latent_shape)
    result = x
    with policy.frozen_weights():
        for i in range(steps):
            sigma = chunk.sigmas[i]
            if i in asking:
                uncond = None if chunk.uncond is None else chunk.uncond.at(i)
                inputs = (x, sigma.expand(rows), chunk.conditioning.at(i), uncond)
                velocity = guide(*velocities(policy, *inputs, guidance_scale), guidance_scale)
                velocity = velocity.float()
                result = x - sigma * velocity
            else:
                velocity = (x - result) / sigma
            x, _ = sde_step(velocity, x, chunk.transitions, chunk.table_rows[i], seeds=chunk.seeds)
    return x


@torch.no_grad()
def sample_scouts(
    policy: Policy,
    conditioning: Conditioning,
    schedule: Schedule,
    table_rows: Tensor,
    *,
    forwards: int,
    groups: Tensor,
    seeds: Tensor,
    noise_seeds: Tensor,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    chunk_count: int | None = None,
    on_chunk: Callable[[Tensor], None],
) -> None:
    """Preview all rows, chunk by chunk. Arguments as for `rollout.rollout`, and:

    forwards: times that a row asks the model, S.
    chunk_count: chunks that are run, of which those behind the last row repeat it, and are
        dropped; None: those of the rows.
    on_chunk: called with the results [b, C, H, W] of each chunk as soon as it is launched.
    """
    device, total = policy.device, seeds.numel()
    asking = asking_steps(len(table_rows), forwards)
    seeds, noise_seeds, groups = seeds.to(device), noise_seeds.to(device), groups.to(device)
    table_rows = table_rows.to(device)
    conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
    offsets = torch.arange(batch_size, device=device)
    for number in range(max(len(chunks(total, batch_size)), chunk_count or 0)):
        # A short chunk repeats its last row: fewer may mean other bits.
        index = (offsets + number * batch_size).clamp(max=total - 1)
        chunk = Chunk(
            conditioning.rows(groups[index]),
            uncond,
            schedule.sigmas,
            schedule.transitions,
            table_rows[:, index],
            seeds[index],
            noise_seeds[index],
        )
        arguments = (policy, chunk, guidance_scale, asking)
        latents = scout(*arguments) if policy.graphs is None else policy.graphs(scout, *arguments)
        valid = min(batch_size, total - number * batch_size)
        if valid > 0:
            # The memory of a graph is overwritten by the next chunk.
            on_chunk(latents[:valid].clone())


def choose(rewards: Tensor, count: int) -> Tensor:
    """Choose the candidates of each group that are sampled in full, int64 [K, count], ascending.

    They are the ceil(count / 2) of the highest rewards and the floor(count / 2) of the lowest, of
    equal ones those that come first. Of a group without rewards, as one failed, the first `count`
    are taken, as without scouts.

    Args:
        rewards: float64 [K, N]; NaN in a group where a reward failed.
    """
    known = rewards.isfinite().all(dim=1, keepdim=True)
    # Equal rewards of all: the order is that of the candidates.
    values = rewards.masked_fill(~known, 0.0)
    best = values.argsort(dim=1, descending=True, stable=True)[:, : count - count // 2]
    # What is chosen as best is taken out first, so that no candidate is chosen twice.
    left = values.scatter(1, best, torch.inf)
    worst = left.argsort(dim=1, stable=True)[:, : count // 2]
    return torch.cat([best, worst], dim=1).sort(dim=1).values


def agreement(previews: Tensor, rewards: Tensor) -> float | None:
    """Correlate the scouts' rewards with those of the images sampled in full, both float64 [K, G].

    Each less its group's mean, over all groups in which no reward failed: only what tells images
    of one prompt apart counts. None where one of them does not vary.
    """
    known = previews.isfinite().all(dim=1) & rewards.isfinite().all(dim=1)
    a, b = (v[known] - v[known].mean(dim=1, keepdim=True) for v in (previews, rewards))
    scale = float(a.square().sum() * b.square().sum()) ** 0.5
    return float((a * b).sum()) / scale if scale > 0 else None


def check_previews(policy: Policy, name: str) -> None:
    """Raise NotFiniteError unless all previews of the iteration `name` are of finite numbers.

    To be called once they are scored: nothing is left to wait for then.
    """
    figures = policy.decoded.read()
    if finite.is_sound(figures):
        return
    what = "latents" if not figures.latent <= finite.LARGEST else "pixels"
    peak = figures.latent if what == "latents" else figures.pixel
    kind = f"as large as {peak:.3g}" if math.isfinite(peak) else "NaN or infinity"
    raise finite.NotFiniteError(
        f"the {what} of the previews of {name} are {kind}, but {finite.EXPECTED}; set "
        "sample.scouts to 0 to be told whether the model gives them in full rollouts too, and in "
        "which layer, or raise sample.scout_forwards."
    )
