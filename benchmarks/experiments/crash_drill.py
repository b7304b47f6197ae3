"""Kills runs of the embedded model by SIGKILL, resumes them, and compares what they end with.

    python benchmarks crash-drill --kills 50 --each 8       # writes results/crash-drill.json

A run of seconds is killed once or several times and resumed until it ends. It has to end with what
an uninterrupted run ends with, bit for bit: metrics.jsonl without "seconds", the tensors of the
adapter, of the last checkpoint and of the evaluations, the pictures of the samples, summary.json
without "seconds", the names of all files, and none that begins with a dot. A kill is lost if its
run does not.

Kills are spread over the stages. Of rollout, update, evaluation, checkpoint and export, the one
with the fewest is aimed at until each has `--each`, by turns at a moment at random in it and at a
file operation at random (a file opened, renamed, removed or cut), just before it happens. After
that the aims go round all stages, with moments at random in the whole run between them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

import flowgrpo
import flowgrpo_kernels
from flowgrpo.config import Config, replace
from flowgrpo.recipes import recipe
from reporting import records

STAGES = (
    *("start", "opening", "rollout", "reward", "update"),
    *("evaluation", "checkpoint", "export", "between"),
)
"""Stages of a run. opening: of the run directory; between: logging and pictures."""

STRATA = ("rollout", "update", "evaluation", "checkpoint", "export")
"""Stages that have a least number of kills."""

AIMED = ("rollout", "update", "evaluation", "checkpoint", "export", "opening", "between")
"""Stages that are aimed at."""

OPERATIONS = {
    *("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.listdir"),
    "os.scandir",
}
"""Audit events of Python that are file operations, each raised before it happens."""

PRELOAD = (
    "matplotlib.figure",
    "peft",
    "torch.utils.tensorboard",
    "diffusers.pipelines.stable_diffusion_3",
    "transformers.models.clip.modeling_clip",
    "flowgrpo.cli.main",
    "flowgrpo.train",
    "experiments.crash_drill",
)
"""Modules that the processes of the runs find imported."""

LIMIT = 300.0
"""Seconds after which a process counts as hung."""

_context = multiprocessing.get_context("forkserver")


def tiny(folder: Path) -> Config:
    """A run of a few seconds in `folder`, with evaluations and a checkpoint an iteration."""
    return replace(
        recipe("nano"),
        **{
            "policy.device": "cpu",
            "policy.text_cache": str(folder / "text"),
            "sample.prompts_per_iteration": 2,
            "sample.group_size": 4,
            "sample.batch_size": 4,
            "sample.steps": 4,
            "sample.eval_steps": 3,
            "reward.weights": {"jpeg_compressibility": 1.0, "nano_partial": 1.0},
            "reward.report": ("jpeg_compressibility", "nano_partial"),
            "optim.warmup": 2,
            "optim.decay": 0,
            "run.out": str(folder / "run"),
            "run.steps": 3,
            "run.eval_every": 2,
            "run.eval_prompts": 6,
            "run.checkpoint_every": 1,
            "run.threads": 1,
            "run.progress": "plain",
        },
    )


@dataclass(frozen=True)
class Aim:
    """The moment of a kill."""

    kind: str
    """"moment in a stage", "moment", "file operation", or "none"."""
    stage: str = ""
    count: int = 0
    """The stage's entry, or its file operation, counted from 1."""
    delay: float = 0.0
    """Seconds after the entry, or after the start of the process."""


class Marks:
    """Progress of a run in shared memory, which outlives its process.

    The present stage, and of each stage the entries, the seconds and the file operations.
    """

    def __init__(self) -> None:
        self._array = _context.RawArray("d", 1 + 3 * len(STAGES))

    @property
    def stage(self) -> str:
        return STAGES[int(self._array[0])]

    def entries(self, stage: str) -> int:
        return int(self._array[1 + 3 * STAGES.index(stage)])

    def seconds(self, stage: str) -> float:
        return self._array[2 + 3 * STAGES.index(stage)]

    def operations(self, stage: str) -> int:
        return int(self._array[3 + 3 * STAGES.index(stage)])

    def count_operation(self) -> int:
        """Count a file operation in the present stage, and return its number."""
        index = 3 + 3 * int(self._array[0])
        self._array[index] += 1
        return int(self._array[index])

    @contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        """Mark a stage while the block runs."""
        outer, index, start = self._array[0], STAGES.index(stage), time.perf_counter()
        self._array[1 + 3 * index] += 1
        self._array[0] = index
        try:
            yield
        finally:
            self._array[2 + 3 * index] += time.perf_counter() - start
            self._array[0] = outer


def marked(marks: Marks, stage: str, method: Any) -> Any:
    """`method` with its stage marked."""

    def call(*args: Any, **keywords: Any) -> Any:
        with marks.inside(stage):
            return method(*args, **keywords)

    return call


