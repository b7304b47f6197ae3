"""A rollout in which the rows of a group share the steps before their window.

Rows of one group that start from the same noise (sample.shared_noise) are one row until the first
stochastic step. With start_k the first step of group k's window and W its length:

    1. prefix    steps before start_k: one row for each group, its leader
    2. window    whole chunks, row b at step start_b + w in forward w
    3. suffix    steps after the window: the rows that have left theirs, all at the same step

Forward w of a chunk's window has the same rows at the same steps as the update's micro-step number
w, so the first ratios are exactly 1 even with kernels whose results for a row depend on the rest of
the batch. Prefix and suffix are deterministic and not trained: the number of rows in their forwards
is free. It decides the last bits of the images, so this is another rollout than `rollout.rollout`,
bit for bit, of the same distribution. Of several processes each computes the prefixes of all groups
of the iteration, so that the forwards are the same in all.

The number of forwards changes with the windows, and so would the number of rows in those of prefix
and suffix. They are padded to one of a few sizes by repetitions of their last row, with graphs and
without: each size is one CUDA graph of one step (`rollout.step_function`), and other windows need
no new ones. Which rows a forward has is known on the host, and is copied to the device once, before
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
    Buffers,
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


class Leaders(NamedTuple):
    """One row for each of the K groups of an iteration."""

    starts: Tensor
    """int64 [K]: the first step of its window."""
    table_rows: Tensor
    """int64 [T, K]."""
    seeds: Tensor
    """int64 [K]."""
    noise_seeds: Tensor
    """int64 [K]."""

    @classmethod
    def of(
        cls,
        table_rows: Tensor,
        trained_steps: Tensor,
        seeds: Tensor,
        noise_seeds: Tensor,
        size: int,
    ) -> Leaders:
        """Take the first row of each group of `size` rows; the arguments are of all rows."""
        rows = slice(None, None, size)
        return cls(trained_steps[0, rows], table_rows[:, rows], seeds[rows], noise_seeds[rows])

    def to(self, device: torch.device) -> Leaders:
        """Copy to `device` all but the starts, which the host alone reads."""
        return Leaders(self.starts, *(values.to(device) for values in self[1:]))


class Forward(NamedTuple):
    """One step of n rows, each at its own step of the schedule."""

    rows: Tensor
    """int64 [n]; those behind the first `valid` are padding, copies of the last of them."""
    steps: Tensor
    """int64 [n]."""
    valid: int
    """Rows whose results are stored."""


@torch.no_grad()
def rollout_shared_prefix(
    policy: Policy,
    conditioning: Conditioning,
    schedule: Schedule,
    table_rows: Tensor,
    *,
    groups: Tensor,
    seeds: Tensor,
    leaders: Leaders,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    trained_steps: Tensor,
    keep_velocities: bool = False,
    on_chunk: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row. Arguments as for `rollout.rollout`, and:

        leaders: of all groups, also of those that have no rows here.

    Rows of a group share window (consecutive steps) and initial noise.
    """
    steps, total, device = len(table_rows), seeds.numel(), policy.device
    # Compiled blocks are compiled for each size anew, so then there is only one.
    sizes = forward_sizes(batch_size, 1 if policy.compiled else SIZES)
    windows, end = trained_steps.cpu(), int(leaders.starts.max())
    prefix, *stages = _to_device(
        [
            _prefix_forwards(leaders.starts.cpu(), sizes),
            *(
                _window_and_suffix_forwards(windows, rows, steps, sizes)
                for rows in chunks(total, batch_size)
            ),
        ],
        device,
    )
    groups, seeds, table_rows = groups.to(device), seeds.to(device), table_rows.to(device)
    leaders = leaders.to(device)
    contents = (uncond is not None, True, keep_velocities)
    buffers = make_buffers(policy, steps, total, *contents)
    before = make_buffers(policy, end, len(leaders.starts), *contents)
    conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
    step = step_function(policy)

    def run(
        forward: Forward, buffers: Buffers, groups: Tensor, table_rows: Tensor, seeds: Tensor
    ) -> None:
        b, i, valid = forward.rows, forward.steps, slice(forward.valid)
        result = step(
            policy,
            buffers.latents[i, b],
            schedule.sigmas[i],
            conditioning.rows_at(groups[b], i),
            None if uncond is None else uncond.rows_at(torch.zeros_like(i), i),
            schedule.transitions,
            table_rows[i, b],
            seeds[b],
            guidance_scale,
            keep_velocities,
        )
        # Step i of a row stores the state i + 1, log-probability i and velocity i.
        for buffer, values, index in zip(buffers, result, (i + 1, i, i), strict=True):
            if buffer is not None:
                buffer[index[valid], b[valid]] = values[valid]

    before.latents[0] = initial_noise(leaders.noise_seeds, policy.latent_shape)
    number = torch.arange(len(leaders.starts), device=device)
    with policy.frozen_weights():
        for forward in prefix:
            run(forward, before, number, leaders.table_rows, leaders.seeds)
        _copy_from_leaders(before, buffers, groups)
        for rows, forwards in zip(chunks(total, batch_size), stages, strict=True):
            for forward in forwards:
                run(forward, buffers, groups, table_rows, seeds)
            if on_chunk is not None:
                on_chunk(buffers.latents[-1, rows])
    return make_trajectory(buffers, table_rows, trained_steps, groups, seeds)


