"""A rollout in which the rows of a group share the steps before their window.

Rows of one group that start from the same noise (sample.shared_noise) are one row until the first
stochastic step. With start_k the first step of group k's window and W its length:

    1. before start_k      one row for each group
    2. the window          whole chunks, row b at step start_b + w in forward w
    3. after the window    the rows that have left theirs, all at the same step

Forward w of a chunk in part 2 has the same rows at the same steps as the update's micro-step
number w, so the first ratios are exactly 1 even with kernels whose results for a row depend on the
rest of the batch. Steps 1 and 3 are deterministic and not trained: the number of rows in their
forwards is free. It decides the last bits of the images, so this is another rollout than
`rollout.rollout`, bit for bit, of the same distribution.

The number of forwards and of rows in them changes with the windows, so there is no captured form.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.records import Trajectory
from flowgrpo.rollout import Schedule, advance, buffers, chunks, prepared, trajectory
from flowgrpo_kernels import initial_noise


@torch.no_grad()
def rollout(
    policy: Policy,
    conditioning: Conditioning,
    plan: Schedule,
    steps: Tensor,
    *,
    groups: Tensor,
    seeds: Tensor,
    noise_seeds: Tensor,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    positions: Tensor,
    keep_velocities: bool = False,
    done: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row. Arguments as for `rollout.rollout`.

    Rows of a group follow each other, and share window (consecutive steps) and initial noise.
    """
    total, rows, device = len(steps), seeds.numel(), policy.device
    groups, seeds, steps = groups.to(device), seeds.to(device), steps.to(device)
    found = buffers(policy, total, rows, uncond is not None, True, keep_velocities)
    latents, log_probs, velocities = found
    conditioning, uncond = prepared(policy, plan, conditioning, uncond)

    def forward(row: Tensor, place: Tensor) -> None:
        """One step of the rows `row`, each at its own `place` in the schedule; both on the host,
        which knows which rows a forward has."""
        for part in chunks(len(row), batch_size):
            b, i = row[part].to(device), place[part].to(device)
            velocity = None if velocities is None else torch.empty_like(velocities[0, : len(b)])
            latents[i + 1, b], log_probs[i, b] = advance(
                policy,
                latents[i, b],
                plan.sigmas[i],
                conditioning.rows_at(groups[b], i),
                None if uncond is None else uncond.rows_at(torch.zeros_like(i), i),
                plan.transitions,
                steps[i, b],
                seeds[b],
                guidance_scale,
                velocity_out=velocity,
            )
            if velocities is not None:
                velocities[i, b] = velocity

    latents[0] = initial_noise(noise_seeds.to(device), policy.latent_shape)
    host = positions.cpu()
    with policy.steady():
        _shared_steps(forward, found, host[0], _leaders(groups.cpu()))
        for part in chunks(rows, batch_size):
            _own_steps(forward, host, part, total)
            if done is not None:
                done(latents[-1, part])
    return trajectory(found, steps, positions, groups, seeds)


def _shared_steps(
    forward: Callable[[Tensor, Tensor], None],
    found: tuple[Tensor | None, ...],
    starts: Tensor,
    leaders: Tensor,
) -> None:
    """Part 1: the first row of each group goes to its window, and the group's rows with it."""
    end = int(starts.max())
    alone = leaders.unique()
    for i in range(end):
        row = alone[starts[alone] > i]
        forward(row, torch.full_like(row, i))
    # What lies behind a group's own start here is overwritten later.
    for buffer in found:
        if buffer is not None:
            buffer[: end + 1] = buffer[: end + 1, leaders.to(buffer.device)]


def _own_steps(
    forward: Callable[[Tensor, Tensor], None], positions: Tensor, part: slice, total: int
) -> None:
    """Parts 2 and 3 for one chunk."""
    row = torch.arange(part.start, part.stop)
    for place in positions[:, part]:
        forward(row, place)
    ends = positions[-1, part] + 1
    for i in range(int(ends.min()), total):
        after = row[ends <= i]
        forward(after, torch.full_like(after, i))


def _leaders(groups: Tensor) -> Tensor:
    """int64 [B]: the first row of each row's group."""
    _, sizes = torch.unique_consecutive(groups, return_counts=True)
    first = sizes.cumsum(0) - sizes
    return first.repeat_interleave(sizes)
