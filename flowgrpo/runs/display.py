"""The terminal of a run: banner, progress, and the table of evaluations.

On a terminal the progress is a bar with the figures of the last iteration under it; elsewhere (a
file, a CI log) it is about forty plain lines a run. An evaluation has a bar of its own
(`EvaluationProgress`), elsewhere about ten lines, and none if it is short.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from flowgrpo.config import Config
from flowgrpo.evaluation.table import comparison, print_whole

if TYPE_CHECKING:
    from flowgrpo.evaluation.evaluate import Evaluation

PLAIN_LINES = 40
QUIET = 30.0
"""Seconds that an evaluation goes on before the first plain line, and between two of them."""
WITHOUT_COMPARISON = ("opd", "refl")
"""Objectives that learn where the rewards of a group are equal, too."""
EQUAL_ITERATIONS = 10
"""Iterations in a row without a reward that differs inside a group, before the run says so."""
# Metric -> its name and format in the progress.
FIGURES = {
    "reward": ("reward", "{:.3f}"),
    "accuracy": ("accuracy", "{:.3f}"),
    "kl": ("KL", "{:.2e}"),
    "clip_fraction": ("clipped", "{:.2f}"),
    "max_ratio_error": ("ratio error", "{:.1e}"),
}


class Terminal(Console):
    """A console whose reader may go: `flowgrpo train | tee log` loses tee to the same Ctrl-C that
    the run is to be saved by. Lines that are printed from then on are dropped.

    A character that the reader's encoding lacks, as of the path of a run in ASCII, is its number.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if hasattr(self.file, "reconfigure"):
            self.file.reconfigure(errors="backslashreplace")

    def on_broken_pipe(self) -> None:
        """Fall silent; rich would exit."""
        self.quiet = True
        # Python writes the rest of the buffers when it ends, which would fail once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


