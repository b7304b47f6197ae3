"""How things are measured: time, launches, synchronisations, memory, and what the device can do.

On a GPU a call is timed by CUDA events around it, with nothing queued in front, so the host's share
counts where the host is the slower one; on the CPU by perf_counter. Providers take turns call by
call, so a clock that drifts drifts for all of them, and the median of the rounds is recorded.
"""

from __future__ import annotations

import contextlib
import gc
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

GIB = 1 << 30
PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 or H200 by the data sheet: the denominator of MFU."""


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


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


def release(device: str) -> None:
    """Give back GPU memory that no object holds any more."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def held(device: str) -> int:
    """Bytes that this process holds: of the caching allocator, or on the CPU in tensors."""
    release(device)
    if device == "cuda":
        return torch.cuda.memory_reserved()
    # Not the resident memory, of which the C library gives back what and when it likes.
    gc.collect()
    # By its type alone: isinstance asks the object, and lazy modules import themselves then.
    tensors = (t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    storages = (t.untyped_storage() for t in tensors if t.layout == torch.strided)
    return sum({s.data_ptr(): s.nbytes() for s in storages if s.device.type == "cpu"}.values())


class Peak(NamedTuple):
    """Bytes above what was held before, and what the call returned."""

    held: int
    """Taken from the device (the allocator's segments, graph pools included); on the CPU the same
    as used."""
    used: int
    """In tensors at the same time."""
    result: Any


def peak(call: Callable[[], Any], device: str) -> Peak:
    """The most memory that one call takes."""
    if device != "cuda":
        return _peak_on_cpu(call)
    before = held(device)
    used = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - used
    return Peak(torch.cuda.max_memory_reserved() - before, most, result)


def _peak_on_cpu(call: Callable[[], Any]) -> Peak:
    """By what the profiler sees this thread allocate and free."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as done:
        result = call()
    events = [e for e in done.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return Peak(most, most, result)


def tensor_peak(call: Callable[[], Any], device: str) -> int:
    """Bytes of the tensors that one call has at the same time, beyond those before it."""
    return peak(call, device).used


@contextlib.contextmanager
def waits():
    """A list that has, afterwards, one entry for each time the host waited for the GPU inside, by
    torch's own warnings."""
    found: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
            # Not the warning that the mode is a prototype, which a process sees once.
            texts = (str(warning.message) for warning in caught)
            found += [text for text in texts if "called a synchronizing" in text]


@contextlib.contextmanager
def tf32(on: bool):
    """float32 matrix products in TF32, as flow_grpo's scripts set it."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextlib.contextmanager
def deterministic(on: bool):
    """torch.use_deterministic_algorithms inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def out_of_memory(error: BaseException | None) -> bool:
    """Whether the error is that the GPU's memory was full, or was raised because of that."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None


class Ceiling(NamedTuple):
    """What the device does at its best, measured."""

    matmul: float
    """FLOP/s of a large bfloat16 matrix product on random data."""
    copy: float
    """Bytes read and written a second by a large copy."""


def ceiling(device: str, smoke: bool = False) -> Ceiling:
    """Medians of some large products and copies."""
    found = _ceiling(device, smoke)
    release(device)
    return found


def _ceiling(device: str, smoke: bool) -> Ceiling:
    gpu = device == "cuda"
    size, count = (8192, 1 << 30) if gpu else (1024, 1 << 26)
    if smoke:
        size, count = 256, 1 << 20
    # float32 on a CPU, whose bfloat16 may be emulated.
    dtype = torch.bfloat16 if gpu else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(0, 255, (count,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    calls = {
        "matmul": lambda: torch.mm(a, b, out=out),
        "copy": lambda: target.copy_(source),
    }
    for call in calls.values():
        for _ in range(3):
            call()
    times = interleaved(calls, 10, device)
    found = {name: statistics.median(values) for name, values in times.items()}
    return Ceiling(2 * size**3 / found["matmul"], 2 * count / found["copy"])
