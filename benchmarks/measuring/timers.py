"""Timers: seconds of a call, and of several calls in turns.

On a GPU a call is timed by CUDA events around it, with nothing queued in front, so the host's share
counts where the host is the slower one; on the CPU by perf_counter. Providers take turns call by
call, so a clock that drifts drifts for all of them, and the median of the rounds is recorded.

Kernels are too short for that: `rotating` runs each call over buffer sets that are together larger
than the caches, and on a GPU as one replayed graph over all sets.
"""

from __future__ import annotations

import functools
import itertools
import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Timed = Callable[[], float]
"""One more round of a provider that is warm; its seconds a call."""

LOOP_SETS = 8
"""Buffer sets of a GPU provider that is called from Python: its launches bound it."""
LOOP_SECONDS = 1.5
"""Timed calls of one such provider end after this."""


def seconds(call: Callable[[], Any], device: str) -> float:
    """Seconds of one call."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def take_turns(
    timed: dict[str, Timed],
    rounds: int,
    limit: float = float("inf"),
    chance: random.Random | None = None,
) -> dict[str, list[float]]:
    """Seconds of `rounds` rounds of each, taking turns, in another order each time with `chance`.
    Who has taken `limit` seconds is done after three rounds."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    spent, order = dict.fromkeys(timed, 0.0), list(timed)
    for _ in range(rounds):
        if chance is not None:
            chance.shuffle(order)
        for name in order:
            if spent[name] > limit and len(times[name]) > 2:
                continue
            start = time.perf_counter()
            times[name].append(timed[name]())
            spent[name] += time.perf_counter() - start
    return times


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each, taking turns. Calls are warm already."""
    timed = {name: functools.partial(seconds, call, device) for name, call in calls.items()}
    return take_turns(timed, rounds)


def buffer_sets(moved: int, device: str) -> int:
    """Buffer sets for calls that move `moved` bytes each: so many that a set has left the caches
    when its turn comes (60 MB of L2 on an H200, the private caches of a CPU)."""
    total, most = (250_000_000, 320) if device == "cuda" else (60_000_000, 32)
    return min(most, max(2, total // max(moved, 1)))


def rotating(
    calls: dict[str, Callable], sets: list, device: str, graphs: tuple = ("ours", "ceiling")
) -> dict[str, Timed]:
    """Calls on buffer sets, warm, to be timed in turns: on a CPU one set a round, on a GPU all of
    them in each round, by events, those named in `graphs` as a graph and others in a loop."""
    if device == "cuda":
        repeated = {
            name: captured(call, sets) if name in graphs else looped(call, sets[:LOOP_SETS])
            for name, call in calls.items()
        }
        return {name: functools.partial(_by_events, one) for name, one in repeated.items()}
    for call in calls.values():
        for buffers in sets:
            call(buffers)
    return {name: _by_clock(call, sets) for name, call in calls.items()}


def _by_clock(call: Callable, sets: list) -> Timed:
    """The call on the next set each time."""
    turn = itertools.cycle(sets)

    def timed() -> float:
        buffers = next(turn)
        start = time.perf_counter()
        call(buffers)
        return time.perf_counter() - start

    return timed


class Repeated(NamedTuple):
    """A warm call over several buffer sets."""

    run: Callable[[], None]
    sets: int
    graph: bool
    """One replayed CUDA graph, or a loop in Python."""


def _by_events(repeated: Repeated) -> float:
    """Seconds of one of the calls of a run over all sets."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    if repeated.graph:
        # A kernel in front: the graph is queued by the time the GPU reaches it.
        torch.cuda._sleep(200_000)
    start.record()
    repeated.run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / repeated.sets


def looped(call: Callable, sets: list) -> Repeated:
    """The call over all sets in a loop, warm."""

    def loop() -> None:
        for buffers in sets:
            call(buffers)

    for _ in range(2):
        loop()
    return Repeated(loop, len(sets), False)


def captured(call: Callable, sets: list) -> Repeated:
    """The call over all sets as one CUDA graph, replayed once."""
    loop = looped(call, sets[:1]).run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loop()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for buffers in sets:
            call(buffers)
    graph.replay()
    return Repeated(graph.replay, len(sets), True)
