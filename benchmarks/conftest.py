"""The suites under pytest-benchmark: `pytest benchmarks --benchmark-only`.

Each bench_*.py that times lists its cases (`timings`); each case and provider is one test, and the
providers of a case are one table. The rounds are ours: when the first provider of a case is asked
for, all of its providers that were chosen are made ready and timed in turns, on buffers out of the
caches, by CUDA events on a GPU. pytest-benchmark is handed each provider's rounds, as those of a
clock that replays them, and does what it does with its own: tables, --benchmark-json,
--benchmark-compare, --benchmark-autosave, histograms.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator

import pytest
import torch

from measuring import gpu_state, memory, timers
from measuring.timing import Options, Timing
from reporting import records


def pytest_addoption(parser) -> None:
    group = parser.getgroup("suites")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    group.addoption("--bench-device", choices=("cpu", "cuda"), default=default)
    group.addoption("--bench-rounds", type=int, default=15, help="timed calls of each provider")
    group.addoption("--bench-compile", action="store_true", help="with torch.compile's providers")
    group.addoption("--bench-smoke", action="store_true", help="tiny sizes, two rounds")


def pytest_configure(config) -> None:
    if not config.pluginmanager.hasplugin("benchmark"):
        raise pytest.UsageError("the suites need pytest-benchmark: pip install '.[bench]'")


class ReplayedClock:
    """A timer that makes each measurement last what the next of some rounds has lasted."""

    __name__ = "rounds in turns"

    def __init__(self) -> None:
        self.readings: Iterator[float] = iter(())

    def load(self, rounds: list[float]) -> None:
        """Replay these rounds."""
        self.readings = iter([reading for seconds in rounds for reading in (0.0, seconds)])

    def __call__(self) -> float:
        return next(self.readings)


def options_of(config) -> Options:
    """The choices on the command line."""
    chosen = config.option
    return Options(chosen.bench_device, chosen.bench_smoke, chosen.bench_compile)


def timings_of(module, config) -> dict[str, Timing]:
    """Name -> case of a suite, listed once."""
    if not hasattr(module, "_timings_by_case"):
        cases = module.timings(options_of(config))
        module._timings_by_case = {timing.case: timing for timing in cases}
    return module._timings_by_case


def pytest_generate_tests(metafunc) -> None:
    if "hand_over" in metafunc.fixturenames:
        cases = timings_of(metafunc.module, metafunc.config).values()
        pairs = [(timing.case, provider) for timing in cases for provider in timing.providers]
        ids = [f"{case}-{provider}" for case, provider in pairs]
        metafunc.parametrize(("case", "provider"), pairs, ids=ids)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if "hand_over" in getattr(item, "fixturenames", ()):
            suite = item.module.__name__.removeprefix("bench_")
            group = f"{suite}: {item.callspec.params['case']}"
            item.add_marker(pytest.mark.benchmark(group=group, timer=ReplayedClock()))


class Measurements:
    """Rounds of the case that is being reported; the one before it is let go."""

    def __init__(self, config, items: list) -> None:
        self.config, self.device = config, config.option.bench_device
        self.chosen: dict[tuple[str, str], list[str]] = {}
        for item in items:
            if "hand_over" in getattr(item, "fixturenames", ()):
                params = item.callspec.params
                key = item.module.__name__, params["case"]
                self.chosen.setdefault(key, []).append(params["provider"])
        self.threads = torch.get_num_threads()
        self.key: tuple[str, ...] = ()
        self.times: dict[str, list[float]] = {}
        self.watch = gpu_state.Watch()
        self.error: Exception | None = None

    def rounds(self, module, case: str, provider: str, rounds: int) -> list[float]:
        """Seconds of a provider's rounds, timed beside the others of its case."""
        timing = timings_of(module, self.config)[case]
        names = self.chosen[module.__name__, case] if timing.together else [provider]
        key = (module.__name__, case, *names)
        if key != self.key:
            self.key, self.error = key, None
            memory.release(self.device)
            torch.set_num_threads(timing.threads or self.threads)
            try:
                with gpu_state.watched(self.device) as self.watch:
                    self.times = timers.take_turns(timing.ready(names), rounds, timing.limit)
            except Exception as error:
                self.error = error
        if self.error is not None:
            raise RuntimeError(f"{case} could not be timed: {self.error}") from self.error
        return self.times[provider]


@pytest.fixture(scope="session")
def measurements(request) -> Measurements:
    return Measurements(request.config, request.session.items)


@pytest.fixture
def hand_over(request, benchmark, measurements, case, provider):
    """A function that measures a case, at the first of its providers, and gives pytest-benchmark
    the rounds of this one."""

    def hand_over() -> None:
        config = request.config.option
        rounds = 2 if config.bench_smoke else config.bench_rounds
        if benchmark.disabled:
            rounds = 1
        seconds = measurements.rounds(request.module, case, provider, rounds)
        clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
        clock.load(seconds)
        benchmark.extra_info.update(measurements.watch.facts())
        benchmark.pedantic(lambda: None, rounds=len(seconds), iterations=1)

    return hand_over


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    device = config.option.bench_device
    name = gpu_state.described()[0] if device == "cuda" else records.cpu_name()
    machine_info["device"] = name
    machine_info["versions"] = records.versions()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, output_json) -> None:
    output_json["commit"] = records.commit()
    output_json["command"] = shlex.join(["pytest", *map(str, config.invocation_params.args)])
