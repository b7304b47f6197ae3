"""`pytest benchmarks --benchmark-only`: our rounds reach pytest-benchmark, and its tools work."""

from __future__ import annotations

import importlib
import json
import os
import runpy
from pathlib import Path

import pytest

from measuring.timing import Options
from support import torch_fork

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
SUITES = ("kernels", "blocks", "dropins", "launch", "rollout", "update", "iteration")
TWICE = """
import json, pathlib, pytest, sys
from pytest_benchmark.session import PerformanceRegression
path = pathlib.Path(sys.argv[1])
command = ["-q", "-p", "no:cacheprovider", *sys.argv[2:]]
assert pytest.main([*command, f"--benchmark-json={path}"]) == 0
record = json.loads(path.read_text())
# As if each round had taken a nanosecond before.
for bench in record["benchmarks"]:
    bench["stats"] |= dict.fromkeys(("min", "max", "mean", "median"), 1e-9)
before = path.with_name("before.json")
before.write_text(json.dumps(record))
compare = [f"--benchmark-compare={before}", "--benchmark-compare-fail=min:100%"]
try:
    pytest.main([*command, *compare])
except PerformanceRegression as error:
    sys.exit(f"found: {error}")
"""


@pytest.mark.slow
def test_rounds_in_turns_become_tables_json_and_comparisons(tmp_path):
    path = tmp_path / "now.json"
    chosen = ["--benchmark-only", "--bench-smoke", "-k", "verl-omni and not bare"]
    suite = str(BENCHMARKS / "bench_dropins.py")
    # Nothing is measured by a pytest that takes itself for one of several workers.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    env["OMP_NUM_THREADS"] = "1"
    done = torch_fork.run(TWICE, path, suite, *chosen, env=env, cwd=ROOT)
    assert "found: Performance has regressed" in done.stderr, done.stdout + done.stderr
    for metric in ("replay", "backward"):
        assert f"benchmark 'dropins: verl-omni {metric}': 2 tests" in done.stdout
    record = json.loads(path.read_text())
    assert [b["params"] for b in record["benchmarks"]] == [
        {"case": f"verl-omni {metric}", "provider": provider}
        for metric in ("replay", "backward")
        for provider in ("ours", "eager")
    ]
    for bench in record["benchmarks"]:
        assert bench["group"] == f"dropins: {bench['params']['case']}"
        assert bench["stats"]["rounds"] == 2 and min(bench["stats"]["data"]) > 1e-6
        assert bench["options"]["timer"].endswith("rounds in turns")
    assert record["machine_info"]["device"] and record["machine_info"]["versions"]["torch"]


@pytest.fixture(scope="module")
def timings():
    """Suite -> its cases with tiny sizes."""
    modules = {name: importlib.import_module(f"bench_{name}") for name in SUITES}
    options = Options("cpu", smoke=True)
    return {name: module.timings(options) for name, module in modules.items()}


def test_every_case_has_a_name_of_its_own(timings):
    for suite, cases in timings.items():
        names = [case.case for case in cases]
        assert len(set(names)) == len(names) > 0, suite
        # A name of a test is `case-provider`.
        assert all(case.providers[0] == "ours" or suite == "launch" for case in cases)


@pytest.mark.slow
@pytest.mark.parametrize("suite", ["kernels", "blocks"])
def test_providers_made_ready_can_be_timed(timings, suite):
    timing = timings[suite][0]
    timed = timing.ready(["ours"])
    assert list(timed) == ["ours"] and all(0 < timed["ours"]() < 60 for _ in range(2))


def test_the_suites_are_collected_when_asked_for_alone(pytestconfig):
    assert pytestconfig.getini("testpaths") == ["tests"]
    assert not list((ROOT / "tests").rglob("bench_*.py"))
    functions = [
        f"\ndef test_{name}(hand_over)" in (BENCHMARKS / f"bench_{name}.py").read_text()
        for name in SUITES
    ]
    assert all(functions)


def test_a_replayed_clock_gives_back_the_rounds():
    """By the plugin's own arithmetic: the second reading less the first."""
    clock = runpy.run_path(str(BENCHMARKS / "conftest.py"))["ReplayedClock"]()
    rounds = [3e-6, 0.1 + 0.2, 1e9 + 1e-3]
    clock.load(rounds)
    readings = [clock() for _ in range(6)]
    assert [b - a for a, b in zip(readings[::2], readings[1::2], strict=True)] == rounds
