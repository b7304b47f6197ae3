"""The run of a suite of whole models: command line, providers, measurements, record.

A suite measures case after case. Each provider of a case is built, called once to warm up (its
memory is taken then) and once more, and all of them are timed in turns. The record is written after
every case, also one that is interrupted, so that a run that is cut off leaves what it has; a case
that does not fit in memory has a row that says so, one that fails another way is listed under
"failures", and the suite goes on.
"""

from __future__ import annotations

import argparse
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from measuring import ceiling, gpu_state, memory, profiles, waits
from models.cases import Case
from providers.pool import COMPILED, GPU_ONLY, PROVIDERS, Pool
from reporting import records


def parser(doc: str | None, providers: str) -> argparse.ArgumentParser:
    """Options of every suite."""
    options = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    options.add_argument("--device", choices=("cpu", "cuda"), default=default)
    options.add_argument("--providers", default=providers, help="comma-separated")
    options.add_argument("--cases", default="", help="only cases whose name contains one of these")
    options.add_argument("--batch-sizes", default="", help="only these batch sizes")
    options.add_argument(
        "--compile-batch-sizes",
        default="",
        help="where compile and ours-compiled run; default: all",
    )
    options.add_argument("--rounds", type=int, default=3, help="timed calls of each provider")
    options.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; no case begins after them"
    )
    options.add_argument(
        "--alone", action="store_true", help="one provider in memory at a time: no taking turns"
    )
    options.add_argument(
        "--set", nargs=2, action="append", default=[], metavar=("FIELD", "VALUE"),
        help="change a field of the trainer's configuration, for ours",
    )  # fmt: skip
    options.add_argument("--profile", action="store_true", help="profile instead of timing")
    options.add_argument(
        "--smoke", action="store_true", help="tiny models, two rounds, without compile"
    )
    options.add_argument(
        "--out", type=Path, help="default: results/SUITE-DEVICE.json; a temporary file with --smoke"
    )
    return options


def listed(text: str) -> list[str]:
    """Values of a comma-separated option."""
    return [word.strip() for word in text.split(",") if word.strip()]


def choose(cases: list[Case], args: argparse.Namespace, name: Callable[[Case], str]) -> list[Case]:
    """Cases that --cases and --batch-sizes leave."""
    sizes, patterns = listed(args.batch_sizes), listed(args.cases)
    chosen = [
        case
        for case in cases
        if (not sizes or str(case.batch) in sizes)
        and (not patterns or any(pattern in name(case) for pattern in patterns))
    ]
    if not chosen:
        raise SystemExit("--cases and --batch-sizes leave no case")
    return chosen


