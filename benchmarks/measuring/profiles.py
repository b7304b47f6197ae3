"""Profile of one call: the torch profiler's kernels in a few groups.

    matrix products, attention, convolution, ours (the project's Triton and C++ kernels), copies,
    elementwise (all else)

On a GPU the rows are kernels, with the launches by the host and the time in which the GPU is idle
between the first kernel and the last. On the CPU they are operators, each without those it calls.
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from reporting import records

# A suite profiles often in one process; CUDA graphs do not outlive CUPTI's end and new beginning.
os.environ.setdefault("TEARDOWN_CUPTI", "0")

GROUPS = ("matrix products", "attention", "convolution", "ours", "copies", "elementwise")
# In this order: a fused attention kernel may have gemm in its name, a convolution too.
_PATTERNS = (
    ("attention", r"flash|fmha|sdpa|attention|softmax"),
    ("convolution", r"conv|wgrad|dgrad|fprop|implicit"),
    ("matrix products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|\bmm\b|addmm|bmm|linear"),
    ("copies", r"memcpy|memset|copy_?$|copy_kernel|\bcat\b|catarray"),
)
_LAUNCH = re.compile(r"^(cuda|cu)(LaunchKernel|GraphLaunch|MemcpyAsync|MemsetAsync|LaunchCoop)")


class Span(NamedTuple):
    """One kernel or operator: microseconds since the profile's start."""

    name: str
    start: float
    duration: float


@dataclass
class Profile:
    """Times of one call, in microseconds."""

    groups: dict[str, float]
    counts: dict[str, int]
    """Kernels (or operators) of each group."""
    launches: int
    """Launches by the host: kernels, graphs, copies."""
    span: float
    """Time from the start of the first kernel to the end of the last."""
    idle: float
    """Time in `span` with no kernel running."""
    top: list[tuple[str, int, float]] = field(default_factory=list)
    """(name, count, microseconds), the longest first."""

    @property
    def kernels(self) -> int:
        return sum(self.counts.values())


def our_kernels() -> frozenset[str]:
    """Names of the project's Triton kernels, from its loaded modules."""
    names = set()
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] not in ("flowgrpo", "flowgrpo_kernels"):
            continue
        for value in vars(module).values():
            if type(value).__module__.startswith("triton.") and hasattr(value, "fn"):
                names.add(value.fn.__name__)
    return frozenset(names)


def group(name: str, ours: Iterable[str] = ()) -> str:
    """The group of a kernel or operator by its name."""
    if name in ours or name.startswith(("flowgrpo", "flowgrpo_kernels::")):
        return "ours"
    lowered = name.lower()
    return next((g for g, p in _PATTERNS if re.search(p, lowered)), "elementwise")


def summarise(spans: list[Span], launches: int, ours: Iterable[str] = ()) -> Profile:
    """Group kernels and find the gaps between them."""
    times: dict[str, float] = dict.fromkeys(GROUPS, 0.0)
    counts: dict[str, int] = dict.fromkeys(GROUPS, 0)
    names: dict[str, list] = defaultdict(lambda: [0, 0.0])
    busy, end = 0.0, None
    for name, start, duration in sorted(spans, key=lambda s: s.start):
        kind = group(name, ours)
        times[kind] += duration
        counts[kind] += 1
        names[name][0] += 1
        names[name][1] += duration
        stop = start + duration
        # The union of the intervals: kernels of several streams may overlap.
        busy += max(0.0, stop - (start if end is None else max(start, end)))
        end = stop if end is None else max(end, stop)
    span = 0.0 if end is None else end - min(s.start for s in spans)
    top = sorted(((n, c, t) for n, (c, t) in names.items()), key=lambda row: -row[2])
    return Profile(times, counts, launches, span, max(span - busy, 0.0), top[:25])


def record(call: Callable[[], Any], device: str) -> Profile:
    """Profile one warm call."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    gpu = device == "cuda"
    # Operators are left out on a GPU: its kernels and the calls that launch them are enough.
    kind = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[kind]) as done:
        call()
        if gpu:
            torch.cuda.synchronize()
    if not gpu:
        return _on_cpu(done)
    spans, launches = [], 0
    for event in done.profiler.kineto_results.events():
        if event.device_type() == DeviceType.CUDA:
            if event.duration_ns():
                start = event.start_ns() / 1e3
                spans.append(Span(event.name(), start, event.duration_ns() / 1e3))
        elif _LAUNCH.match(event.name()):
            launches += 1
    return summarise(spans, launches, our_kernels())


def _on_cpu(done) -> Profile:
    """Operators one after the other, each without the time of those that it calls."""
    spans, at = [], 0.0
    for event in done.key_averages():
        each = event.self_cpu_time_total / max(event.count, 1)
        for _ in range(event.count if each else 0):
            spans.append(Span(event.key.removeprefix("aten::"), at, each))
            at += each
    return summarise(spans, 0)


def table(title: str, profile: Profile, per: int = 1) -> str:
    """The profile as text, each number over `per` steps."""
    total = sum(profile.groups.values()) or 1.0
    head = f"{title}, over {per} steps" if per > 1 else title
    lines = [head, "=" * len(head), f"{'group':18s} {'kernels':>9s} {'us':>12s} {'share':>7s}"]
    for name in GROUPS:
        if profile.counts[name]:
            time, count = profile.groups[name], profile.counts[name] / per
            lines.append(f"{name:18s} {count:9.1f} {time / per:12.1f} {time / total:7.1%}")
    lines.append(f"{'all':18s} {profile.kernels / per:9.1f} {total / per:12.1f}")
    share = profile.idle / profile.span if profile.span else 0.0
    lines.append(
        f"launches {profile.launches / per:.1f}; first to last {profile.span / per:.1f} us, "
        f"idle {profile.idle / per:.1f} us ({share:.1%})"
    )
    lines += ["", "longest, all steps:"]
    lines += [f"{time:12.1f} us {count:6d} x  {name[:90]}" for name, count, time in profile.top]
    return "\n".join(lines) + "\n"


def rows(case: str, provider: str, profile: Profile) -> list[dict]:
    """The profile as rows of a record."""

    def row(metric: str, value: float, unit: str) -> dict:
        return records.row("profile", case, provider, metric, value, unit)

    return [
        *(row(name, profile.groups[name], "us") for name in GROUPS),
        *(row(f"{name} count", profile.counts[name], "kernels") for name in GROUPS),
        row("idle", profile.idle, "us"),
        row("span", profile.span, "us"),
        row("launches", profile.launches, "launches"),
    ]
