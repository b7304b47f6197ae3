"""flowgrpo curate: a curated set of image-text pairs, with its report."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from flowgrpo.curation import report
from flowgrpo.curation.curate import curate
from flowgrpo.curation.options import CurateOptions
from flowgrpo.evaluation.table import print_whole
from flowgrpo.runs.display import QUIET, Terminal, mode_of


def curate_sources(options: CurateOptions, console: Console | None = None) -> dict[str, Any]:
    """Make the curated set, or go on with it; print its counts.

    Returns:
        The content of dataset.json.
    """
    console = console or Terminal(highlight=False)
    with CurationProgress(console, mode_of("auto", console), options.limit) as progress:
        about = curate(options, progress)
    print_whole(console, report.summary(about))
    if options.pairs and not about["counts"]["pairs"]:
        console.print(
            "No training prompt has two images whose weighted sums differ enough for a pair.",
            soft_wrap=True,
        )
    names = "dataset.json, report.html, histograms.png"
    console.print(f"Written to {options.out}: {names}.", soft_wrap=True, markup=False)
    return about


class CurationProgress:
    """The progress of a curation: a moving bar on a terminal, elsewhere a line now and then."""

    def __init__(self, console: Console, mode: str, total: int | None) -> None:
        self.console, self.mode, self.total = console, mode, total
        self._first: tuple[int, float] | None = None

    def __enter__(self) -> CurationProgress:
        self._printed = time.monotonic()
        self._progress = None
        if self.mode == "bar":
            self._progress = Progress(
                TextColumn("curating"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[count]}", markup=False),
                console=self.console,
                expand=True,
                refresh_per_second=4,
                transient=True,
            )
            # Without a total the bar moves to and fro: a source does not say how long it is.
            self._task = self._progress.add_task("curating", total=self.total, count="")
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def __call__(self, read: int, stays: int) -> None:
        """Take the images that were read, and those of them that stay so far."""
        now = time.monotonic()
        if self._first is None:
            # A command that goes on begins with the images of before.
            self._first = (read, now)
        count, seconds = read - self._first[0], now - self._first[1]
        speed = f"  {count / seconds:.1f} images/s" if count and seconds > 0 else ""
        text = f"{read} images read, {stays} stay{speed}"
        if self._progress is not None:
            self._progress.update(self._task, completed=read, count=text)
        elif self.mode == "plain" and now - self._printed >= QUIET:
            self._printed = now
            self.console.print(text, soft_wrap=True, markup=False)
