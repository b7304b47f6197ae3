"""The tables of a comparison: one at equal images, one at equal seconds of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from rich.table import Table

from flowgrpo.comparison.readings import AXES, Axis, Estimate, Reading, agreeing_seeds, order
from flowgrpo.comparison.report import Report
from flowgrpo.runs.display import clock

NONE = "-"
"""A cell of what is not there."""


@dataclass(frozen=True)
class Cells:
    """A table as text."""

    title: str
    head: list[str]
    rows: list[list[str]]


def cells(report: Report, axis: Axis) -> Cells:
    """Write the table at the budget of `axis`."""
    scores = list(report.base.scores)[1:] if report.base else []
    figures = list(report.base.quality) if report.base else []
    unit = ", %" if report.percent else ""
    head = [
        *("", f"{report.label}{unit}\n(95 % interval)", "seeds,\nlowest to highest"),
        *("against\nthe base", f"against\n{report.arms[0]}"),
        *("images", "seconds", "quality\nheld", *figures, *scores, "KL to\nthe base"),
    ]
    rows = []
    if report.base is not None:
        row = _row(report, "base", report.base, len(report.seeds), figures, scores)
        # It is the same in all seeds, and has neither trained nor changed.
        rows.append([*row[:2], *[NONE] * 6, *row[8:-1], NONE])
    for arm in report.arms:
        reading = report.readings[axis][arm]
        if reading is None:
            width = len(head) - 2
            rows.append([arm, _absence(report, arm), *[""] * width])
        else:
            row = _row(report, arm, reading, len(report.seeds), figures, scores)
            if arm == report.arms[0]:
                row[4] = NONE
            rows.append(row)
    return Cells(title(report, axis), head, rows)


def title(report: Report, axis: Axis) -> str:
    """Say where the runs are read."""
    budget = report.budgets[axis]
    if not budget:
        return f"Equal {axis}: no run is finished"
    text = f"{budget:,.0f} images" if axis == "images" else f"{budget:,.1f} s of training"
    why = "" if report.set_by_study(axis) else ", where the shortest run ends"
    return f"Equal {axis}: after {text}{why}"


def _row(
    report: Report,
    label: str,
    reading: Reading,
    seeds: int,
    figures: Sequence[str],
    scores: Sequence[str],
) -> list[str]:
    scale, digits = (100, 1) if report.percent else (1, 3)
    accuracy, values = reading.accuracy, reading.seeds.values()
    low, high = (f"{scale * value:.{digits}f}" for value in (min(values), max(values)))
    count = "" if len(values) == seeds else f" ({len(values)} of {seeds} seeds)"
    if report.tolerances:
        # Seeds that are outside in one figure or another are not known to be others.
        outside = ", ".join(f"{name} in {n}" for name, n in reading.outside.items())
        guard = f"no: {outside} of {len(values)}" if outside else "yes"
    else:
        guard = NONE
    return [
        label,
        f"{scale * accuracy.value:.{digits}f} ({_interval(accuracy, scale, digits)})",
        f"{low} to {high}{count}",
        _change(reading.change, scale, digits),
        NONE if reading.against_first is None else _change(reading.against_first, scale, digits),
        f"{reading.images:,.0f}",
        f"{reading.seconds:,.1f}",
        guard,
        *(_figure(reading.quality.get(name)) for name in figures),
        *(_figure(reading.scores.get(name)) for name in scores),
        NONE if reading.kl is None else f"{reading.kl:.2e}",
    ]


def _absence(report: Report, arm: str) -> str:
    """Say why an arm has no figure."""
    states = [result.state for result in report.results[arm]]
    failed = states.count("failed")
    if failed == len(states):
        return "failed"
    waiting = states.count("unfinished")
    if not waiting:
        # Finished runs that end before a budget that was raised in the files.
        return "not reached"
    text = f"{waiting} of {len(states)} runs not finished"
    return f"{text}, {failed} failed" if failed else text


def _interval(estimate: Estimate, scale: int, digits: int, sign: str = "") -> str:
    low, high = (f"{scale * bound:{sign}.{digits}f}" for bound in estimate.interval)
    return f"{low} to {high}"


def _change(estimate: Estimate, scale: int, digits: int) -> str:
    value = f"{scale * estimate.value:+.{digits}f}"
    return f"{value} ({_interval(estimate, scale, digits, '+')})"


def _figure(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}"


def order_line(report: Report, axis: Axis) -> str:
    """Name the arms by their accuracy, and count the seeds that agree; "" with fewer than two."""
    readings = report.readings[axis]
    labels = order(readings)
    if len(labels) < 2:
        return ""
    text = labels[0]
    for before, label in pairwise(labels):
        equal = readings[before].accuracy.value == readings[label].accuracy.value
        text += f" {'=' if equal else '>'} {label}"
    agreeing, count = agreeing_seeds(readings)
    seeds = "1 seed puts" if count == 1 else f"{count} seeds put"
    return f"Order at equal {axis}: {text}; {agreeing} of {seeds} them in it alone."


def failures(report: Report) -> list[str]:
    """List the runs that failed, each with the last line of its log."""
    return [
        f"{result.run.name} failed: {result.error}"
        for result in report.all_results
        if result.state == "failed"
    ]


def lines_below(report: Report) -> list[str]:
    """List the sentences below the tables."""
    orders = [line for axis in AXES if (line := order_line(report, axis))]
    return [*orders, *report.notes(), *failures(report)]


def rich_table(table: Cells) -> Table:
    """Make a table for the terminal."""
    grid = Table(title=table.title, title_justify="left", box=None, padding=(0, 1))
    for number, name in enumerate(table.head):
        grid.add_column(name, justify="left" if number == 0 else "right", no_wrap=True)
    for row in table.rows:
        grid.add_row(*row, style="red" if row[1] == "failed" else "")
    return grid


def markdown(report: Report) -> str:
    """Write table.md: the question, both tables, and how they are to be read."""
    study = report.study
    finished = sum(result.state == "finished" for result in report.all_results)
    seeds = ", ".join(map(str, report.seeds))
    lines = [f"# {study.name}", ""]
    if study.question:
        lines += [study.question, ""]
    trained = sum(
        result.summary["seconds"].get("total", 0.0)
        for result in report.all_results
        if result.summary
    )
    lines += [
        f"Recipe `{study.recipe}`, seeds {seeds}; {finished} of {len(report.all_results)} runs "
        f"finished, {clock(trained)} in all.",
        "",
    ]
    for axis in AXES:
        table = cells(report, axis)
        lines += [f"## {table.title}", "", _markdown_row(table.head)]
        lines += ["|" + "---|" * len(table.head)]
        lines += [*map(_markdown_row, table.rows), ""]
    if below := lines_below(report):
        lines += [f"- {_escape(line)}" for line in below]
        lines.append("")
    lines += [READING, ""]
    return "\n".join(lines)


READING = """\
A figure between two evaluations of a run is linear between them. Intervals are over prompts, by a
bootstrap, with all seeds of a prompt together; how much another seed of training may change, the
lowest and the highest seed say. Changes are paired: prompt by prompt, on equal noise. Seconds are
of rollouts, rewards and updates; evaluations are not counted. The KL is of paths of one sampler,
in nats an element."""


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape, row)) + " |"


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