def forward_sizes(batch_size: int, count: int) -> list[int]:
    """List the numbers of rows that forwards of prefix and suffix may have, ascending."""
    return sorted({-(-batch_size // 2**k) for k in range(count)})


def _prefix_forwards(starts: Tensor, sizes: list[int]) -> list[Forward]:
    """List the forwards that bring the leader of each group to its window."""
    forwards = []
    for i in range(int(starts.max())):
        rows = (starts > i).nonzero()[:, 0]
        forwards += _padded(rows, torch.full_like(rows, i), sizes)
    return forwards


def _window_and_suffix_forwards(
    windows: Tensor, rows: slice, steps: int, sizes: list[int]
) -> list[Forward]:
    """List the forwards of one chunk from its windows [W, B] to the last step."""
    index = torch.arange(rows.start, rows.stop)
    # Exactly the rows of the update's forward, also in a last chunk that is short.
    forwards = [Forward(index, step, len(index)) for step in windows[:, rows]]
    ends = windows[-1, rows] + 1
    for i in range(int(ends.min()), steps):
        finished = index[ends <= i]
        forwards += _padded(finished, torch.full_like(finished, i), sizes)
    return forwards


def _padded(rows: Tensor, steps: Tensor, sizes: list[int]) -> list[Forward]:
    """Split rows into forwards of the largest size, and of the smallest that holds the rest."""
    forwards = []
    for chunk in chunks(len(rows), sizes[-1]):
        valid = chunk.stop - chunk.start
        size = next(size for size in sizes if size >= valid)
        index = torch.arange(chunk.start, chunk.start + size).clamp(max=chunk.stop - 1)
        forwards.append(Forward(rows[index], steps[index], valid))
    return forwards


def _copy_from_leaders(before: Buffers, buffers: Buffers, groups: Tensor) -> None:
    """Give all rows what the leader of their group has, up to the latest start of a window."""
    for source, into in zip(before, buffers, strict=True):
        if source is not None:
            # What lies behind a group's own start here is overwritten later.
            for values, copies in zip(source, into, strict=False):
                copies.copy_(values[groups])


def _to_device(stages: list[list[Forward]], device: torch.device) -> list[list[Forward]]:
    """Move the rows and steps of all forwards to `device` by one copy."""
    forwards = [forward for stage in stages for forward in stage]
    rows = torch.cat([forward.rows for forward in forwards])
    steps = torch.cat([forward.steps for forward in forwards])
    counts = [len(forward.rows) for forward in forwards]
    moved = (values.split(counts) for values in torch.stack([rows, steps]).to(device))
    pairs = zip(*moved, strict=True)
    return [[Forward(*next(pairs), forward.valid) for forward in stage] for stage in stages]
