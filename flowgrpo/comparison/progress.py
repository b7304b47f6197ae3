"""The runs of a comparison on the terminal, while they train.

On a terminal a bar for all runs and a line for each that is active, renewed in place. Elsewhere a
line when a run begins, is evaluated, ends or fails.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from flowgrpo.comparison.folder import Attempt, Folder, Run
from flowgrpo.comparison.running import Process, Runner
from flowgrpo.runs.display import clock, mode_of


class Display:
    """The progress of one call of ``flowgrpo compare``; a context manager."""

    def __init__(self, console: Console, runs: Sequence[Run], folder: Folder) -> None:
        self.console, self.folder = console, folder
        self.mode = mode_of("auto", console)
        self.runs, self.total = list(runs), len(runs)
        self.finished = sum(run.finished for run in runs)
        self.failed = 0
        self.runner: Runner
        """To be set before the first `tick`."""
        self._started = time.monotonic()
        self._done = float(self.finished)
        """Runs' worth of work that was there at the start, or came from elsewhere."""
        self._evaluated: dict[str, int] = {}
        self._live: Live | None = None

    def __enter__(self) -> Display:
        if self.mode == "bar":
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def note(self, text: str) -> None:
        """Print a line above what is live."""
        self.console.print(text, soft_wrap=True, markup=False)

    def change(self, event: str, process: Process, attempt: Attempt | None) -> None:
        """Take what `Runner` reports: "begun", "finished", "failed" or "stopped"."""
        name, progress = process.run.name, process.progress
        if event == "begun":
            progress.update()
            # What is there already was not done in the time of this call.
            self._done += progress.share
            self._evaluated[name] = progress.evaluated
            where = f", goes on after {progress.iteration} iterations" if progress.iteration else ""
            if self.mode != "bar":
                self.note(f"{name} begins{where}: {self.folder.log_of(process.run)}")
        elif event == "finished":
            self.finished += 1
            self._tell_evaluation(process)
            self.note(
                f"{name} finished ({self.finished}/{self.total}): {progress.images:,} images in "
                f"{progress.seconds:,.1f} s of training"
            )
        elif event == "failed":
            self.failed += 1
            self.note(
                f"{name} failed with exit code {attempt.exit}: {attempt.error or 'no output'} "
                f"({self.folder.log_of(process.run)}); the others go on."
            )
        else:
            self.note(f"{name} stopped after {progress.iteration} iterations.")

    def tick(self) -> None:
        """Renew what is live, or print the evaluations that are new."""
        if self._live is not None:
            self._live.update(self._render())
            return
        for process in self.runner.active:
            self._tell_evaluation(process)

    def _tell_evaluation(self, process: Process) -> None:
        progress, name = process.progress, process.run.name
        if self.mode == "bar" or progress.evaluated <= self._evaluated.get(name, -1):
            return
        self._evaluated[name] = progress.evaluated
        if progress.accuracy is not None:
            self.note(
                f"{name}  iteration {progress.evaluated}  held-out {progress.accuracy:.3f}  "
                f"{progress.images:,} images  {progress.seconds:,.1f} s of training  "
                f"{self._left()}"
            )

    def _work(self) -> float:
        """Count the runs' worth of work that is done."""
        return self.finished + sum(process.progress.share for process in self.runner.active)

    def _left(self) -> str:
        """Expect the time to the end of all runs, by the speed of this call so far."""
        work = self._work() - self._done
        left = self.total - self.failed - self._work()
        elapsed = time.monotonic() - self._started
        # Before that a guess would be of the models' loading.
        if work < 0.02:
            return ""
        return f"about {clock(elapsed / work * max(left, 0))} left"

    def _render(self) -> Group:
        runner = self.runner
        counts = [f"{self.finished}/{self.total} finished", f"{len(runner.active)} active"]
        if self.failed:
            counts.append(f"{self.failed} failed")
        head = Table.grid(padding=(0, 1), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True, justify="right")
        bar = ProgressBar(total=self.total, completed=self._work())
        head.add_row("  ".join(counts), bar, self._left())
        lines = Table.grid(padding=(0, 2))
        lines.add_column(no_wrap=True)
        for _ in range(5):
            lines.add_column(no_wrap=True, justify="right")
        for process in runner.active:
            progress = process.progress
            accuracy = "" if progress.accuracy is None else f"held-out {progress.accuracy:.3f}"
            lines.add_row(
                Text(process.run.name),
                f"{100 * progress.share:.0f} %",
                f"iteration {progress.iteration}" if progress.iteration else "starting",
                f"{progress.images:,} images",
                f"{progress.seconds:,.0f} s",
                accuracy,
            )
        return Group(head, lines)