def run_marked(config: Config, log: Path, marks: Marks, aim: Aim) -> None:
    """Start the run of `config`, or go on with it where it has begun, with its stages marked; the
    body of a process. Its output goes to `log`."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The process inherits objects, not streams, of the one that it is forked from.
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
    from flowgrpo import train
    from flowgrpo.cli import main
    from flowgrpo.runs import monitor

    class MarkedClock(train.Clock):
        @contextmanager
        def __call__(self, stage: str) -> Iterator[None]:
            with marks.inside(stage), super().__call__(stage):
                yield

    train.Clock = MarkedClock
    for owner, name, stage in (
        (monitor.Monitor, "_evaluate_untrained", "evaluation"),
        (monitor.Monitor, "_evaluate", "evaluation"),
        (monitor.RunDirectory, "open", "opening"),
        (monitor.RunDirectory, "restore", "opening"),
        (monitor.Monitor, "iteration", "between"),
        (monitor.Monitor, "finish", "between"),
        (monitor.Monitor, "_draw", "between"),
        (monitor.RunDirectory, "save", "checkpoint"),
        (monitor.RunDirectory, "finish", "export"),
    ):
        setattr(owner, name, marked(marks, stage, getattr(owner, name)))

    def watch(event: str, arguments: object) -> None:
        if event in OPERATIONS:
            number = marks.count_operation()
            if aim.kind == "file operation" and (marks.stage, number) == (aim.stage, aim.count):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
    if (config.out_dir / "config.json").exists():
        sys.exit(main.main(["train", "--run.resume", str(config.out_dir)]))
    train.run(config)


def kill_at(process: Any, marks: Marks, aim: Aim) -> None:
    """Kill the process when it is where `aim` says; return once it has ended."""
    start, entered = time.perf_counter(), None
    while process.is_alive():
        now = time.perf_counter()
        if entered is None and (aim.kind == "moment" or _reached(marks, aim)):
            entered = start if aim.kind == "moment" else now
        if now - start > LIMIT or (entered is not None and now - entered >= aim.delay):
            process.kill()
            process.join(LIMIT)
            if entered is None or now - entered < aim.delay:
                raise TimeoutError(f"a run of the drill takes more than {LIMIT:g} seconds")
        time.sleep(2e-4 if entered is not None or aim.kind == "moment in a stage" else 2e-3)
    process.join(LIMIT)


def _reached(marks: Marks, aim: Aim) -> bool:
    return aim.kind == "moment in a stage" and marks.entries(aim.stage) >= aim.count


def contents(run: Path) -> dict[str, Any]:
    """Items that a finished run has to end with, by name."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    items: dict[str, Any] = {
        "metrics.jsonl": [{k: v for k, v in line.items() if k != "seconds"} for line in lines]
    }
    summary = json.loads((run / "summary.json").read_text())
    items["summary.json"] = {k: v for k, v in summary.items() if k != "seconds"}
    names = [path.relative_to(run) for path in run.rglob("*")]
    items["the names of the files"] = sorted(
        str(name) for name in names if name.parts[0] != "tensorboard"
    )
    for path in run.rglob("*.safetensors"):
        for name, tensor in load_file(path).items():
            items[f"{path.relative_to(run)}: {name}"] = tensor.numpy().tobytes()
    for path in (run / "samples").glob("*.png"):
        items[str(path.relative_to(run))] = path.read_bytes()
    return items


def difference(run: Path, expected: dict[str, Any]) -> str:
    """Name the first item in which a finished run is not as expected; "" if there is none."""
    items = contents(run)
    if hidden := [n for n in items["the names of the files"] if n.rpartition("/")[2][0] == "."]:
        return f"{hidden[0]} is left behind"
    for name in sorted(expected.keys() | items.keys()):
        if items.get(name) != expected.get(name):
            return f"{name} differs"
    return ""


@dataclass
class Tally:
    """Kills and losses."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(stage of the kill, kind of its aim) -> number."""
    lost: Counter[tuple[str, str]] = field(default_factory=Counter)
    losses: list[str] = field(default_factory=list)
    """A sentence a run that was lost."""
    runs: int = 0

    def rows(self) -> list[dict]:
        """Rows of the record."""
        rows = [row("all", "kills", self.kills.total()), row("all", "lost", self.lost.total())]
        rows.append(row("all", "runs", self.runs))
        for index, label in enumerate(("stage", "aim")):
            for name in sorted({key[index] for key in self.kills}):
                for metric, counter in (("kills", self.kills), ("lost", self.lost)):
                    total = sum(n for key, n in counter.items() if key[index] == name)
                    rows.append(row(f"{label} {name}", metric, total))
        return rows


def row(case: str, metric: str, value: float) -> dict:
    """One figure of the record."""
    return records.row("crash-drill", case, "ours", metric, value, "1")