class SuiteRun:
    """One run of one suite: its rows, its record, its providers."""

    def __init__(self, suite: str, args: argparse.Namespace) -> None:
        unknown = set(listed(args.providers)) - set(PROVIDERS)
        if unknown:
            raise SystemExit(f"--providers knows {', '.join(PROVIDERS)}, not {', '.join(unknown)}")
        self.suite, self.args, self.device = suite, args, args.device
        self.rounds = 2 if args.smoke else args.rounds
        self.out = records.output_path(suite, args)
        self.rows: list[dict] = []
        self.failures: list[str] = []
        self.texts: list[str] = []
        self.skipped: list[str] = []
        self.start = time.perf_counter()
        self.ceiling = ceiling.measure(self.device, args.smoke)
        self.row("device", "ceiling", "matmul", self.ceiling.matmul / 1e12, "TFLOP/s")
        self.row("device", "ceiling", "copy", self.ceiling.copy / 1e9, "GB/s")
        changes = typed(dict(args.set))
        self.pool = Pool(self.device, trained=suite != "rollout", changes=changes)
        self.write()

    def row(self, case: str, provider: str, metric: str, value: float, unit: str) -> None:
        """Add a row to the record."""
        self.rows.append(records.row(self.suite, case, provider, metric, value, unit))

    def write(self) -> None:
        """Write the record, and the profiles' tables beside it."""
        facts = {"failures": self.failures, "skipped": self.skipped}
        records.write(records.record(self.rows, self.device, **facts), self.out)
        if self.texts:
            self.out.with_suffix(".txt").write_text("\n".join(self.texts))

    def over_budget(self) -> bool:
        return time.perf_counter() - self.start > self.args.budget

    def providers(self, case: Case) -> list[str]:
        """Providers that --providers and --compile-batch-sizes leave for this case."""
        sizes = listed(self.args.compile_batch_sizes)
        names = listed(self.args.providers)
        if self.args.smoke or (sizes and str(case.batch) not in sizes):
            names = [name for name in names if name not in COMPILED]
        return [name for name in names if self.device == "cuda" or name not in GPU_ONLY]

    def together(self, case: Case) -> Iterator[list[str]]:
        """Groups of providers that share the memory and are timed in turns: all of a case, or with
        --alone one after the other."""
        names = self.providers(case)
        for some in [[name] for name in names] if self.args.alone else [names]:
            yield some
            if self.args.alone:
                for name in some:
                    self.pool.drop(name)
                self.pool.forget()

    def compare(self, case: Case, title: str, measure: Callable[..., dict]) -> None:
        """Measure a case's providers beside each other; a line and the rows of their speed.

        measure(run, case, names, text) returns the seconds of the providers `names`, which are
        in memory together, and adds to `text` what the line says of each.
        """
        times: dict[str, list[float]] = {}
        text: dict[str, str] = {}
        try:
            for names in self.together(case):
                times |= measure(self, case, names, text)
        finally:
            # Also of a run that is stopped, of the providers that were done.
            self.speed_rows(title, times)
        print_line(title, text)

    def attempt(self, what: str, name: str, case: str, action: Callable[[], Any]) -> Any:
        """Result of the action; None after it ran out of memory or failed, which is recorded."""
        try:
            return action()
        # A provider may fail in any way; the others of this run are measured all the same.
        except Exception as error:
            if memory.out_of_memory(error):
                print(f"{case:36s} {name:10s} out of memory ({what})", flush=True)
                self.row(case, name, "out_of_memory", 1, "1")
            else:
                first = f"{type(error).__name__}: {error}".splitlines()[0]
                self.failures.append(f"{case} {name} {what}: {first}")
                traceback.print_exc()
        self.pool.drop(name)
        self.pool.forget()
        return None

    def each(self, cases: Iterable[Case], one: Callable[[Case], None], name: Callable) -> int:
        """Measure the cases within the budget; the exit code."""
        for case in cases:
            if self.over_budget():
                self.skipped.append(name(case))
                continue
            self.pool.forget()
            count = len(self.rows)
            try:
                with gpu_state.watched(self.device) as watch:
                    self.attempt("case", "all", name(case), lambda case=case: one(case))
            finally:
                # Also of a case that is interrupted.
                watch.mark(self.rows[count:])
                records.tell_throttled(name(case), watch)
                self.write()
        self.write()
        print(f"wrote {self.out}")
        for line in self.failures:
            print(f"failed: {line}")
        if self.skipped:
            print(f"not begun within {self.args.budget:.0f} s: {', '.join(self.skipped)}")
        return 1 if self.failures else 0

    def rate_rows(self, case: str, name: str, flops: float, seconds: float) -> None:
        """Rows of operations a second, over the data sheet (on a GPU) and the measured product."""
        rate = flops / seconds
        self.row(case, name, "rate", rate / 1e12, "TFLOP/s")
        self.row(case, name, "of_measured", 100 * rate / self.ceiling.matmul, "%")
        if self.device == "cuda":
            self.row(case, name, "mfu", 100 * rate / 1e12 / ceiling.PEAK_TFLOPS, "%")

    def memory_rows(self, case: str, name: str, peak: memory.Peak) -> None:
        """Row of a provider's memory: its resident weights and what the call took beyond them."""
        resident = self.pool.resident.get(name, 0)
        self.row(case, name, "peak_memory", (resident + peak.reserved) / memory.GIB, "GiB")

    def host_rows(self, case: str, name: str, call: Callable[[], Any], per: int, unit: str) -> None:
        """Rows of launches and synchronisations of one call, over `per` steps. GPU only."""
        if self.device != "cuda":
            return
        syncs: list[str] = []

        def watched() -> None:
            with waits.recorded_waits() as recorded:
                call()
            syncs.extend(recorded)

        profile = profiles.record(watched, self.device)
        self.row(case, name, "syncs", len(syncs) / per, f"synchronisations/{unit}")
        self.row(case, name, "launches", profile.launches / per, f"launches/{unit}")
        self.row(case, name, "kernels", profile.kernels / per, f"kernels/{unit}")

    def speed_rows(self, case: str, times: dict[str, list[float]]) -> None:
        """Rows of the speed of each provider over eager, by medians."""
        if "eager" in times:
            eager = statistics.median(times["eager"])
            for name, values in times.items():
                if name != "eager":
                    speed = eager / statistics.median(values)
                    self.row(case, name, "speedup_vs_eager", speed, "x")

    def profile(self, case: str, name: str, call: Callable[[], Any], what: str, per: int) -> None:
        """Rows and a table of one warm call of `per` steps."""
        profile = profiles.record(call, self.device)
        title = f"{case}, {name}: {what}"
        self.texts.append(profiles.table(title, profile, per))
        self.rows += profiles.rows(f"{case} {what}", name, profile)
        print(self.texts[-1], flush=True)


def typed(changes: dict[str, Any]) -> dict[str, Any]:
    """Values of --set as Python values: true, false, numbers; the rest stay texts."""
    words = {"true": True, "false": False, "none": None}

    def value(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        if text.lower() in words:
            return words[text.lower()]
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    return {name: value(text) for name, text in changes.items()}


def print_line(case: str, texts: dict[str, str]) -> None:
    """Print a case and a text for each provider."""
    print(f"{case:36s} " + "  ".join(f"{n} {text}" for n, text in texts.items()), flush=True)
