"""State of the GPU around a measurement, by nvidia-ml-py: clocks, power, heat, throttling.

    with gpu_state.watched("cuda") as watch:
        rows = measure()
    watch.mark(rows)        # each row gets "clocks" and "throttled"

The device is looked up by the UUID that torch gives it: CUDA_VISIBLE_DEVICES renumbers torch's
devices, not NVML's. `throttled` lists why the clocks were lowered: the reasons that NVML names
before and after, and those whose counters of lost time have grown in between, since a short case
may be over when the second look is taken. An idle GPU and clocks that an administrator has set are
no throttling. A device that does not answer a question has no such entry.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

REASONS = {
    "software power cap": "nvmlClocksEventReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "sync boost": "nvmlClocksEventReasonSyncBoost",
    "software thermal slowdown": "nvmlClocksEventReasonSwThermalSlowdown",
    "hardware thermal slowdown": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "hardware power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
}
"""Reasons to lower the clocks below what was asked for -> NVML's bit."""
LOST = {
    "lost to power": "NVML_PERF_POLICY_POWER",
    "lost to heat": "NVML_PERF_POLICY_THERMAL",
    "lost to the board's limit": "NVML_PERF_POLICY_BOARD_LIMIT",
    "lost to reliability": "NVML_PERF_POLICY_RELIABILITY",
}
"""Counters of the time for which the clocks were lowered -> NVML's policy."""


class Unavailable(Exception):
    """NVML does not answer for this device; the message says why."""


@dataclass(frozen=True)
class State:
    """One look at the device."""

    figures: dict[str, int]
    """sm_mhz, memory_mhz, watts, celsius."""
    reasons: frozenset[str]
    """Keys of REASONS that hold."""
    lost: dict[str, int]
    """Keys of LOST -> nanoseconds since the driver was loaded."""


class Gpu:
    """The GPU that torch uses, as NVML knows it."""

    def __init__(self) -> None:
        try:
            import pynvml
        except ImportError as error:
            raise Unavailable("nvidia-ml-py is not installed") from error
        self.nvml = pynvml
        uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        try:
            pynvml.nvmlInit()
            self.handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        except pynvml.NVMLError as error:
            raise Unavailable(f"{uuid}: {error}") from error
        self.uuid = uuid

    def ask(self, function: str, *arguments: Any) -> Any:
        """The answer of a function of NVML; None where this device has none."""
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError:
            return None

    def look(self) -> State:
        """Read clocks, power, temperature, reasons and counters now."""
        nvml = self.nvml
        milliwatts = self.ask("nvmlDeviceGetPowerUsage")
        figures = {
            "sm_mhz": self.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM),
            "memory_mhz": self.ask("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM),
            "watts": None if milliwatts is None else milliwatts // 1000,
            "celsius": self.ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        }
        bits = self.ask("nvmlDeviceGetCurrentClocksEventReasons") or 0
        counters = {
            name: self.ask("nvmlDeviceGetViolationStatus", getattr(nvml, policy))
            for name, policy in LOST.items()
        }
        return State(
            {name: value for name, value in figures.items() if value is not None},
            frozenset(name for name, bit in REASONS.items() if bits & getattr(nvml, bit)),
            {name: c.violationTime for name, c in counters.items() if c is not None},
        )

    def limits(self) -> str:
        """Highest clocks and the power limit in words, as far as the device tells."""
        nvml = self.nvml
        milliwatts = self.ask("nvmlDeviceGetEnforcedPowerLimit")
        texts = {
            "SM up to {} MHz": self.ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_SM),
            "memory {} MHz": self.ask("nvmlDeviceGetMaxClockInfo", nvml.NVML_CLOCK_MEM),
            "{} W": None if milliwatts is None else milliwatts // 1000,
        }
        return ", ".join(text.format(v) for text, v in texts.items() if v is not None)

    def driver(self) -> str:
        """Version of the driver."""
        return str(self.nvml.nvmlSystemGetDriverVersion())


@functools.cache
def current() -> Gpu:
    """The GPU of this process; raises Unavailable, with the reason, where NVML has none for it."""
    return Gpu()


def described() -> tuple[str, str]:
    """(name with clocks and power limit, driver version) of the current GPU."""
    name = torch.cuda.get_device_name()
    try:
        gpu = current()
    except Unavailable as error:
        return f"{name} ({error})", "unknown"
    return ", ".join(filter(None, (name, gpu.limits()))), gpu.driver()


@dataclass
class Watch:
    """Two looks at the device; nothing on a CPU, and where NVML does not answer."""

    look: Callable[[], State] | None = None
    states: list[State] = field(default_factory=list)

    def take(self) -> None:
        """Look now."""
        if self.look is not None:
            self.states.append(self.look())

    def facts(self) -> dict[str, Any]:
        """`clocks` ({figure: [before, after]}) and `throttled` (reasons) of what lay between."""
        if len(self.states) < 2:
            return {}
        before, after = self.states[0], self.states[-1]
        clocks = {
            name: [before.figures[name], after.figures[name]]
            for name in before.figures
            if name in after.figures
        }
        grown = {name for name, ns in after.lost.items() if ns > before.lost.get(name, ns)}
        return {"clocks": clocks, "throttled": sorted(before.reasons | after.reasons | grown)}

    def mark(self, rows: list[dict]) -> None:
        """Add the facts to rows."""
        facts = self.facts()
        for row in rows:
            row.update(facts)


@contextlib.contextmanager
def watched(device: str) -> Iterator[Watch]:
    """Look at the device before and after what runs inside, also where it fails."""
    watch = Watch()
    if device == "cuda":
        with contextlib.suppress(Unavailable):
            watch.look = current().look
    watch.take()
    try:
        yield watch
    finally:
        watch.take()
