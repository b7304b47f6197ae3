"""Sums of gradients: one order for any number of ranks, held against a recursion written here."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

from flowgrpo.distributed import gradients, world
from flowgrpo.distributed.dealing import Dealing, deal
from flowgrpo.distributed.gradients import GradientSum, whole_nodes
from support.ranks import Ranks

SHAPES = ((3, 5), (7,), (2, 2))


def leaves_of(count: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Gradients of `count` leaves, and one extra, whose sum depends on the order."""
    random = np.random.default_rng(seed)
    return [
        [
            (random.standard_normal(shape) * 10.0 ** random.integers(-4, 4, shape)).astype("f4")
            for shape in SHAPES
        ]
        for _ in range(count + 1)
    ]


def in_tree(values: list[np.ndarray]) -> np.ndarray:
    """The sum of float32 values, the larger half first."""
    if len(values) == 1:
        return values[0]
    half = len(values) - len(values) // 2
    return in_tree(values[:half]) + in_tree(values[half:])


def expected(leaves: list[list[np.ndarray]], extra: bool) -> list[np.ndarray]:
    sums = [in_tree([leaf[i] for leaf in leaves[:-1]]) for i in range(len(SHAPES))]
    return [s + e for s, e in zip(sums, leaves[-1], strict=True)] if extra else sums


def dealt(count: int, ranks: int, rank: int) -> Dealing:
    return deal([(slice(n, n + 1), range(1)) for n in range(count)], 1, count, 1, ranks, rank)


def add_up(here, dealing, leaves, *, fixed=False, tree=True, extra=False, skip=()):
    """One optimizer step of one rank; the parameters with their sums. `skip`: pairs of a leaf and a
    parameter that it does not reach."""
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
    if fixed:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
    places = [p.grad.data_ptr() for p in parameters] if fixed else []
    total = GradientSum(parameters, here, dealing, fixed, tree)

    def backward(number):
        # As autograd does: into what is there, or anew.
        for i, (parameter, value) in enumerate(zip(parameters, leaves[number], strict=True)):
            if (number, i) in skip:
                continue
            if parameter.grad is None:
                parameter.grad = torch.from_numpy(value.copy())
            else:
                parameter.grad += torch.from_numpy(value)

    for leaf in dealing.steps[0]:
        backward(leaf.number)
        total.add(leaf.number)
    if extra and here.rank == here.size - 1:
        backward(len(leaves) - 1)
        total.add_extra()
    total.finish(extra)
    if fixed:
        assert [p.grad.data_ptr() for p in parameters] == places
    return parameters


