"""The folder of a comparison.

    OUT/
      study.json           what is compared: the budget, and all fields of each arm
      processes.jsonl      a line for each process that ended: run, machine, threads, exit code
      runs/ARM-seedN/      ordinary run directories
      logs/ARM-seedN.log   what their processes printed
      table.md  comparison.json  comparison.png

A run that is finished is not run again, one that is not goes on from its last checkpoint. A study
that has changed is refused: its runs would not be those of one comparison. More seeds are welcome.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo import files
from flowgrpo.comparison.studies import SET_HERE, Study, folder_name
from flowgrpo.config import Config, ConfigError, replace, to_json
from flowgrpo.config.validation import require, shown
from flowgrpo.runs.directory import fields_by_name, lock

STUDY, PROCESSES = "study.json", "processes.jsonl"
FORMAT = "flowgrpo-comparison-1"
FREE = (*SET_HERE, "run.threads", "run.wandb", "policy.text_cache", "policy.offload_text_encoders")
"""Fields that may change from one call to the next: they change no number."""


@dataclass(frozen=True)
class Run:
    """One run of a comparison."""

    arm: str
    seed: int
    config: Config
    """Whole, with seed and folder."""

    @property
    def folder(self) -> Path:
        """The run directory."""
        return Path(self.config.run.out)

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return self.folder.name

    @property
    def finished(self) -> bool:
        """True once the run has ended at its budget."""
        summary = read_json(self.folder / "summary.json")
        return summary is not None and not summary.get("interrupted", True)


@dataclass(frozen=True)
class Attempt:
    """One process of a run, as processes.jsonl has it."""

    run: str
    """Name of the run directory."""
    exit: int
    """Exit code; below 0 the signal that ended it."""
    stopped: bool
    """True: this command asked it to stop."""
    error: str
    """Last line of its log, if it failed."""
    threads: int
    at_once: int
    """Processes that were allowed at once."""
    machine: str
    driver: str
    commit: str
    date: str
    peak_bytes: int
    """Largest memory that was seen; 0: not known."""


def plan_runs(
    study: Study, configs: Mapping[str, Config], seeds: Iterable[int], out: Path, threads: int
) -> list[Run]:
    """List the runs of a comparison, seed by seed, so that what is there after some is fair.

    Args:
        configs: label -> configuration, of `Study.configs`; those arms are run.
        threads: CPU threads of each run.
    """
    return [
        Run(arm, seed, _run_config(study, config, seed, out / "runs", arm, threads))
        for seed in seeds
        for arm, config in configs.items()
    ]


def _run_config(
    study: Study, config: Config, seed: int, folder: Path, arm: str, threads: int
) -> Config:
    """Set what depends on seed, folder and budget."""
    steps = max(1, math.ceil(study.images / config.sample.rows))
    eval_every = max(1, round(steps / study.evaluations)) if study.images else 0
    # Half of the way to an evaluation is the most that a killed process loses.
    checkpoint_every = max(1, eval_every // 2) if study.images else config.run.checkpoint_every
    changes = {
        "run.seed": seed,
        "run.out": str(folder / f"{folder_name(arm)}-seed{seed}"),
        "run.steps": steps,
        "run.min_seconds": float(study.seconds),
        "run.eval_every": eval_every,
        "run.eval_seconds": study.seconds / study.evaluations,
        "run.checkpoint_every": checkpoint_every,
        "run.progress": "plain",
        "run.threads": config.run.threads or threads,
    }
    return replace(config, **changes)


class Folder:
    """The folder of one comparison, locked for this process. Opened by `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._processes = open(path / PROCESSES, "a", encoding="utf-8")  # noqa: SIM115
        # Where the system has no locks, the runs' own are not there either, and they say so.
        lock(self._processes, path, "folder", "--out")

    @classmethod
    def open(cls, path: Path, study: Study, configs: Mapping[str, Config]) -> Folder:
        """Create the folder of a study, or open the one that holds it.

        Args:
            configs: label -> configuration of all arms of the study.

        Raises:
            ConfigError: it holds another study or other files, cannot be written, or is in use.
        """
        record = _record(study, configs)
        try:
            stored = path / STUDY
            if stored.is_file():
                check_same(read_study(path), record, path)
            elif path.is_dir():
                names = {p.name for p in path.iterdir() if not files.is_leftover(p)}
                require(
                    names <= {PROCESSES},
                    f"--out {str(path)!r} is not empty and holds no comparison, but a new or empty "
                    "folder, or one of this study, is expected; choose another.",
                )
            path.mkdir(parents=True, exist_ok=True)
            folder = cls(path)
            if not stored.is_file():
                files.write_json(stored, record)
            for name in ("runs", "logs"):
                (path / name).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--out {str(path)!r} cannot be written ({error.strerror}), but a folder for the "
                "runs is expected; choose another."
            ) from error
        return folder

    def close(self) -> None:
        """Release the folder."""
        self._processes.close()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_of(self, run: Run) -> Path:
        """Path of the log of a run's processes."""
        return self.path / "logs" / f"{run.name}.log"

    def begin(self, run: Run) -> None:
        """Write the run directory that a process goes on with, unless it is there."""
        if not (run.folder / "config.json").is_file():
            run.folder.mkdir(parents=True, exist_ok=True)
            files.write_text(run.folder / "config.json", to_json(run.config))

    def note(self, attempt: Attempt) -> None:
        """Add a line to processes.jsonl."""
        self._processes.write(json.dumps(vars(attempt)) + "\n")
        self._processes.flush()


def attempts(path: Path) -> dict[str, list[Attempt]]:
    """Read processes.jsonl of a comparison: name of the run -> its processes, the newest last."""
    by_run: dict[str, list[Attempt]] = {}
    try:
        lines = (path / PROCESSES).read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    for line in lines:
        try:
            attempt = Attempt(**json.loads(line))
        # A line that was being written when the process died.
        except (ValueError, TypeError):
            continue
        by_run.setdefault(attempt.run, []).append(attempt)
    return by_run


def failure(run: Run, attempts: Sequence[Attempt]) -> str:
    """Say why a run that is not finished failed: the last line that it printed; "" if it did not
    fail."""
    if run.finished or not attempts or attempts[-1].stopped or attempts[-1].exit == 0:
        return ""
    return attempts[-1].error or f"exit code {attempts[-1].exit}"


def _record(study: Study, configs: Mapping[str, Config]) -> dict[str, Any]:
    """Make the content of study.json."""
    arms = {}
    for label, config in configs.items():
        fields = fields_by_name(config)
        arms[label] = {name: value for name, value in fields.items() if name not in FREE}
    return {
        "format": FORMAT,
        "name": study.name,
        "question": study.question,
        "images": study.images,
        "seconds": study.seconds,
        "evaluations": study.evaluations,
        "arms": arms,
    }


def read_study(path: Path) -> dict[str, Any]:
    """Read study.json of a comparison."""
    values = read_json(path / STUDY)
    require(
        values is not None and values.get("format") == FORMAT,
        f"{path / STUDY} cannot be read as {FORMAT}, but what `flowgrpo compare` wrote is "
        "expected; restore it, or choose another --out.",
    )
    return values


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None if it is not there, or none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], path: Path) -> None:
    """Raise ConfigError with the first difference of two contents of study.json."""

    def refuse(what: str, new: object, old: object) -> None:
        raise ConfigError(
            f"{what} is {shown(new)}, but the comparison in {path} was started with {shown(old)}; "
            "leave it as it was, or choose another --out."
        )

    for name in ("name", "images", "seconds", "evaluations"):
        if before.get(name) != now[name]:
            refuse(f"{name} of the study", now[name], before.get(name))
    arms = list(before["arms"])
    if arms != list(now["arms"]):
        refuse("the list of arms", list(now["arms"]), arms)
    for label, fields in now["arms"].items():
        old = before["arms"][label]
        for name, value in fields.items():
            # A field that the version of then did not have is one that nobody had changed.
            if name in old and value != old[name]:
                refuse(f"{name} of the arm {label!r}", value, old[name])
