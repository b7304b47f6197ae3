"""Which rows and micro-steps a rank has: each exactly once, in contiguous runs of whole chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowgrpo.config import ConfigError
from flowgrpo.distributed.dealing import deal, runs_of
from flowgrpo.sampling.rollout import chunks


def steps_of(rows: int, batch_size: int, window: int) -> list:
    """Micro-steps of a rollout's chunks, one for each step of the window."""
    return [(c, range(w, w + 1)) for c in chunks(rows, batch_size) for w in range(window)]


@st.composite
def iterations(draw):
    """(rows, batch size, window, updates, ranks) that fit."""
    updates, ranks = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    leaves = draw(st.integers(ranks, 24))
    batch_size, window = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    # The last chunk may be short.
    rows = updates * leaves * batch_size - draw(st.integers(0, batch_size - 1))
    return rows, batch_size, window, updates, ranks


@given(iterations())
def test_every_row_and_micro_step_belongs_to_one_rank(case):
    rows, batch_size, window, updates, ranks = case
    micro_steps = steps_of(rows, batch_size, window)
    dealings = [deal(micro_steps, updates, rows, batch_size, ranks, rank) for rank in range(ranks)]
    first = dealings[0]
    assert first.leaves * updates * window == len(micro_steps)
    # All know the same of each other.
    for rank, dealing in enumerate(dealings):
        assert dealing.rank == rank and torch.equal(dealing.own_rows, first.rows[rank])
        assert dealing.runs == first.runs and dealing.leaves == first.leaves
    assert sorted(torch.cat(first.rows).tolist()) == list(range(rows))
    assert sorted(torch.cat(first.order).tolist()) == list(range(len(micro_steps)))
    seen = []
    for rank, dealing in enumerate(dealings):
        places, rows_here = iter(first.order[rank].tolist()), dealing.own_rows.tolist()
        assert len(dealing.steps) == updates
        for number, leaves in enumerate(dealing.steps):
            assert [leaf.number for leaf in leaves] == list(first.runs[rank])
            for leaf in leaves:
                assert len(leaf.micro_steps) == window
                for here, numbers in leaf.micro_steps:
                    place = next(places)
                    chunk, steps = micro_steps[place]
                    # The rows here are those of the chunk, and the step is one of this update.
                    assert (
                        rows_here[here] == list(range(chunk.start, chunk.stop)) and numbers == steps
                    )
                    assert place // (first.leaves * window) == number
                    seen.append(place)
    assert sorted(seen) == list(range(len(micro_steps)))


@given(st.integers(1, 200), st.integers(1, 20))
def test_runs_are_contiguous_and_differ_by_one(count, ranks):
    runs = runs_of(count, ranks)
    assert [n for run in runs for n in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1


@given(iterations())
def test_values_come_into_the_order_of_the_rows(case):
    rows, batch_size, window, updates, ranks = case
    dealing = deal(steps_of(rows, batch_size, window), updates, rows, batch_size, ranks)
    values = torch.randn(rows, 2, dtype=torch.float64)
    assert torch.equal(dealing.in_order([values[own] for own in dealing.rows]), values)


def test_two_four_and_eight_ranks_get_halves_of_the_rows():
    """With two optimizer steps each rank has a share of each."""
    for ranks in (2, 4, 8):
        dealing = deal(steps_of(32, 2, 1), 2, 32, 2, ranks, ranks - 1)
        size = 16 // ranks
        wanted = [*range(16 - size, 16), *range(32 - size, 32)]
        assert dealing.own_rows.tolist() == wanted and dealing.idle == 0


def test_uneven_counts_and_the_idle_share():
    dealing = deal(steps_of(14, 2, 1), 1, 14, 2, 3)
    assert [len(run) for run in dealing.runs] == [2, 2, 3]
    assert [own.tolist() for own in dealing.rows] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11, 12, 13],
    ]
    assert dealing.idle == pytest.approx(1 - 7 / 9)


def test_leaves_are_runs_of_chunks_where_there_are_many():
    """24 chunks in at most 8 leaves: 3 chunks each, which stay together."""
    dealings = [deal(steps_of(48, 2, 2), 1, 48, 2, 4, rank, most_leaves=8) for rank in range(4)]
    assert {dealing.leaves for dealing in dealings} == {8}
    assert torch.cat(dealings[0].rows).tolist() == list(range(48))
    for dealing in dealings:
        for leaf in dealing.steps[0]:
            assert len(leaf.micro_steps) == 6
    with pytest.raises(ConfigError, match=r"in 8 parts \(run.leaves\), .* run.leaves to 9"):
        deal(steps_of(48, 2, 2), 1, 48, 2, 9, most_leaves=8)


def test_groups_are_dealt_beside_the_rows():
    """Objectives that look at whole groups: rows by chunks, micro-steps by groups."""
    micro_steps = [(slice(g, g + 1), range(1)) for g in range(6)]
    dealings = [deal(micro_steps, 2, 18, 4, 3, rank, by_rows=False) for rank in range(3)]
    rows = [own.tolist() for own in dealings[0].rows]
    assert rows == [[0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]
    for rank, dealing in enumerate(dealings):
        numbers = [leaf.micro_steps[0][0].start for leaves in dealing.steps for leaf in leaves]
        # Their positions among the groups of all.
        assert numbers == [rank, 3 + rank] and dealing.order[rank].tolist() == numbers


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((steps_of(8, 4, 1), 1, 8, 4, 3), r"WORLD_SIZE is 3, .* has 2 chunks .* at most 2"),
        ((steps_of(8, 4, 2), 2, 8, 4, 2), r"WORLD_SIZE is 2, .* has 1 chunk \("),
        (
            ([(slice(g, g + 1), range(1)) for g in range(4)], 1, 8, 4, 3, 0, False),
            "8 rows .* are 2",
        ),
    ],
)
def test_more_ranks_than_chunks_are_refused(arguments, words):
    with pytest.raises(ConfigError, match=words):
        deal(*arguments)


def test_an_optimizer_step_that_ends_inside_of_a_chunk_is_refused():
    """3 chunks of 2 micro-steps in 2 optimizer steps: one process may, several may not, as the
    second chunk is in both. And 3 chunks of 4 in 4 optimizer steps."""
    for window, updates in ((2, 2), (4, 4)):
        micro_steps = steps_of(6, 2, window)
        assert len(deal(micro_steps, updates, 6, 2).steps) == updates
        for ranks in (2, 3):
            words = f"updates_per_iteration is {updates}, .* inside of a chunk"
            with pytest.raises(ConfigError, match=words):
                deal(micro_steps, updates, 6, 2, ranks)
