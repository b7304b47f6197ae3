"""Timers: seconds of a call, and of several calls in turns.

On a GPU a call is timed by CUDA events around it, with nothing queued in front, so the host's share
counts where the host is the slower one; on the CPU by perf_counter. Providers take turns call by
call, so a clock that drifts drifts for all of them, and the median of the rounds is recorded.

Kernels are too short for that: `time_cpu` and `time_gpu` run each call over buffer sets that are
together larger than the caches, and on a GPU as one replayed graph over all sets.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

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


def interleaved(
    calls: dict[str, Callable[[], Any]], rounds: int, device: str
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each, taking turns. Calls are warm already."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, device))
    return times


def buffer_sets(moved: int, device: str) -> int:
    """Buffer sets for calls that move `moved` bytes each: so many that a set has left the caches
    when its turn comes (60 MB of L2 on an H200, the private caches of a CPU)."""
    total, most = (250_000_000, 320) if device == "cuda" else (60_000_000, 32)
    return min(most, max(2, total // max(moved, 1)))


def time_cpu(calls: dict[str, Callable], sets: list, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, providers interleaved."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for buffers in sets:
            call(buffers)
    for i in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call(sets[i % len(sets)])
            times[name].append(time.perf_counter() - start)
    return times


class Repeated(NamedTuple):
    """A warm call over several buffer sets."""

    run: Callable[[], None]
    sets: int
    graph: bool
    """One replayed CUDA graph, or a loop in Python."""


def time_gpu(
    calls: dict[str, Callable], sets: list, rounds: int, graphs: tuple = ("ours", "ceiling")
) -> dict[str, list[float]]:
    """Seconds of a call by events: those named in `graphs` as graphs, others in a loop."""
    repeated = {
        name: captured(call, sets) if name in graphs else looped(call, sets[:LOOP_SETS])
        for name, call in calls.items()
    }
    times: dict[str, list[float]] = {name: [] for name in repeated}
    spent = dict.fromkeys(repeated, 0.0)
    for _ in range(rounds):
        for name, (run, count, graph) in repeated.items():
            if spent[name] > LOOP_SECONDS and len(times[name]) > 2:
                continue
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            if graph:
                # A kernel in front: the graph is queued by the time the GPU reaches it.
                torch.cuda._sleep(200_000)
            start.record()
            run()
            end.record()
            torch.cuda.synchronize()
            elapsed = start.elapsed_time(end) / 1e3
            times[name].append(elapsed / count)
            spent[name] += elapsed
    return times


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
