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

The number of forwards changes with the windows, and so would the number of rows in those of parts 1
and 3. They are filled up to one of a few sizes by repetitions of their last row, whether there are
graphs or not: each size is one CUDA graph of one step (`rollout.stepping`), and other windows need
no new ones. Which rows a forward has is known on the host, and is sent to the device once, before
the first step; nothing waits for the device.

`train.collect` takes this rollout, captured or not, where sample.share_prefix and
sample.shared_noise are on and a window may begin after the first step; else `rollout.rollout`. Per
step it launches one graph and, outside of it, some twenty kernels that fetch and store rows, where
the whole rollout as one graph launches nothing; for a model whose forward takes as long for few
rows as for many, such as a small one on a GPU, sample.share_prefix false is the faster choice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.records import Trajectory
from flowgrpo.sampling.rollout import (
    chunks,
    make_buffers,
    make_trajectory,
    prepare_both,
    step_function,
)
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import initial_noise

SIZES = 4
"""Numbers of rows that a forward may have: sample.batch_size, its half, quarter and eighth."""


class Forward(NamedTuple):
    """One step of some rows, each at its own place in the schedule."""

    rows: Tensor
    """int64 [n]; all behind the first `kept` repeat the last of those."""
    places: Tensor
    """int64 [n]: step numbers."""
    kept: int


@torch.no_grad()
def rollout_shared_prefix(
    policy: Policy,
    conditioning: Conditioning,
    schedule: Schedule,
    table_rows: Tensor,
    *,
    groups: Tensor,
    seeds: Tensor,
    noise_seeds: Tensor,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    trained_steps: Tensor,
    keep_velocities: bool = False,
    on_chunk: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row. Arguments as for `rollout.rollout`.

    Rows of a group follow each other, and share window (consecutive steps) and initial noise.
    """
    total, rows, device = len(table_rows), seeds.numel(), policy.device
    # Each size costs a compilation of every kind of block; then one has to do.
    allowed = sizes(min(batch_size, rows), 1 if policy.compiled else SIZES)
    host, leaders, parts = trained_steps.cpu(), _leaders(groups.cpu()), chunks(rows, batch_size)
    own_stages = (_own_steps(host, part, total, allowed) for part in parts)
    shared, *own = _sent([_shared_steps(host[0], leaders, allowed), *own_stages], device)
    groups, seeds = groups.to(device), seeds.to(device)
    table_rows = table_rows.to(device)
    found = make_buffers(policy, total, rows, uncond is not None, True, keep_velocities)
    conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
    latents, step = found[0], step_function(policy)

    def forward(one: Forward) -> None:
        b, i, kept = one.rows, one.places, slice(one.kept)
        made = step(
            policy,
            latents[i, b],
            schedule.sigmas[i],
            conditioning.rows_at(groups[b], i),
            None if uncond is None else uncond.rows_at(torch.zeros_like(i), i),
            schedule.transitions,
            table_rows[i, b],
            seeds[b],
            guidance_scale,
            keep_velocities,
        )
        for into, value, place in zip(found, made, (i + 1, i, i), strict=True):
            if into is not None:
                into[place[kept], b[kept]] = value[kept]

    latents[0] = initial_noise(noise_seeds.to(device), policy.latent_shape)
    with policy.frozen_weights():
        for one in shared:
            forward(one)
        _spread(found, int(host[0].max()), leaders.to(device))
        for part, these in zip(parts, own, strict=True):
            for one in these:
                forward(one)
            if on_chunk is not None:
                on_chunk(latents[-1, part])
    return make_trajectory(found, table_rows, trained_steps, groups, seeds)


def sizes(batch_size: int, count: int) -> list[int]:
    """The numbers of rows that forwards of parts 1 and 3 have, ascending."""
    return sorted({-(-batch_size // 2**k) for k in range(count)})


def _shared_steps(starts: Tensor, leaders: Tensor, allowed: list[int]) -> list[Forward]:
    """Part 1: the first row of each group goes to its window."""
    alone = leaders.unique()
    found = []
    for i in range(int(starts.max())):
        row = alone[starts[alone] > i]
        found += _filled(row, torch.full_like(row, i), allowed)
    return found


def _spread(found: tuple[Tensor | None, ...], end: int, leaders: Tensor) -> None:
    """The rows of a group get what its first row has. `end`: the latest start of a window."""
    # What lies behind a group's own start here is overwritten later.
    for state in (state for buffer in found if buffer is not None for state in buffer[: end + 1]):
        state.copy_(state[leaders])


def _own_steps(trained_steps: Tensor, part: slice, total: int, allowed: list[int]) -> list[Forward]:
    """Parts 2 and 3 of one chunk."""
    row = torch.arange(part.start, part.stop)
    # Exactly the rows of the update's forward, also in a last chunk that is short.
    found = [Forward(row, place, len(row)) for place in trained_steps[:, part]]
    ends = trained_steps[-1, part] + 1
    for i in range(int(ends.min()), total):
        after = row[ends <= i]
        found += _filled(after, torch.full_like(after, i), allowed)
    return found


def _filled(row: Tensor, place: Tensor, allowed: list[int]) -> list[Forward]:
    """Forwards of the largest allowed size, and of the smallest that holds what remains."""
    found = []
    for part in chunks(len(row), allowed[-1]):
        kept = part.stop - part.start
        size = next(size for size in allowed if size >= kept)
        index = torch.arange(part.start, part.start + size).clamp(max=part.stop - 1)
        found.append(Forward(row[index], place[index], kept))
    return found


def _sent(stages: list[list[Forward]], device: torch.device) -> list[list[Forward]]:
    """The same on the device, by one copy."""
    every = [one for stage in stages for one in stage]
    flat = torch.stack([torch.cat([one[i] for one in every]) for i in range(2)]).to(device)
    pieces = zip(*(half.split([len(one.rows) for one in every]) for half in flat), strict=True)
    return [[Forward(*next(pieces), one.kept) for one in stage] for stage in stages]


def _leaders(groups: Tensor) -> Tensor:
    """int64 [B]: the first row of each row's group."""
    _, counts = torch.unique_consecutive(groups, return_counts=True)
    first = counts.cumsum(0) - counts
    return first.repeat_interleave(counts)
