"""comparison.png: panels of accuracy against images, seconds, quality, diversity or KL.

A line is the mean over the finished seeds of an arm and its band goes from the lowest to the
highest of them, at the evaluations of all of them, each run interpolated as in readings.py. The
dashed line is the model before training, dotted lines are the budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowgrpo.comparison.readings import Axis, Point, Result, allowed_share, at, position
from flowgrpo.comparison.report import Report
from flowgrpo.evaluation.pictures import FAINT, INK, LINES, PAPER
from flowgrpo.files import replacing

GAP = 0.045
"""Distance of two labels, as a share of the height of a panel."""


@dataclass(frozen=True)
class Line:
    """One arm in one panel: float64 [P] each."""

    x: np.ndarray
    y: np.ndarray
    low: np.ndarray
    high: np.ndarray


def draw(report: Report, path: Path) -> Path:
    """Draw the panels that the study names, and write them as a PNG."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    # Labels are text, in which a $ opens no formula.
    with matplotlib.rc_context({"text.parse_math": False}), replacing(path) as temporary:
        figure = _figure(report)
        figure.savefig(temporary, format="png", facecolor=PAPER)
    return path


def _figure(report: Report) -> Any:
    from matplotlib.figure import Figure

    names = report.study.panels
    figure = Figure(figsize=(5.2 * len(names), 4.0), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for number, (axes, name) in enumerate(zip(panels, names, strict=True)):
        PANELS[name](axes, report)
        _style(axes, report, first=number == 0)
    seeds = ", ".join(map(str, report.seeds))
    title = f"{report.study.name}: {report.study.recipe}, seeds {seeds}; bands: lowest to highest"
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, color=INK)
    return figure


def lines_over(report: Report, axis: Axis) -> dict[str, Line]:
    """Compute the line of each arm over images or seconds, up to the end of its shortest run."""
    lines = {}
    for arm in report.arms:
        runs = [result.points for result in report.results[arm] if result.points]
        if not runs:
            continue
        end = min(position(points[-1], axis) for points in runs)
        places = {position(point, axis) for points in runs for point in points}
        x = np.array(sorted(value for value in places if value <= end))
        y = np.array([[_score(report, at(points, axis, b)) for b in x] for points in runs])
        lines[arm] = Line(x, y.mean(axis=0), y.min(axis=0), y.max(axis=0))
    return lines


def _score(report: Report, point: Point | None) -> float:
    assert point is not None, "the line ends where the shortest run does"
    return (100 if report.percent else 1) * report.pool.accuracy(point.per_prompt)


def _over(axis: Axis) -> Callable[[Any, Report], None]:
    """Make the function that draws the score over images or seconds."""

    def panel(axes: Any, report: Report) -> None:
        lines = lines_over(report, axis)
        for arm, line in lines.items():
            color = _color(report, arm)
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, lw=0)
            axes.plot(line.x, line.y, color=color, lw=1.8, marker="o", ms=2.5, zorder=5)
        budget = report.budgets[axis]
        if budget:
            axes.axvline(budget, color=FAINT, lw=0.8, ls=":", zorder=1)
        ends = {arm: (line.x[-1], line.y[-1]) for arm, line in lines.items()}
        right = max((x for x, _ in ends.values()), default=1.0) or 1.0
        # Room for the labels, which stand right of the ends.
        axes.set_xlim(0, right * (1.05 + 0.022 * max(map(len, [*ends, "base"]))))
        _label_ends(axes, report, ends, right)
        names = {"images": "images", "seconds": "seconds of training"}
        axes.set_xlabel(names[axis], fontsize=9, color=INK)

    return panel


def _against(name: str) -> Callable[[Any, Report], None]:
    """Make the function that draws the score against another figure: a way through both for each
    arm, the mean over its seeds at equal images, from the base on."""

    def panel(axes: Any, report: Report) -> None:
        ends = {}
        for arm, (x, y) in ways(report, name).items():
            color = _color(report, arm)
            axes.plot(x, y, color=color, lw=1.2, marker="o", ms=2.5, alpha=0.8)
            axes.plot(x[-1:], y[-1:], color=color, marker="o", ms=7, zorder=5)
            ends[arm] = (x[-1], y[-1])
        axes.margins(x=0.2)
        low, high = axes.get_ylim()
        heights = spread({arm: y for arm, (_, y) in ends.items()}, GAP * (high - low))
        for arm, y in heights.items():
            axes.annotate(
                arm, (ends[arm][0], y), (7, 0), textcoords="offset points", va="center",
                fontsize=8, color=_color(report, arm),
            )  # fmt: skip
        if name == "quality" and ends:
            axes.axvline(1, color="#cf222e", lw=0.8, ls=":")
        axes.set_xlabel(X_LABELS[name], fontsize=9, color=INK)
        if not ends:
            axes.annotate(
                f"no {name} is measured", (0.5, 0.5), xycoords="axes fraction", ha="center",
                fontsize=8, color=FAINT,
            )  # fmt: skip

    return panel