class Wire:
    """Collectives between threads of this process, for any number of ranks."""

    def __init__(self, size: int, monkeypatch) -> None:
        self.size, self.local = size, threading.local()
        self.barrier, self.sent = threading.Barrier(size), [None] * size
        monkeypatch.setattr(gradients.dist, "all_to_all_single", self.all_to_all)
        monkeypatch.setattr(gradients, "all_gather", self.all_gather)

    def exchange(self, value):
        self.sent[self.local.rank] = value
        self.barrier.wait()
        values = list(self.sent)
        self.barrier.wait()
        return values

    def all_to_all(self, into, value):
        assert value.is_contiguous() and into.shape == value.shape and len(value) == self.size
        into.copy_(torch.stack([there[self.local.rank] for there in self.exchange(value)]))

    def all_gather(self, into, value):
        into.copy_(torch.cat(self.exchange(value)))

    def run(self, body) -> list:
        """`body(world)` as each rank; what they return."""
        results: list = [None] * self.size

        def start(rank):
            self.local.rank = rank
            results[rank] = body(Here(self, rank))

        threads = [threading.Thread(target=start, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert None not in results
        return results


class Here:
    """A world of threads."""

    joined = True

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank, self.size = wire, rank, wire.size
        self.gather, self.sent = wire.exchange, 0.0

    @contextmanager
    def exchanging(self, sent):
        self.sent += sent
        yield


@pytest.mark.parametrize("extra", [False, True], ids=["", "extra"])
@pytest.mark.parametrize("fixed", [False, True], ids=["", "fixed"])
@pytest.mark.parametrize("count", [8, 11, 1])
def test_any_number_of_ranks_adds_the_same_bits(monkeypatch, count, fixed, extra):
    leaves = leaves_of(count)
    wanted = expected(leaves, extra)
    alone = add_up(world.ALONE, dealt(count, 1, 0), leaves, fixed=fixed, extra=extra)
    for parameter, value in zip(alone, wanted, strict=True):
        assert parameter.grad.numpy().tobytes() == value.tobytes()
    # The order does matter here, and the sum is one of the leaves.
    used = leaves if extra else leaves[:-1]
    exact = sum(leaf[0].astype("f8") for leaf in used)
    scale = sum(abs(leaf[0].astype("f8")) for leaf in used)
    assert (abs(wanted[0] - exact) <= 1e-6 * scale).all()
    if count > 2:
        straight = sum((leaf[0] for leaf in leaves[1:-1]), leaves[0][0])
        assert not np.array_equal(in_tree([leaf[0] for leaf in leaves[:-1]]), straight)
    for ranks in (2, 3, 4, 6, 8):
        if ranks > count:
            continue

        def body(here, ranks=ranks):
            dealing = dealt(count, ranks, here.rank)
            parameters = add_up(here, dealing, leaves, fixed=fixed, extra=extra)
            assert here.sent > 0
            return parameters

        for parameters in Wire(ranks, monkeypatch).run(body):
            for parameter, value in zip(parameters, wanted, strict=True):
                assert parameter.grad.numpy().tobytes() == value.tobytes()


def test_parameters_that_not_every_leaf_reaches(monkeypatch):
    """None where none does; else as if the others had nothing to add, also where a rank's first
    leaf, or all of a rank's, do not reach it."""
    leaves = leaves_of(8)
    skip = {(n, 0) for n in range(9)} | {(n, 1) for n in (0, 4, 5)} | {(n, 2) for n in range(6)}
    # The sign of a zero is a bit.
    leaves[7][2][:] = -0.0
    leaves[6][2][:] = -0.0
    alone = add_up(world.ALONE, dealt(8, 1, 0), leaves, skip=skip)
    assert alone[0].grad is None and np.signbit(alone[2].grad.numpy()).all()
    for ranks in (2, 3, 4, 8):

        def body(here, ranks=ranks):
            return add_up(here, dealt(8, ranks, here.rank), leaves, skip=skip)

        for parameters in Wire(ranks, monkeypatch).run(body):
            assert parameters[0].grad is None
            for got, wanted in zip(parameters[1:], alone[1:], strict=True):
                assert got.grad.numpy().tobytes() == wanted.grad.numpy().tobytes()


def test_a_rank_holds_few_sums():
    """log2(n) + 2 of them at most, whatever its run of leaves."""
    for count in (1, 7, 64, 100):
        for ranks in (1, 2, 3, 5):
            if ranks > count:
                continue
            for rank in range(ranks):
                dealing = dealt(count, ranks, rank)
                parameters = [nn.Parameter(torch.zeros(1))]
                here = world.World(rank, ranks, joined=ranks > 1)
                total, most = GradientSum(parameters, here, dealing), 0
                for leaf in dealing.steps[0]:
                    parameters[0].grad = torch.ones(1)
                    total.add(leaf.number)
                    most = max(most, len(total._parts))
                nodes = list(whole_nodes(dealing.runs[rank], (0, count)))
                if count > 1:
                    assert [node for node, _ in total._parts] == nodes
                    widths = [int(values[0]) for _, values in total._parts]
                    assert widths == [last - first for first, last in nodes]
                bound = np.log2(count) + 2 if ranks == 1 else 2 * np.log2(count) + 2
                assert most <= bound


def over_gloo(count, ranks):
    """The same over real connections, in the tree and by all-reduce."""
    here = world.join(60.0)
    leaves = leaves_of(count)
    dealing = dealt(count, ranks, here.rank)
    for extra in (False, True):
        wanted = expected(leaves, extra)
        for fixed in (False, True):
            parameters = add_up(here, dealing, leaves, fixed=fixed, extra=extra)
            for parameter, value in zip(parameters, wanted, strict=True):
                assert parameter.grad.numpy().tobytes() == value.tobytes()
        skip = {(n, 1) for n in range(count - 1)}
        for skipped in (set(), skip):
            parameters = add_up(here, dealing, leaves, tree=False, extra=extra, skip=skipped)
            used = leaves if extra else leaves[:-1]
            for i, parameter in enumerate(parameters):
                added = [leaf[i] for n, leaf in enumerate(used) if (n, i) not in skipped]
                exact = sum(value.astype("f8") for value in added)
                scale = sum(abs(value.astype("f8")) for value in added) + 1e-30
                assert (abs(parameter.grad.numpy() - exact) <= 1e-6 * scale).all()


@pytest.mark.slow
def test_over_real_connections(tmp_path):
    for ranks in (2, 3):
        with Ranks(tmp_path / str(ranks), ranks, over_gloo, 7, ranks) as processes:
            processes.wait()


def test_an_optimizer_step_of_fewer_leaves():
    """In one process an optimizer step may end inside of a chunk: then they differ in leaves."""
    micro_steps = [(slice(n, n + 1), range(w, w + 1)) for n in range(3) for w in range(4)]
    dealing, leaves = deal(micro_steps, 4, 3, 1), leaves_of(2)
    used = [[leaf.number for leaf in step if leaf.micro_steps] for step in dealing.steps]
    assert sorted(map(len, used)) == [1, 1, 2, 2] and dealing.leaves == 2
    for number, step in enumerate(dealing.steps):
        parameters = [nn.Parameter(torch.zeros(shape)) for shape in SHAPES]
        total = GradientSum(parameters, world.ALONE, dealing)
        for leaf in step:
            for parameter, value in zip(parameters, leaves[leaf.number], strict=True):
                parameter.grad = torch.from_numpy(value.copy()) if leaf.micro_steps else None
            total.add(leaf.number)
        total.finish()
        for i, parameter in enumerate(parameters):
            wanted = in_tree([leaves[n][i] for n in used[number]])
            assert np.array_equal(parameter.grad.numpy(), wanted), number


def test_one_process_without_the_tree_leaves_gradients_where_they_are():
    leaves = leaves_of(5)
    parameters = add_up(world.ALONE, dealt(5, 1, 0), leaves, tree=False, extra=True)
    straight = sum((leaf[0] for leaf in leaves[1:]), leaves[0][0])
    assert parameters[0].grad.numpy().tobytes() == straight.tobytes()
