"""Evaluations side by side, as a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console
from rich.segment import Segments
from rich.table import Table

if TYPE_CHECKING:
    from flowgrpo.evaluation.evaluate import Evaluation


def show(console: Console, table: Table) -> None:
    """Print a table in full: rich would leave out columns and cut figures off where the terminal is
    narrow, and takes a file for 80 characters wide."""
    wide = console.options.update(width=1000)
    wide = wide.update(width=console.measure(table, options=wide).maximum)
    console.print(Segments(console.render(table, wide)), crop=False, end="")


def comparison(reports: Mapping[str, Evaluation], tolerances: Mapping[str, float]) -> Table:
    """Reports side by side: accuracy, tasks, other rewards, quality, with their intervals.

    Args:
        reports: label -> report, the base first; the last one is compared with it.
        tolerances: quality figure -> largest allowed change, above 0 for a rise and below 0 for a
            fall; a figure outside is marked.
    """
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("", no_wrap=True)
    for label in reports:
        table.add_column(label, justify="right", no_wrap=True)
    both = len(reports) > 1
    if both:
        table.add_column("change", justify="right")
    columns = list(reports.values())
    first, last = columns[0], columns[-1]

    def row(name: str, values: list[float], scale: float, form: str, style: str = "") -> None:
        cells = [form.format(scale * value) for value in values]
        if both:
            cells.append(f"{scale * (values[-1] - values[0]):+.{form[-3]}f}")
        table.add_row(name, *cells, style=style)

    share = all(r.label == "accuracy" for r in columns)
    scale, form = (100, "{:.1f}") if share else (1, "{:.3f}")
    name = "accuracy, %" if share else next(iter(first.scores))
    row(name, [r.accuracy for r in columns], scale, form, "bold")
    bounds = [[form.format(scale * bound) for bound in r.interval] for r in columns]
    table.add_row("  95 % interval", *(" to ".join(pair) for pair in bounds), style="dim")
    for task in first.tasks:
        values = [r.tasks.get(task, float("nan")) for r in columns]
        row(f"  {task.replace('_', ' ')}", values, scale, form)
    for name in list(first.scores)[1:]:
        row(name, [r.scores.get(name, float("nan")) for r in columns], 1, "{:.3f}")
        bounds = [[f"{bound:.3f}" for bound in r.intervals.get(name, ())] for r in columns]
        if all(bounds):
            table.add_row("  95 % interval", *(" to ".join(pair) for pair in bounds), style="dim")
    for name in first.quality:
        beyond = both and not within(name, first.quality, last.quality, tolerances)
        values = [r.quality.get(name, float("nan")) for r in columns]
        row(f"quality: {name}", values, 1, "{:.3f}", "red" if beyond else "")
    return table


def within(
    name: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    tolerances: Mapping[str, float],
) -> bool:
    """Whether a quality figure changed by no more than its tolerance (True without one)."""
    if name not in tolerances:
        return True
    change, allowed = after[name] - before[name], tolerances[name]
    return change <= allowed if allowed >= 0 else change >= allowed