class Display:
    """The terminal of one run."""

    def __init__(self, config: Config, console: Console | None = None) -> None:
        self.console = console or Terminal(highlight=False)
        self.config = config
        self.mode = mode_of(config.run.progress, self.console)
        self.line_interval = max(1, config.run.steps // PLAIN_LINES)
        self._times: deque[float] = deque(maxlen=50)
        self._expected_iterations = config.run.steps
        self._evaluation = 0.0
        self._live: Live | None = None
        self._expected = False
        """The expected time to the end was printed."""
        self._equal, self._warned = 0, False
        """Iterations in a row without a difference, and if the warning was printed."""

    def banner(self, lines: Mapping[str, str]) -> None:
        """Print a name and a value a line, under the name of the recipe."""
        if self.mode == "none":
            return
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        table.add_column()
        for name, value in lines.items():
            table.add_row(name, Text(value))
        self.console.print(Text(f"flowgrpo {self.config.recipe}", style="bold"))
        self.console.print(table)
        self.console.print()

    def note(self, text: str) -> None:
        """Print one line between the others."""
        if self.mode != "none":
            self.console.print(text, soft_wrap=True, markup=False)

    def iteration(
        self,
        iteration: int,
        metrics: Mapping[str, Any],
        seconds: float,
        expected: int | None = None,
    ) -> None:
        """Show the figures of the iteration number `iteration` (from 1), which took `seconds`.

        `expected`: iterations of the whole run, as far as is known; default: run.steps.
        """
        if self.mode == "none":
            return
        self._expected_iterations = expected or self.config.run.steps
        self._times.append(seconds)
        left = self.seconds_left(iteration)
        rate = self.config.sample.rows / seconds if seconds > 0 else 0.0
        figures = "  ".join(
            f"{name} {form.format(metrics[key])}"
            for key, (name, form) in FIGURES.items()
            if isinstance(metrics.get(key), int | float)
        )
        text = f"{figures}  {rate:.0f} images/s"
        if self.mode == "bar":
            self._bar(iteration, text, left)
        elif iteration % self.line_interval == 0 or iteration in (1, self._expected_iterations):
            about = "" if self._expected_iterations == self.config.run.steps else "about "
            self.console.print(
                f"iteration {iteration}/{about}{self._expected_iterations}  {text}  {clock(left)} "
                "left",
                soft_wrap=True,
                markup=False,
            )
        if len(self._times) == 3 and not self._expected:
            self._expected = True
            self.note(f"Expected time to the end: {clock(left)}.")
        self._look_for_differences(metrics)

    def _look_for_differences(self, metrics: Mapping[str, Any]) -> None:
        """Warn once a run that no group's rewards differed for `EQUAL_ITERATIONS` iterations."""
        if self.config.optim.objective in WITHOUT_COMPARISON:
            return
        groups = self.config.sample.prompts_per_iteration
        empty = metrics.get("equal_groups", 0) + metrics.get("dropped_groups", 0)
        self._equal = self._equal + 1 if empty >= groups else 0
        if self._equal == EQUAL_ITERATIONS and not self._warned:
            self._warned = True
            self.note(
                f"Nothing to learn from: for {EQUAL_ITERATIONS} iterations no rewards differed "
                f"inside any of the {groups} groups; try other prompts (sample.prompts), more "
                "noise (sample.noise_level), larger groups (sample.group_size) or a finer reward "
                "(reward.weights)."
            )

    def seconds_left(self, iteration: int) -> float:
        """Expect the seconds to the end after `iteration`: by the mean of the recent iterations,
        and with the evaluations to come."""
        if not self._times:
            return 0.0
        run = self.config.run
        # The first iteration of a process warms up allocators and caches.
        times = list(self._times)[1:] or list(self._times)
        evaluations = 1
        if run.eval_every:
            evaluations = -(-run.steps // run.eval_every) - iteration // run.eval_every
        mean = sum(times) / len(times)
        iterations = max(self._expected_iterations - iteration, 0)
        return iterations * mean + max(evaluations, 0) * self._evaluation

    def evaluating(self, label: str, images: int, rewards: Iterable[str]) -> EvaluationProgress:
        """Open the progress of an evaluation, in place of the bar."""
        self.pause()
        return EvaluationProgress(self.console, self.mode, label, images, rewards)

    def evaluation(self, iteration: int, label: str, evaluation: Evaluation) -> None:
        """Show an evaluation in one line."""
        self._evaluation = evaluation.seconds
        low, high = evaluation.interval
        self.note(
            f"iteration {iteration}  {label}: held-out {evaluation.label} "
            f"{evaluation.accuracy:.3f} ({low:.3f} to {high:.3f}), {evaluation.images} images in "
            f"{evaluation.seconds:.1f} s"
        )

    def table(self, evaluations: Mapping[str, Evaluation], tolerances: Mapping[str, float]) -> None:
        """Show the table of `comparison`."""
        if self.mode != "none":
            self.pause()
            print_whole(self.console, comparison(evaluations, tolerances))

    def pause(self) -> None:
        """Take the bar down; the next iteration puts it up again."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _bar(self, iteration: int, text: str, left: float) -> None:
        if self._live is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]} left"),
                console=self.console,
                expand=True,
            )
            self._task = self._progress.add_task(
                self.config.recipe, total=self.config.run.steps, left=clock(left)
            )
            self._live = Live(console=self.console, refresh_per_second=4, transient=True)
            self._live.start()
        total = self._expected_iterations
        self._progress.update(self._task, completed=iteration, total=total, left=clock(left))
        self._live.update(Group(self._progress, Text(text, style="dim", overflow="ellipsis")))


def mode_of(progress: str, console: Console) -> str:
    """Choose "bar", "plain" or "none" by `run.progress` and the console."""
    if progress != "auto":
        return progress
    return "bar" if console.is_terminal else "plain"


class EvaluationProgress:
    """The progress of one evaluation, which `evaluate.evaluate` reports::

        with EvaluationProgress(console, mode, "base", 2212, ["geneval_strict"]) as progress:
            evaluate.evaluate(..., on_progress=progress)

    On a terminal a bar that is taken down at the end. Elsewhere nothing for the first `QUIET`
    seconds, then one line, and one for each tenth of the images.
    """

    def __init__(
        self, console: Console, mode: str, label: str, images: int, rewards: Iterable[str]
    ) -> None:
        self.console, self.mode, self.label, self.total = console, mode, label, images
        self.rewards = ", ".join(rewards)
        self._images, self._left, self._scoring = 0, "", False
        self._tenth = 0

    def __enter__(self) -> EvaluationProgress:
        self._started = self._printed = time.monotonic()
        # The seconds and images that the speed is measured from.
        self._since = (self._started, 0)
        self._progress = self._timer = None
        if self.mode == "bar":
            self._progress = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}"),
                console=self.console,
                expand=True,
                refresh_per_second=4,
                transient=True,
            )
            self._task = self._progress.add_task(self.label, total=self.total, count=self._count())
            self._progress.start()
        elif self.mode == "plain":
            # A timer, as a first batch or a reward may take many minutes.
            self._timer = threading.Timer(QUIET, self._line)
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer.join()

    def __call__(self, stage: str, images: int) -> None:
        """Take "sampling" and the images that are there, or "scoring" when the rewards begin."""
        now = time.monotonic()
        self._scoring = stage == "scoring"
        if not self._scoring:
            seconds, count = now - self._since[0], images - self._since[1]
            self._left = f"{clock(seconds / max(count, 1) * (self.total - images))} left"
            if self._images == 0:
                # The first batch warms up caches; the speed is that of those after it.
                self._since = (now, images)
            self._images = images
        if self._progress is not None:
            # Without a total the bar moves to and fro: no reward reports its progress.
            total = None if self._scoring else self.total
            self._progress.update(
                self._task,
                description=self._text(),
                total=total,
                completed=images,
                count=self._count(),
            )
        elif self._timer is not None and self._due(now):
            self._line()

    def _due(self, now: float) -> bool:
        if self._scoring:
            return now - self._started >= QUIET
        new = 10 * self._images // self.total > self._tenth
        # The last images have no line, as scoring follows at once.
        return new and now - self._printed >= QUIET and self._images < self.total

    def _text(self) -> str:
        return f"{self.label}: scoring by {self.rewards}" if self._scoring else self.label

    def _count(self) -> str:
        if self._scoring:
            return f"{self.total} images"
        return f"{self._images}/{self.total} images  {self._left}".rstrip()

    def _line(self) -> None:
        self._printed, self._tenth = time.monotonic(), 10 * self._images // self.total
        passed = f"{clock(self._printed - self._started)} passed"
        text = f"{self._text()}  {self._count()}  {passed}"
        self.console.print(text, soft_wrap=True, markup=False)


def clock(seconds: float) -> str:
    """Write seconds as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