class Drill:
    """Runs in a folder, killed by one generator of random numbers."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        each: int = 0,
        configure: Callable[[Path], Config] = tiny,
    ) -> None:
        """each: least number of kills in each stage of `STRATA`; configure: makes the run in a
        folder."""
        self.folder, self.random, self.each = folder, random.Random(seed), each
        self.configure = configure
        self.tally = Tally()
        self.hits: Counter[str] = Counter()
        """Kills so far by the stage that they fell in."""
        config = configure(folder / "whole")
        start = time.perf_counter()
        code, self.whole = self._process(config, Aim("none"))
        self.seconds = time.perf_counter() - start
        if code:
            raise RuntimeError(f"the uninterrupted run failed: {self._log(config).read_text()}")
        self.expected = contents(config.out_dir)

    def missing(self) -> int:
        """Count the kills that the stages of `STRATA` lack."""
        return sum(max(self.each - self.hits[stage], 0) for stage in STRATA)

    def aims(self) -> Iterator[Aim]:
        """Aims without end: at the stage that lacks most, then at all of them and any moment."""
        for turn in itertools.count():
            if self.missing():
                stage = min(STRATA, key=lambda name: self.hits[name])
                yield self.aim_at(stage, in_files=turn % 2 == 1)
            else:
                stage = AIMED[turn // 3 % len(AIMED)]
                if turn % 3 == 2:
                    yield Aim("moment", delay=self.random.random() * self.seconds)
                else:
                    yield self.aim_at(stage, in_files=turn % 3 == 1)

    def aim_at(self, stage: str, in_files: bool) -> Aim:
        """Draw an aim in a stage: one of its file operations, if it has any and `in_files`, or else
        a moment."""
        entries, operations = self.whole.entries(stage), self.whole.operations(stage)
        if in_files and operations:
            return Aim("file operation", stage, self.random.randint(1, operations))
        # A process that goes on with a run enters each stage less often.
        count = self.random.choice((1, self.random.randint(1, entries)))
        delay = self.random.random() * self.whole.seconds(stage) / entries
        return Aim("moment in a stage", stage, count, delay)

    def run(self, kills: int) -> Tally:
        """Kill until there have been `kills`, and `each` in each stage of `STRATA`."""
        aims = self.aims()
        while (left := max(kills - self.hits.total(), self.missing())) > 0:
            config = self.configure(self.folder / f"run-{self.tally.runs}")
            self.tally.runs += 1
            stages: list[tuple[str, str]] = []
            # The last process of a run is left alone.
            count = min(self.random.choice((1, 2, 3, 4)), left)
            code: int | None = None
            while code not in (0, 1, 2) and len(stages) < count:
                aim = next(aims)
                code, marks = self._process(config, aim)
                if code == -signal.SIGKILL:
                    stages.append((marks.stage, aim.kind))
                    self.hits[marks.stage] += 1
            if code == -signal.SIGKILL:
                code, _ = self._process(config, Aim("none"))
            problem = f"exit code {code}" if code else difference(config.out_dir, self.expected)
            self.tally.kills.update(stages)
            if problem:
                self.tally.lost.update(stages)
                log = self._log(config).read_text().strip().splitlines() if code else []
                self.tally.losses.append(f"{stages}: {problem} {' '.join(log[-1:])}".strip())
            print(f"run {self.tally.runs}: killed in {stages}: {problem or 'the same'}", flush=True)
        return self.tally

    def _process(self, config: Config, aim: Aim) -> tuple[int | None, Marks]:
        """Run one process to its end, or to the kill; its exit code and its marks."""
        marks = Marks()
        log = self._log(config)
        log.parent.mkdir(parents=True, exist_ok=True)
        process = _context.Process(target=run_marked, args=(config, log, marks, aim))
        process.start()
        kill_at(process, marks, aim)
        return process.exitcode, marks

    def _log(self, config: Config) -> Path:
        return config.out_dir.parent / "log"


def prepare_forkserver() -> None:
    """Have the processes forked from one that has imported all that a run needs."""
    # The server looks there for what it imports; its children get the path of this process.
    packages = [str(Path(package.__file__).parents[1]) for package in (flowgrpo, flowgrpo_kernels)]
    folders = [str(records.BENCHMARKS), *packages, os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    os.environ["OMP_NUM_THREADS"] = "1"
    _context.set_forkserver_preload(list(PRELOAD))


def drill(
    kills: int,
    seed: int,
    folder: Path,
    each: int = 0,
    configure: Callable[[Path], Config] = tiny,
) -> Tally:
    """Kill runs in `folder`, which is empty, `kills` times, and `each` in each of `STRATA`."""
    prepare_forkserver()
    return Drill(folder, seed, each, configure).run(kills)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="default: 50")
    parser.add_argument("--each", type=int, default=8, help="in each stage at least, default: 8")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default: 0")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "crash-drill.json")
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay")
    args = parser.parse_args(argv)
    records.commit()
    with tempfile.TemporaryDirectory() as temporary:
        tally = drill(args.kills, args.seed, args.keep or Path(temporary), args.each)
    rows = tally.rows()
    records.write(records.record(rows, "cpu", losses=tally.losses), args.out)
    for r in rows:
        print(f"{r['case']:28} {r['metric']:6} {r['value']:.0f}")
    print(f"wrote {args.out}")
    return 1 if tally.losses else 0
