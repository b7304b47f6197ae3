"""Running the runs: a process each, as many at once as cores, memory and GPUs allow.

Seconds of training are compared, so all runs have the same number of threads, and none has more
company than another by design: on CPUs as many processes as cores (or runs) share the cores, on
GPUs each has a device. Memory decides on CPUs when the next may begin. What a run takes is
measured: the first begins alone, and the others when it has been through two iterations; before
that an estimate by the model's sizes counts, where there is one.

A process is ``flowgrpo train --run.resume FOLDER`` in a session of its own, so that a Ctrl-C in the
terminal reaches it only through this one: once, to finish its iteration and save. It also ends so
if this process dies.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from flowgrpo.comparison import machine
from flowgrpo.comparison.folder import Attempt, Folder, Run
from flowgrpo.config import Config, ConfigError
from flowgrpo.runs.process import Stop

POLL = 0.25
"""Seconds between two looks at the processes."""
GRACE = 10.0
"""Seconds that an aborted process has before it is killed."""
MARGIN = 1.1
"""Memory that must be free for the next run, as a multiple of what one takes."""


@dataclass(frozen=True)
class Slots:
    """Shares of the machine."""

    count: int
    """Runs at once, at most."""
    threads: int
    """CPU threads of each."""
    gpus: tuple[str, ...] = ()
    """Devices, for CUDA_VISIBLE_DEVICES; empty: CPUs."""
    by_memory: bool = True
    """True: a run begins only if the memory is there."""


def share_machine(jobs: int | Literal["auto"], runs: int, config: Config) -> Slots:
    """Divide the machine among `runs` runs like `config`.

    Args:
        jobs: runs at once; "auto": one a GPU, or as many as there are cores.

    Raises:
        ConfigError: jobs is below 1.
    """
    if jobs != "auto" and jobs < 1:
        raise ConfigError(f"--jobs is {jobs}, but auto or at least 1 is expected; change it.")
    device, cores = config.policy.device, machine.cores()
    gpus: tuple[str, ...] = ()
    if device in ("auto", "cuda"):
        gpus = tuple(machine.gpus())
    on_one = device.startswith("cuda:")
    most = 1 if on_one else len(gpus) if gpus else cores
    count = min(most if jobs == "auto" else jobs, max(runs, 1))
    threads = config.run.threads or max(1, cores // count)
    return Slots(count, threads, gpus, jobs == "auto" and not gpus and not on_one)


Launch = Callable[[list[str], IO[bytes], dict[str, str]], subprocess.Popen]
"""f(command, log, environment) -> the process."""


def start_process(command: list[str], log: IO[bytes], env: dict[str, str]) -> subprocess.Popen:
    """Start `command` in a session of its own, with its output in `log`; it ends with this one."""
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=env,
        start_new_session=True,
        preexec_fn=_in_child(),
    )


@dataclass
class Process:
    """A process of one run."""

    run: Run
    popen: subprocess.Popen
    log: IO[bytes]
    gpu: str | None
    date: str
    peak: int = 0
    stopped: bool = False
    """True: it was asked to stop."""
    progress: Progress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = Progress(self.run)

    def send(self, number: int) -> None:
        """Send a signal."""
        with suppress(ProcessLookupError):
            os.kill(self.popen.pid, number)


class Progress:
    """How far a run is, by its metrics.jsonl, of which only what is new is read."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._offset, self._rest = 0, b""
        self._reset()

    def _reset(self) -> None:
        self.iteration, self.seconds = 0, 0.0
        self.accuracy: float | None = None
        self.evaluated = -1
        """Iteration of the last evaluation; -1: none."""

    @property
    def share(self) -> float:
        """Share of the run that is done, by the budget that is furthest from its end."""
        run = self.run.config.run
        shares = [self.iteration / run.steps]
        if run.min_seconds:
            shares.append(self.seconds / run.min_seconds)
        return min(1.0, *shares)

    @property
    def images(self) -> int:
        """Images that the run has trained on."""
        return self.iteration * self.run.config.sample.rows

    def update(self) -> None:
        """Read the lines that were written since the last time."""
        path = self.run.folder / "metrics.jsonl"
        try:
            if path.stat().st_size < self._offset:
                # A run that goes on cuts its file back to the checkpoint.
                self._offset, self._rest = 0, b""
                self._reset()
            with open(path, "rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            with suppress(ValueError, KeyError, TypeError):
                self._take(json.loads(line))

    def _take(self, line: dict[str, Any]) -> None:
        if line["kind"] == "train":
            self.iteration = line["iteration"]
            self.seconds += sum(line["seconds"].values())
        elif line["kind"] == "eval":
            self.accuracy, self.evaluated = line["accuracy"], line["iteration"]


class Runner:
    """Runs the processes of a comparison; `on_change` is called when one begins or ends."""

    def __init__(
        self,
        folder: Folder,
        runs: Sequence[Run],
        slots: Slots,
        estimate: int = 0,
        on_change: Callable[[str, Process, Attempt | None], None] | None = None,
        launch: Launch | None = None,
    ) -> None:
        """
        Args:
            runs: those to be run; finished ones are left out.
            estimate: bytes that a run is expected to take; 0: not known.
            launch: starts a process; default: `start_process`.
        """
        self.folder, self.slots = folder, slots
        self.waiting = [run for run in runs if not run.finished]
        self.active: list[Process] = []
        self.failed: list[Attempt] = []
        self.need = estimate
        """Bytes of the largest run that was seen; 0: not known yet."""
        self.commit = machine.commit()
        self._on_change = on_change or (lambda *arguments: None)
        self._launch = launch or start_process

    def loop(self, stop: Stop, on_tick: Callable[[], None] | None = None) -> None:
        """Run all that is waiting, until it has ended or `stop` is requested.

        Args:
            stop: when it is requested, the runs are asked to save and end, and no new one begins.
            on_tick: called several times a second.
        """
        try:
            while self.active or (self.waiting and not stop.requested):
                while not stop.requested and self._next_fits():
                    self._start(self.waiting.pop(0))
                if stop.requested:
                    for process in self.active:
                        if not process.stopped:
                            process.stopped = True
                            process.send(signal.SIGINT)
                time.sleep(POLL)
                for process in list(self.active):
                    self._look_at(process)
                if on_tick is not None:
                    on_tick()
        finally:
            # Nothing is active unless this is an error, or a second Ctrl-C.
            self._abort()

    def _next_fits(self) -> bool:
        if not self.waiting or len(self.active) >= self.slots.count:
            return False
        if not self.active or not self.slots.by_memory:
            return True
        free = machine.free_memory()
        if free is None:
            return True
        measured = [p for p in self.active if p.progress.iteration >= 2]
        need = max([self.need, *(p.peak for p in measured)])
        if not need:
            # The first is not through two iterations yet.
            return False
        now = [machine.process_memory(p.popen.pid)[0] for p in self.active]
        to_come = sum(max(0, need - size) for size in now)
        return free - to_come >= MARGIN * need

    def _start(self, run: Run) -> None:
        self.folder.begin(run)
        taken = [p.gpu for p in self.active]
        gpu = min(self.slots.gpus, key=taken.count) if self.slots.gpus else None
        threads = str(run.config.run.threads)
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if gpu is not None:
            env["CUDA_VISIBLE_DEVICES"] = gpu
        command = [sys.executable, "-m", "flowgrpo", "train", "--run.resume", str(run.folder)]
        log = open(self.folder.log_of(run), "ab")  # noqa: SIM115
        popen = self._launch([*command, "--run.threads", threads], log, env)
        process = Process(run, popen, log, gpu, _now())
        self.active.append(process)
        self._on_change("begun", process, None)

    def _look_at(self, process: Process) -> None:
        process.progress.update()
        process.peak = max(process.peak, machine.process_memory(process.popen.pid)[1])
        code = process.popen.poll()
        if code is None:
            return
        process.progress.update()
        self.need = max(self.need, process.peak)
        attempt = self._end(process, code)
        if not process.run.finished and not process.stopped:
            self.failed.append(attempt)
            self._on_change("failed", process, attempt)
        else:
            self._on_change("finished" if process.run.finished else "stopped", process, attempt)

    def _end(self, process: Process, code: int) -> Attempt:
        process.log.close()
        self.active.remove(process)
        name, driver = machine.name_of(process.gpu)
        failed = not process.run.finished and not process.stopped
        attempt = Attempt(
            run=process.run.name,
            # A process that ends well without a result has failed all the same.
            exit=code or (1 if failed else 0),
            stopped=process.stopped,
            error=last_line(self.folder.log_of(process.run)) if failed else "",
            threads=process.run.config.run.threads,
            at_once=self.slots.count,
            machine=name,
            driver=driver,
            commit=self.commit,
            date=process.date,
            peak_bytes=process.peak,
        )
        self.folder.note(attempt)
        return attempt

    def _abort(self) -> None:
        """End what is still active: by a Ctrl-C more, and after `GRACE` seconds at once."""
        for process in self.active:
            process.send(signal.SIGINT if process.stopped else signal.SIGTERM)
            process.stopped = True
        deadline = time.monotonic() + GRACE
        for process in list(self.active):
            try:
                process.popen.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.popen.kill()
                process.popen.wait()
            self._end(process, process.popen.returncode)


def last_line(path: Path) -> str:
    """Read the last line of a log that is not empty; "" if there is none."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    # A bar that is drawn over itself ends its lines by a return alone.
    lines = [line.strip() for line in text.replace("\r", "\n").split("\n")]
    return next((line for line in reversed(lines) if line), "")


def _now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def _in_child() -> Callable[[], None]:
    """Make what a new process does first: take the signal that stops it, and ask to be ended when
    this one dies, however it does."""
    # Loaded here, because between fork and exec nothing may be.
    prctl = None
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            prctl = ctypes.CDLL("libc.so.6").prctl

    def begin() -> None:
        # A shell that starts a command in the background has it ignore Ctrl-C, and so would we.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if prctl is not None:
            # PR_SET_PDEATHSIG
            prctl(1, signal.SIGTERM)

    return begin
