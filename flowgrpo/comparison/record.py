"""comparison.json: every figure of a comparison, with its runs, machine, commit and versions.

    {"format", "study", "question", "recipe", "arms", "seeds", "budgets",
     "device", "driver", "versions", "commit", "command", "date",
     "runs": {"runs/GRPO-seed0": {"arm", "seed", "state", ...}, ...},
     "curves": {"runs/GRPO-seed0": [{"images", "seconds", "accuracy", ...}, ...], ...},
     "rows": [{"suite", "case", "provider", "metric", "value", "unit", ...}, ...]}

The head and the rows are those of the benchmarks' records, so that their tools read these too:
`case` is the axis, `provider` the arm or "base". A row also has its "runs" and, where there is
one, its "interval". A run that failed has its error, and no figure.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowgrpo import files
from flowgrpo.comparison import machine
from flowgrpo.comparison.readings import (
    AXES,
    Axis,
    Estimate,
    Point,
    Reading,
    Result,
    agreeing_seeds,
    order,
)
from flowgrpo.comparison.report import Report
from flowgrpo.config import to_dict
from flowgrpo.runs.process import versions

FORMAT = "flowgrpo-comparison-report-1"


def record(report: Report, command: str) -> dict[str, Any]:
    """Make the content of comparison.json; `command` is the line that wrote it."""
    name, driver = machine.name_of(None)
    study = report.study
    return {
        "format": FORMAT,
        "study": study.name,
        "question": study.question,
        "recipe": study.recipe,
        "arms": {arm: study.arms[arm] for arm in report.arms},
        "common": study.common,
        "seeds": list(report.seeds),
        "complete": report.complete,
        "budgets": {
            axis: {"value": report.budgets[axis], "set_by_study": report.set_by_study(axis)}
            for axis in AXES
        },
        "order": {axis: _order(report, axis) for axis in AXES},
        "notes": report.notes(),
        "device": name,
        "driver": driver,
        "versions": versions(),
        "commit": machine.commit(),
        "command": command,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "runs": {run_name(result): _run(result) for result in report.all_results},
        "curves": {
            run_name(result): [_point(report, point) for point in result.points]
            for result in report.all_results
            if result.points
        },
        "rows": list(rows(report)),
    }


def write(report: Report, command: str, path: Path) -> Path:
    """Write comparison.json."""
    files.write_json(path, record(report, command))
    return path


def run_name(result: Result) -> str:
    """Name a run by its path in the folder."""
    return f"runs/{result.run.name}"


def _order(report: Report, axis: Axis) -> dict[str, Any]:
    agreeing, seeds = agreeing_seeds(report.readings[axis])
    return {"arms": order(report.readings[axis]), "agreeing_seeds": agreeing, "of": seeds}


def _run(result: Result) -> dict[str, Any]:
    values: dict[str, Any] = {
        "arm": result.run.arm,
        "seed": result.run.seed,
        "state": result.state,
    }
    if result.error:
        values["error"] = result.error
    if result.attempt is not None:
        attempt = vars(result.attempt)
        names = ("machine", "driver", "commit", "date", "threads", "at_once", "exit", "peak_bytes")
        values |= {name: attempt[name] for name in names}
    if result.summary is not None:
        names = ("iterations", "images", "seconds", "max_ratio_error", "dropped_groups", "weights")
        names += ("device", "backend", "versions")
        values |= {name: result.summary.get(name) for name in names}
        if "scouts" in result.summary:
            values["scouts"] = result.summary["scouts"]
    return {**values, "config": to_dict(result.run.config)}


def _point(report: Report, point: Point) -> dict[str, Any]:
    return {
        "images": point.images,
        "seconds": point.seconds,
        "accuracy": report.pool.accuracy(point.per_prompt),
        "scores": point.scores,
        "quality": point.quality,
        "kl": point.kl,
    }


def rows(report: Report) -> Iterator[dict[str, Any]]:
    """List the figures of all tables."""
    finished = [result for result in report.all_results if result.points]
    if report.base is not None:
        yield from _rows(report, "start", "base", report.base, [run_name(finished[0])])
    for axis in AXES:
        for arm in report.arms:
            reading = report.readings[axis][arm]
            if reading is not None:
                results = {result.run.seed: result for result in report.results[arm]}
                names = {seed: run_name(results[seed]) for seed in reading.seeds}
                yield from _rows(report, axis, arm, reading, list(names.values()))
                for seed, value in reading.seeds.items():
                    row = _row(axis, arm, report.label, value, "1", [names[seed]])
                    yield {**row, "seed": seed}


def _rows(
    report: Report, case: str, provider: str, reading: Reading, runs: list[str]
) -> Iterator[dict[str, Any]]:
    def row(metric: str, value: float | Estimate, unit: str = "1") -> dict[str, Any]:
        return _row(case, provider, metric, value, unit, runs)

    yield row(report.label, reading.accuracy)
    if provider != "base":
        yield row("change", reading.change)
        if reading.against_first is not None:
            yield row("against_first", reading.against_first)
        yield row("images", reading.images, "images")
        yield row("seconds", reading.seconds, "s")
        if report.tolerances:
            yield {**row("quality_held", float(not reading.outside)), "outside": reading.outside}
        if reading.kl is not None:
            yield row("kl", reading.kl, "nats/element")
    for name, value in reading.quality.items():
        yield row(f"quality: {name}", value)
    for name, value in list(reading.scores.items())[1:]:
        yield row(f"score: {name}", value)


def _row(
    case: str, provider: str, metric: str, value: float | Estimate, unit: str, runs: list[str]
) -> dict[str, Any]:
    interval = {}
    if isinstance(value, Estimate):
        value, interval = value.value, {"interval": list(value.interval)}
    return {
        "suite": "compare",
        "case": case,
        "provider": provider,
        "metric": metric,
        "value": value,
        "unit": unit,
        **interval,
        "runs": runs,
    }
