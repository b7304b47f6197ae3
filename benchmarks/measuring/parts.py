"""Part of a session: commands one after the other, ended when their time is over.

A part has a budget of seconds for all that its commands do, compiling included. When it is spent,
the command and everything that it has started are interrupted, as by Ctrl-C, so that they save;
after a grace they are killed.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

GRACE = 15.0
"""Seconds for an interrupted process to save and leave."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Environment in which nothing waits for a network that is not there."""


@dataclass
class Part:
    """Commands that run one after the other, all within `budget` seconds."""

    name: str
    budget: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    absent: str = ""
    """Reason why the part is left out here; empty when it runs."""


def heed_interrupts() -> None:
    """Undo, in a child, what a shell does to a command in the background: SIGINT is ignored there,
    and so by all of its children, which could then not be stopped in time to save."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launch(command: list[str], log: TextIO, folder: Path, env: dict[str, str]) -> subprocess.Popen:
    """Start a command with its output in the log, in a process group of its own."""
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=env,
        start_new_session=True, preexec_fn=heed_interrupts,
    )  # fmt: skip


def stop(process: Any) -> None:
    """Interrupt a process group, so that it saves as on Ctrl-C; kill it after the grace."""
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
            break
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return
    try:
        # Of a process that has left, what it has started may still be there.
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def execute(
    part: Part, out: Path, folder: Path, seconds: float, start_process: Callable = launch
) -> dict[str, Any]:
    """Run one part from a folder; its entry in summary.json."""
    if part.absent:
        return {"part": part.name, "result": f"absent: {part.absent}", "seconds": 0.0}
    start, result = time.monotonic(), "passed"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **OFFLINE, **part.environment}
    with open(out / f"{part.name}.log", "w", encoding="utf-8") as log:
        for command in part.commands:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            process = start_process(command, log, folder, environment)
            try:
                process.wait(max(1.0, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                stop(process)
                result = f"stopped after {seconds:.0f} s"
                break
            except KeyboardInterrupt:
                stop(process)
                raise
            if process.returncode:
                result = f"failed with {process.returncode}"
                break
    spent = round(time.monotonic() - start, 1)
    return {"part": part.name, "result": result, "seconds": spent}


class Summary:
    """Results of the parts so far, those of earlier calls included, in DIR/summary.json."""

    def __init__(self, out: Path) -> None:
        self.path = out / "summary.json"
        before = json.loads(self.path.read_text()) if self.path.exists() else []
        self.entries: dict[str, dict[str, Any]] = {entry["part"]: entry for entry in before}

    def note(self, entry: dict[str, Any]) -> None:
        """Add or replace a part's entry."""
        self.entries.pop(entry["part"], None)
        self.entries[entry["part"]] = entry
        beside = self.path.with_name(self.path.name + ".part")
        beside.write_text(json.dumps(list(self.entries.values()), indent=1) + "\n")
        beside.replace(self.path)

    def begin(self, part: Part) -> None:
        """Note that a part runs: all that is there of it when this process is killed."""
        self.note({"part": part.name, "result": "not finished", "seconds": 0.0})


def pack(folder: Path, path: Path) -> None:
    """Replace the archive by one of the folder as it is now."""
    beside = path.with_name(path.name + ".part")
    with tarfile.open(beside, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    beside.replace(path)
