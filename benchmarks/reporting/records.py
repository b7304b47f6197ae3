"""Records of measurements: one JSON file per suite and device, with machine, versions and command.

    {"device", "driver", "versions": {...}, "commit", "command", "date",
     "rows": [{"suite", "case", "provider", "metric", "value", "unit"}, ...]}

A row that was measured on a GPU also has "clocks" ({"sm_mhz": [before, after], "memory_mhz",
"watts", "celsius"} around its case) and "throttled", the reasons why the clocks were lowered then.

Providers: `ours` (and variants of it), `eager` (flow_grpo's code), `compile` (that code at its
best under torch.compile), `ceiling` (what the device can do, measured in the same run). A suite may
add facts such as "failures" and "skipped" (cases that did not fit into the time given).
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from measuring import gpu_state

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
PACKAGES = ("torch", "triton", "numpy", "diffusers", "transformers", "peft", "flowgrpo")


def row(suite: str, case: str, provider: str, metric: str, value: float, unit: str) -> dict:
    """One row of a record, its value rounded to six digits."""
    return {
        "suite": suite,
        "case": case,
        "provider": provider,
        "metric": metric,
        "value": float(f"{value:.6g}"),
        "unit": unit,
    }


def output_path(suite: str, args: argparse.Namespace) -> Path:
    """File that a suite writes: --out, or one among the results; for a smoke run, which measures
    nothing, one in the system's folder for temporary files."""
    folder = Path(tempfile.gettempdir()) if args.smoke else RESULTS
    return args.out or folder / f"{suite}-{args.device}.json"


def cpu_name() -> str:
    """Name of the CPU, and the cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        if match := re.search(r"^model name\s*: (.*)$", text, re.M):
            name = match.group(1)
    except OSError:
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a measurement depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    return versions


@functools.cache
def commit() -> str:
    """The commit measured, with "+" when the tree differed from it when this was first asked, which
    is before the process writes any record. Outside a repository, $FLOWGRPO_COMMIT."""
    try:
        head = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty=+"],
            cwd=BENCHMARKS, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return head.stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("FLOWGRPO_COMMIT", "unknown")


def command() -> str:
    """Command line of this process from the repository's root: `python benchmarks/NAME ...`, or
    `python benchmarks ...` where Python runs the folder."""
    script = Path(sys.argv[0]).resolve()
    program = "benchmarks" if script == BENCHMARKS else f"benchmarks/{script.name}"
    return shlex.join(["python", program, *sys.argv[1:]])


def record(rows: list[dict], device: str, **more: Any) -> dict[str, Any]:
    """A full record of `rows` measured on "cpu" or "cuda"."""
    described = gpu_state.described() if device == "cuda" else (cpu_name(), platform.release())
    name, driver = described
    return {
        "device": name,
        "driver": driver,
        "versions": versions(),
        "commit": commit(),
        "command": command(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **more,
        "rows": rows,
    }


def write(content: dict[str, Any], path: Path) -> None:
    """Write a record beside its path and rename it, so that nobody reads half a record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1) + "\n")
    beside.replace(path)


def tell_throttled(case: str, watch: gpu_state.Watch) -> None:
    """Print why a case ran with lowered clocks, where it did."""
    if reasons := watch.facts().get("throttled"):
        print(f"{case}: throttled ({', '.join(reasons)})", flush=True)


def record_cases(
    cases: Iterable[Any],
    rows_of: Callable[[Any], list[dict]],
    out: Path,
    device: str,
    budget: float,
    **facts: Any,
) -> int:
    """Record the rows of case after case; the exit code.

    None begins after `budget` seconds; one that fails is listed, and the next one begins. The
    record is written after every case: a run that is cut off leaves what it has.
    """
    rows: list[dict] = []
    failures: list[str] = []
    skipped: list[str] = []
    start = time.perf_counter()
    for case in cases:
        if time.perf_counter() - start > budget:
            skipped.append(case.name)
            continue
        measured: list[dict] = []
        with gpu_state.watched(device) as watch:
            try:
                measured = rows_of(case)
            # A provider may fail in any way; the other cases are measured all the same.
            except Exception as error:
                failures.append(f"{case.name}: {type(error).__name__}: {error}".splitlines()[0])
                traceback.print_exc()
        watch.mark(measured)
        tell_throttled(case.name, watch)
        rows += measured
        write(record(rows, device, **facts, failures=failures, skipped=skipped), out)
    write(record(rows, device, **facts, failures=failures, skipped=skipped), out)
    print(f"wrote {out}" + (f"; not begun: {', '.join(skipped)}" if skipped else ""))
    for line in failures:
        print(f"failed: {line}")
    return 1 if failures else 0


def read(path: Path) -> dict[str, Any]:
    """The record in a file; ValueError where it is none."""
    content = json.loads(path.read_text())
    missing = {"device", "versions", "commit", "command", "date", "rows"} - set(content)
    if missing:
        raise ValueError(f"{path} is not a benchmark record: it lacks {sorted(missing)}")
    return content


def find(rows: list[dict], **fields: str) -> float | None:
    """Value of the row with these fields; None where there is no such row."""
    for r in rows:
        if all(r[k] == v for k, v in fields.items()):
            return r["value"]
    return None
