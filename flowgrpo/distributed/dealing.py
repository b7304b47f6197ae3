"""Which rows of an iteration a rank samples, scores and learns from.

The unit is the chunk: the rows of one forward, `sample.batch_size` of them, which stay together in
one process, as kernels may give a row other bits in a batch of another size. The n chunks of each
optimizer step are parted into contiguous runs, its leaves: as many as there are chunks, or the
largest divisor of n up to `run.leaves` (`parts_of`). Leaves are dealt to the R ranks in contiguous
runs too: of m leaves rank r has r m / R to (r + 1) m / R, rounded down. A rank's rows are those of
its chunks, in order.

Objectives whose micro-steps are groups or pairs get the results of all ranks; there the chunks of
the rollout and the leaves are dealt one by the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from flowgrpo.config import ConfigError
from flowgrpo.config.config import parts_of

Numbered = tuple[slice, range]
"""One micro-step: rows (or groups, or pairs), and the numbers of their samples."""


@dataclass(frozen=True)
class Leaf:
    """Micro-steps of a run of chunks in one optimizer step: a leaf of the gradients' tree."""

    number: int
    """Its place among the leaves of the optimizer step."""
    micro_steps: tuple[Numbered, ...]


@dataclass(frozen=True)
class Dealing:
    """Share of one rank in an iteration, and the rows of the others."""

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
    def own_rows(self) -> Tensor:
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


def share_of(total: int, batch_size: int, ranks: int, rank: int) -> range:
    """Find the rows, of `total`, that a rank has: a contiguous run of whole chunks."""
    run = runs_of(-(-total // batch_size), ranks)[rank]
    return range(min(run.start * batch_size, total), min(run.stop * batch_size, total))


def deal(
    micro_steps: Sequence[Numbered],
    updates: int,
    rows: int,
    batch_size: int,
    ranks: int = 1,
    rank: int = 0,
    by_rows: bool = True,
    most_leaves: int = 128,
) -> Dealing:
    """Deal an iteration to ranks.

    Args:
        micro_steps: those of an iteration in their order, see `Objective.micro_steps`.
        updates: optimizer steps, each over an equal share of them.
        rows: K G rows of the iteration.
        batch_size: rows of a chunk.
        by_rows: micro-steps are of chunks of rows; else each rank has the results of all.
        most_leaves: of an optimizer step, see `parts_of`.

    Raises:
        ConfigError: there are fewer leaves in an optimizer step than ranks, or an optimizer step
            ends inside of a chunk.
    """
    share = len(micro_steps) // updates
    chunked = [_by_chunk(micro_steps[n * share : (n + 1) * share]) for n in range(updates)]
    # Where an optimizer step ends inside of a chunk they may have different numbers.
    chunks = max(map(len, chunked))
    count = parts_of(chunks, most_leaves)
    if ranks > 1:
        _check(chunked, count, ranks, batch_size)
    steps = [_leaves(c, count) for c in chunked]
    runs = runs_of(count, ranks)
    own_steps = [leaves[runs[rank].start : runs[rank].stop] for leaves in steps]
    if by_rows and ranks > 1:
        owned = tuple(_rows(steps, run) for run in runs)
        own_steps = _moved(own_steps)
    else:
        number = -(-rows // batch_size)
        if ranks > number:
            raise ConfigError(
                f"WORLD_SIZE is {ranks}, but the {rows} rows of an iteration are {number} chunks "
                f"of sample.batch_size {batch_size}, and each process needs one; start at most "
                f"{_processes(number)}, or lower sample.batch_size."
            )
        owned = tuple(
            torch.arange(run.start * batch_size, min(run.stop * batch_size, rows))
            for run in runs_of(number, ranks)
        )
    return Dealing(rank, owned, count, runs, tuple(map(tuple, own_steps)), _order(steps, runs))


def _by_chunk(micro_steps: Iterable[Numbered]) -> list[tuple[Numbered, ...]]:
    """Group micro-steps by their rows."""
    grouped = groupby(micro_steps, key=lambda step: (step[0].start, step[0].stop))
    return [tuple(steps) for _, steps in grouped]


def _leaves(chunks: Sequence[tuple[Numbered, ...]], count: int) -> tuple[Leaf, ...]:
    """Part the chunks of an optimizer step into `count` leaves."""
    return tuple(
        Leaf(number, tuple(step for chunk in run for step in chunks[chunk]))
        for number, run in enumerate(runs_of(len(chunks), count))
    )


def _chunks(leaves: Iterable[Leaf]) -> list[slice]:
    """List the rows of each chunk of these leaves, in order."""
    steps = (step for leaf in leaves for step in leaf.micro_steps)
    return [chunk[0][0] for chunk in _by_chunk(steps)]


def _rows(steps: Sequence[Sequence[Leaf]], run: range) -> Tensor:
    """List the rows of a rank that has the leaves `run` of each optimizer step."""
    chunks = _chunks(leaf for leaves in steps for leaf in leaves[run.start : run.stop])
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in chunks])


def _moved(steps: Sequence[Sequence[Leaf]]) -> list[tuple[Leaf, ...]]:
    """Number the rows of a rank's leaves by their positions among its rows."""
    places, position = {}, 0
    for chunk in _chunks(leaf for leaves in steps for leaf in leaves):
        size = chunk.stop - chunk.start
        places[chunk.start] = slice(position, position + size)
        position += size
    return [
        tuple(
            Leaf(leaf.number, tuple((places[rows.start], n) for rows, n in leaf.micro_steps))
            for leaf in leaves
        )
        for leaves in steps
    ]


def _order(steps: Sequence[Sequence[Leaf]], runs: Sequence[range]) -> tuple[Tensor, ...]:
    """Number the micro-steps of an iteration, and list those of each rank."""
    places: list[list[int]] = [[] for _ in runs]
    position = 0
    for leaves in steps:
        for leaf in leaves:
            rank = next(r for r, run in enumerate(runs) if leaf.number in run)
            places[rank] += range(position, position + len(leaf.micro_steps))
            position += len(leaf.micro_steps)
    return tuple(torch.tensor(numbers, dtype=torch.int64) for numbers in places)


def _processes(count: int) -> str:
    return f"{count} process{'' if count == 1 else 'es'}"


def _check(
    chunked: Sequence[Sequence[tuple[Numbered, ...]]], leaves: int, ranks: int, batch_size: int
) -> None:
    """Raise ConfigError unless the leaves of optimizer steps can be dealt to so many ranks."""
    updates, chunks = len(chunked), max(map(len, chunked))
    starts = [chunk[0][0].start for step in chunked for chunk in step]
    if len(set(starts)) < len(starts):
        raise ConfigError(
            f"optim.updates_per_iteration is {updates}, which ends an optimizer step inside of a "
            f"chunk, but with WORLD_SIZE {ranks} a chunk belongs to one process; lower it, or "
            "choose a sample.batch_size that gives more chunks."
        )
    if ranks > chunks:
        raise ConfigError(
            f"WORLD_SIZE is {ranks}, but each of the {updates} optimizer steps of an iteration has "
            f"{chunks} chunk{'' if chunks == 1 else 's'} (sample.batch_size {batch_size}), and "
            f"each process needs one; start at most {_processes(chunks)}, or lower "
            "sample.batch_size or optim.updates_per_iteration."
        )
    if ranks > leaves:
        raise ConfigError(
            f"WORLD_SIZE is {ranks}, but the gradients of an optimizer step are added in {leaves} "
            f"parts (run.leaves), and each process needs one; raise run.leaves to {ranks} or a "
            f"multiple of it, or start at most {_processes(leaves)}."
        )
