"""The ceiling: rates of a large matrix product and of a large copy on this device."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from measuring import memory, timers

PEAK_TFLOPS = 989.0
"""Dense bfloat16 of an H100 or H200 by the data sheet: the denominator of MFU."""


class Ceiling(NamedTuple):
    """Measured rates of a device at its best."""

    matmul: float
    """FLOP/s of a large bfloat16 matrix product on random data."""
    copy: float
    """Bytes read and written a second by a large copy."""


def measure(device: str, smoke: bool = False) -> Ceiling:
    """Medians of some large products and copies."""
    ceiling = _measure(device, smoke)
    # After the buffers of _measure are gone.
    memory.release(device)
    return ceiling


def _measure(device: str, smoke: bool) -> Ceiling:
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
    times = timers.interleaved(calls, 10, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return Ceiling(2 * size**3 / medians["matmul"], 2 * count / medians["copy"])
