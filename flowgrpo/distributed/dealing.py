"""Which rows of an iteration a rank samples, scores and learns from.

The unit is the chunk: the rows of one forward, `sample.batch_size` of them, which stay together in
one process, as kernels may give a row other bits in a batch of another size. The chunks of each
optimizer step are dealt in contiguous runs, so that every rank has as many forwards in each
(`runs_of`), and a rank's rows are those of its chunks, in order. With R ranks and n chunks in an
optimizer step, rank r has the chunks r n / R to (r + 1) n / R, rounded down.

Objectives whose micro-steps are groups or pairs get the results of all ranks; there the chunks of
the rollout and the micro-steps are dealt one by the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from flowgrpo.config import ConfigError

Numbered = tuple[slice, range]
"""One micro-step: rows (or groups, or pairs), and the numbers of their samples."""


@dataclass(frozen=True)
class Leaf:
    """Micro-steps of one chunk in one optimizer step: a leaf of the gradients' tree."""

    number: int
    """Its place among the leaves of the optimizer step."""
    micro_steps: tuple[Numbered, ...]


@dataclass(frozen=True)
class Dealing:
    """What one rank has of an iteration, and which rows the others have."""

    rank: int
    rows: tuple[Tensor, ...]
    """Rank -> the rows that it samples and scores, int64, ascending within an optimizer step."""
    leaves: int
    """Leaves of an optimizer step, of all ranks."""
    runs: tuple[range, ...]
    """Rank -> its leaves of an optimizer step."""
    steps: tuple[tuple[Leaf, ...], ...]
    """Optimizer step -> the leaves of this rank. Their rows are positions in this rank's rows, or
    of all, where the objective gets the results of all."""
    order: tuple[Tensor, ...]
    """Rank -> the places of its micro-steps among all of the iteration."""

    @property
    def own(self) -> Tensor:
        """Rows of this rank, int64 [b]."""
        return self.rows[self.rank]

    @property
    def idle(self) -> float:
        """Share of the ranks' time in which there is nothing to do for them: 0 if the ranks divide
        the leaves."""
        return 1 - self.leaves / (len(self.runs) * max(map(len, self.runs)))

    def in_order(self, parts: Sequence[Tensor]) -> Tensor:
        """Put values of the ranks' rows, [b, ...] of each rank, into the order of the rows."""
        if len(parts) == 1:
            return parts[0]
        values = torch.cat(list(parts))
        return torch.empty_like(values).index_copy_(
            0, torch.cat(self.rows).to(values.device), values
        )


def runs_of(count: int, ranks: int) -> tuple[range, ...]:
    """Deal `count` things to `ranks` ranks in contiguous runs, which differ by one at most."""
    bounds = [rank * count // ranks for rank in range(ranks + 1)]
    return tuple(range(*pair) for pair in pairwise(bounds))


def deal(
    micro_steps: Sequence[Numbered],
    updates: int,
    rows: int,
    batch_size: int,
    ranks: int = 1,
    rank: int = 0,
    by_rows: bool = True,
) -> Dealing:
    """Deal an iteration to ranks.

    Args:
        micro_steps: those of an iteration in their order, see `Objective.micro_steps`.
        updates: optimizer steps, each over an equal share of them.
        rows: K G rows of the iteration.
        batch_size: rows of a chunk.
        by_rows: micro-steps are of chunks of rows; else each rank has the results of all.

    Raises:
        ConfigError: there are fewer chunks in an optimizer step than ranks, or an optimizer step
            ends inside of a chunk.
    """
    share = len(micro_steps) // updates
    steps = [_leaves(micro_steps[n * share : (n + 1) * share]) for n in range(updates)]
    counts = {len(leaves) for leaves in steps}
    count = max(counts)
    if ranks > 1:
        _check(count, counts, ranks, updates, batch_size)
    runs = runs_of(count, ranks)
    if by_rows and ranks > 1:
        chunks = [
            [leaf.micro_steps[0][0] for leaves in steps for leaf in leaves[run.start : run.stop]]
            for run in runs
        ]
        owned = tuple(torch.cat([torch.arange(c.start, c.stop) for c in own]) for own in chunks)
        offset = _offsets(chunks[rank])
        own_steps = [
            tuple(_moved(leaf, offset) for leaf in leaves[runs[rank].start : runs[rank].stop])
            for leaves in steps
        ]
    else:
        number = -(-rows // batch_size)
        if ranks > number:
            raise ConfigError(
                f"WORLD_SIZE is {ranks}, but the {rows} rows of an iteration are {number} chunks "
                f"of sample.batch_size {batch_size}, and each process needs one; start at most "
                f"{number} processes, or lower sample.batch_size."
            )
        owned = tuple(
            torch.arange(run.start * batch_size, min(run.stop * batch_size, rows))
            for run in runs_of(number, ranks)
        )
        own_steps = [leaves[runs[rank].start : runs[rank].stop] for leaves in steps]
    return Dealing(rank, owned, count, runs, tuple(map(tuple, own_steps)), _order(steps, runs))


def _leaves(micro_steps: Iterable[Numbered]) -> tuple[Leaf, ...]:
    """Group micro-steps by their rows."""
    grouped = groupby(micro_steps, key=lambda step: (step[0].start, step[0].stop))
    return tuple(Leaf(number, tuple(steps)) for number, (_, steps) in enumerate(grouped))


def _offsets(chunks: Sequence[slice]) -> dict[int, int]:
    """First row of a chunk -> its position among this rank's rows."""
    offsets, position = {}, 0
    for chunk in chunks:
        offsets[chunk.start] = position
        position += chunk.stop - chunk.start
    return offsets


def _moved(leaf: Leaf, offsets: dict[int, int]) -> Leaf:
    """Number the rows of a leaf by their positions among this rank's rows."""
    chunk = leaf.micro_steps[0][0]
    start = offsets[chunk.start]
    rows = slice(start, start + chunk.stop - chunk.start)
    return Leaf(leaf.number, tuple((rows, numbers) for _, numbers in leaf.micro_steps))


def _order(steps: Sequence[Sequence[Leaf]], runs: Sequence[range]) -> tuple[Tensor, ...]:
    """Number the micro-steps of an iteration, and list those of each rank."""
    places: list[list[int]] = [[] for _ in runs]
    position = 0
    for leaves in steps:
        for leaf in leaves:
            rank = next(r for r, run in enumerate(runs) if leaf.number in run)
            places[rank] += range(position, position + len(leaf.micro_steps))
            position += len(leaf.micro_steps)
    return tuple(torch.tensor(own, dtype=torch.int64) for own in places)


def _check(count: int, counts: set[int], ranks: int, updates: int, batch_size: int) -> None:
    """Raise ConfigError unless the leaves of optimizer steps can be dealt to so many ranks."""
    if len(counts) > 1:
        raise ConfigError(
            f"optim.updates_per_iteration is {updates}, which ends an optimizer step inside of a "
            f"chunk, but with WORLD_SIZE {ranks} a chunk belongs to one process; lower it, or "
            "choose a sample.batch_size that gives more chunks."
        )
    if ranks > count:
        raise ConfigError(
            f"WORLD_SIZE is {ranks}, but each of the {updates} optimizer steps of an iteration has "
            f"{count} chunk{'' if count == 1 else 's'} (sample.batch_size {batch_size}), and each "
            f"process needs one; start at most {count} processes, or lower sample.batch_size or "
            "optim.updates_per_iteration."
        )
