"""Runs the tests of random input with many examples, chosen anew.

    python benchmarks fuzz --examples 10000       # writes results/fuzz-flowgrpo.json

tests/flowgrpo/test_random_input.py says what is tried. The record has the examples of each test, of
which none may fail.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from reporting import records

ROOT = records.BENCHMARKS.parent
TESTS = "tests/flowgrpo/test_random_input.py"
LIBRARIES = ("hypothesis", "pydantic", "fastapi", "tyro", "pillow")


def examples_of(output: str) -> tuple[Counter[str], Counter[str]]:
    """Examples that passed and that failed, by test, in the statistics that Hypothesis prints."""
    passed: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    test = ""
    for line in output.splitlines():
        if match := re.fullmatch(r"\S+::(\w+):", line):
            test = match.group(1)
        elif match := re.search(r"- (\d+) passing\D*(\d+) failing", line):
            passed[test] += int(match.group(1))
            failed[test] += int(match.group(2))
    return passed, failed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--examples", type=int, default=10_000, help="of a test, default: 10000")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "fuzz-flowgrpo.json")
    args = parser.parse_args(argv)
    records.commit()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", TESTS, "--hypothesis-show-statistics"],
        cwd=ROOT,
        env={**os.environ, "FLOWGRPO_FUZZ": str(args.examples)},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    passed, failed = examples_of(done.stdout)
    rows = [
        row(test, metric, counter[test], "1")
        for test in passed
        for metric, counter in (("examples", passed), ("failures", failed))
    ]
    rows.append(row("all", "examples", passed.total(), "1"))
    rows.append(row("all", "failures", failed.total(), "1"))
    rows.append(row("all", "time", time.perf_counter() - start, "s"))
    versions = {**records.versions(), **{name: metadata.version(name) for name in LIBRARIES}}
    records.write(records.record(rows, "cpu", versions=versions), args.out)
    if done.returncode:
        print(done.stdout)
    for r in rows:
        print(f"{r['case']:44} {r['metric']:9} {r['value']:.0f}")
    print(f"wrote {args.out}")
    return done.returncode


def row(case: str, metric: str, value: float, unit: str) -> dict:
    """One figure of the record."""
    return records.row("fuzz-flowgrpo", case, "ours", metric, value, unit)