X_LABELS = {
    "quality": "largest change of quality / allowed change (1: the limit)",
    "diversity": "diversity",
    "kl": "KL to the base, nats an element",
}


def ways(report: Report, name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Compute, for each arm, a figure and the score at the evaluations that its finished runs have
    at equal images: means over the seeds. Arms in which the figure is not measured are left out."""
    ways = {}
    for arm in report.arms:
        runs = [result for result in report.results[arm] if result.points]
        shared = _shared_images(runs)
        x, y = [], []
        for images in shared:
            points = [at(result.points, "images", images) for result in runs]
            figures = [_measure(report, name, point, result.points[0])
                       for point, result in zip(points, runs, strict=True)]  # fmt: skip
            if None not in figures:
                x.append(float(np.mean(figures)))
                y.append(float(np.mean([_score(report, point) for point in points])))
        if x:
            ways[arm] = (x, y)
    return ways


def _shared_images(runs: Sequence[Result]) -> list[float]:
    """List the images at which all runs were evaluated."""
    sets = [{point.images for point in result.points} for result in runs]
    return sorted(set.intersection(*sets)) if sets else []


def _measure(report: Report, name: str, point: Point, base: Point) -> float | None:
    if name == "quality":
        return allowed_share(point.quality, base.quality, report.tolerances)
    return point.kl if name == "kl" else point.quality.get(name)


PANELS = {
    "images": _over("images"),
    "seconds": _over("seconds"),
    "quality": _against("quality"),
    "diversity": _against("diversity"),
    "kl": _against("kl"),
}


def _color(report: Report, arm: str) -> str:
    return LINES[list(report.study.arms).index(arm) % len(LINES)]


def _label_ends(
    axes: Any, report: Report, ends: dict[str, tuple[float, float]], right: float
) -> None:
    """Write the arms beside the ends of their lines, above each other where they are close."""
    scale = 100 if report.percent else 1
    base = None if report.base is None else scale * report.base.accuracy.value
    heights = {arm: y for arm, (_, y) in ends.items()}
    if base is not None:
        heights["base"] = base
    low, high = axes.get_ylim()
    values = [*heights.values(), low, high]
    step = GAP * (max(values) - min(values) or 1.0)
    for label, y in spread(heights, step).items():
        x = ends[label][0] if label in ends else right
        color = FAINT if label == "base" else _color(report, label)
        axes.annotate(
            label, (x, y), (5, 0), textcoords="offset points", va="center", fontsize=8, color=color,
            bbox={"facecolor": PAPER, "edgecolor": "none", "pad": 1}, zorder=4,
        )  # fmt: skip


def spread(heights: dict[str, float], step: float) -> dict[str, float]:
    """Move labels that are less than `step` apart away from each other, in their order: groups that
    touch are centred on their mean."""
    labels = sorted(heights, key=lambda label: heights[label])
    groups: list[list[str]] = []
    centers: list[float] = []
    for label in labels:
        groups.append([label])
        centers.append(heights[label])
        # A group that reaches into the one below joins it.
        while len(groups) > 1 and (
            centers[-1] - centers[-2] < step * (len(groups[-1]) + len(groups[-2])) / 2
        ):
            upper = groups.pop()
            centers.pop()
            groups[-1] += upper
            centers[-1] = sum(heights[name] for name in groups[-1]) / len(groups[-1])
    return {
        label: center + step * (number - (len(group) - 1) / 2)
        for group, center in zip(groups, centers, strict=True)
        for number, label in enumerate(group)
    }


def _style(axes: Any, report: Report, first: bool) -> None:
    """Set the base's line, colours, grid and the name of the score."""
    if report.base is not None:
        level = (100 if report.percent else 1) * report.base.accuracy.value
        axes.axhline(level, color=FAINT, lw=1.2, ls="--", zorder=2)
    if first:
        unit = ", %" if report.percent else ""
        axes.set_ylabel(f"held-out {report.label}{unit}", fontsize=9, color=INK)
    axes.grid(axis="y", color="#eaeef2", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    axes.tick_params(colors=FAINT, length=0, labelsize=8)
