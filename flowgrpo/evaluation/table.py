"""Evaluations side by side, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

from flowgrpo.evaluation.quality import within_tolerance

if TYPE_CHECKING:
    from flowgrpo.evaluation.evaluate import Evaluation


def print_whole(console: Console, table: Table) -> None:
    """Print a table in full: rich would leave out columns and cut figures off where the terminal is
    narrow, and takes a file for 80 characters wide."""
    wide = console.options.update(width=1000)
    wide = wide.update(width=console.measure(table, options=wide).maximum)
    console.print(Segments(console.render(table, wide)), crop=False, end="")


def comparison(evaluations: Mapping[str, Evaluation], tolerances: Mapping[str, float]) -> Table:
    """Set evaluations side by side: accuracy, tasks, other rewards, quality, with their intervals.

    Args:
        evaluations: label -> evaluation, the base first; the last one is compared with it.
        tolerances: quality figure -> largest allowed change, above 0 for a rise and below 0 for a
            fall; a figure outside is marked.
    """
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("", no_wrap=True)
    for label in evaluations:
        table.add_column(label, justify="right", no_wrap=True)
    with_change = len(evaluations) > 1
    if with_change:
        table.add_column("change", justify="right")
    columns = list(evaluations.values())
    first, last = columns[0], columns[-1]

    def add_row(
        name: str, values: Sequence[float], scale: int = 1, digits: int = 3, style: str = ""
    ) -> None:
        cells = [f"{scale * value:.{digits}f}" for value in values]
        if with_change:
            cells.append(f"{scale * (values[-1] - values[0]):+.{digits}f}")
        table.add_row(name, *cells, style=style)

    def add_intervals(
        intervals: Sequence[tuple[float, float]], scale: int = 1, digits: int = 3
    ) -> None:
        cells = [
            f"{scale * low:.{digits}f} to {scale * high:.{digits}f}" for low, high in intervals
        ]
        table.add_row("  95 % interval", *cells, style="dim")

    percent = all(e.label == "accuracy" for e in columns)
    name, scale, digits = ("accuracy, %", 100, 1) if percent else (next(iter(first.scores)), 1, 3)
    add_row(name, [e.accuracy for e in columns], scale, digits, "bold")
    add_intervals([e.interval for e in columns], scale, digits)
    for task in first.tasks:
        values = [e.tasks.get(task, float("nan")) for e in columns]
        add_row(f"  {task.replace('_', ' ')}", values, scale, digits)
    for name in list(first.scores)[1:]:
        add_row(name, [e.scores.get(name, float("nan")) for e in columns])
        if all(name in e.intervals for e in columns):
            add_intervals([e.intervals[name] for e in columns])
    for name in first.quality:
        values = [e.quality.get(name, float("nan")) for e in columns]
        inside = within_tolerance(name, first.quality, last.quality, tolerances)
        add_row(f"quality: {name}", values, style="" if inside else "red")
    return table
