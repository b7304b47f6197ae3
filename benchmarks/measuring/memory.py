"""Memory: bytes that the process has in use, and the most that one call takes."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

GIB = 1 << 30


def release(device: str) -> None:
    """Give back GPU memory that no object refers to."""
    if device == "cuda":
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def resident(device: str) -> int:
    """Bytes that this process occupies: of the caching allocator, or on the CPU in tensors."""
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
    """Bytes above those in use before the call, and what the call returned."""

    reserved: int
    """Taken from the device (the allocator's segments, graph pools included); on the CPU the same
    as `allocated`."""
    allocated: int
    """In tensors at the same time."""
    result: Any


def peak(call: Callable[[], Any], device: str) -> Peak:
    """The most memory that one call takes."""
    if device != "cuda":
        return _peak_on_cpu(call)
    reserved = resident(device)
    allocated = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - allocated
    return Peak(torch.cuda.max_memory_reserved() - reserved, most, result)


def _peak_on_cpu(call: Callable[[], Any]) -> Peak:
    """The peak by what the profiler sees this thread allocate and free."""
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
    return peak(call, device).allocated


def out_of_memory(error: BaseException | None) -> bool:
    """Test for an error that says the GPU's memory is full, or that was raised because of one."""
    while error is not None and not isinstance(error, torch.OutOfMemoryError):
        error = error.__cause__
    return error is not None
