"""The report of a comparison: all that its tables, its picture and comparison.json say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowgrpo.comparison.folder import Run, attempts
from flowgrpo.comparison.readings import (
    AXES,
    Axis,
    Pool,
    Reading,
    Result,
    common_budget,
    read_result,
)
from flowgrpo.comparison.studies import Study
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.evaluation.quality import tolerances_of


@dataclass(frozen=True)
class Report:
    """A comparison as far as it has come."""

    study: Study
    arms: tuple[str, ...]
    """Those that are compared, in the study's order."""
    seeds: tuple[int, ...]
    results: dict[str, list[Result]]
    """Arm -> its runs, in the order of the seeds."""
    budgets: dict[Axis, float]
    """Where each axis is read; 0: no run is finished."""
    readings: dict[Axis, dict[str, Reading | None]]
    """Axis -> arm -> its reading; None: none of its runs is finished."""
    base: Reading | None
    """The model before training; None: no run is finished."""
    label: str
    """"accuracy", or the name of a first reward that is not right or wrong."""
    tolerances: dict[str, float]
    """Quality figure -> its largest allowed change."""
    pool: Pool

    @property
    def percent(self) -> bool:
        """True: the score is an accuracy, which is shown in percent."""
        return self.label == "accuracy"

    @property
    def all_results(self) -> list[Result]:
        """All runs, arm by arm."""
        return [result for results in self.results.values() for result in results]

    @property
    def complete(self) -> bool:
        """True once all runs are finished."""
        return all(result.state == "finished" for result in self.all_results)

    def set_by_study(self, axis: Axis) -> bool:
        """Tell a budget that the study sets from one that its shortest run decides."""
        return bool(self.study.images if axis == "images" else self.study.seconds)

    def notes(self) -> list[str]:
        """List what a reader of the figures must know, a sentence each."""
        notes = []
        finished = [result for result in self.all_results if result.state == "finished"]
        devices = dict.fromkeys(_conditions(result) for result in finished)
        if len(devices) > 1:
            notes.append(
                "Seconds are of unequal conditions and do not compare: " + "; ".join(devices) + "."
            )
        commits = dict.fromkeys(r.attempt.commit for r in finished if r.attempt is not None)
        if len(commits) > 1:
            notes.append(f"The runs ended under several commits: {', '.join(commits)}.")
        bases = {result.points[0].per_prompt.tobytes() for result in finished}
        if len(bases) > 1:
            notes.append(
                "The runs do not agree on the scores of the model before training, so devices or "
                "versions differ; each is compared with its own."
            )
        return notes


def _conditions(result: Result) -> str:
    """Describe what a second of a run was worth."""
    summary, attempt = result.summary or {}, result.attempt
    text = str(summary.get("device", "unknown device"))
    if attempt is None:
        return text
    return f"{text} of {attempt.machine}, up to {attempt.at_once} runs at once"


def make_report(
    study: Study, arms: Sequence[str], seeds: Sequence[int], runs: Sequence[Run], folder: Path
) -> Report:
    """Read all runs of a comparison and pool them.

    Args:
        arms, seeds: those that are compared.
        runs: of these, of `plan_runs`.
        folder: of the comparison.
    """
    config = runs[0].config
    evaluation_set = load_evaluation_set(config)
    tolerances = tolerances_of(config.sample.prompts)
    pool, by_run = Pool(evaluation_set, tolerances), attempts(folder)
    size = (evaluation_set.samples, len(evaluation_set.prompts))
    results: dict[str, list[Result]] = {arm: [] for arm in arms}
    for run in runs:
        results[run.arm].append(read_result(run, by_run.get(run.name, []), *size))
    flat = [result for entries in results.values() for result in entries]
    asked: dict[Axis, float] = {"images": study.images, "seconds": study.seconds}
    budgets = {axis: common_budget(flat, axis, asked[axis]) for axis in AXES}
    readings = {axis: read_arms(pool, results, axis, budgets[axis]) for axis in AXES}
    finished = [result for result in flat if result.state == "finished"]
    right_or_wrong = all(result.right_or_wrong for result in finished)
    return Report(
        study=study,
        arms=tuple(arms),
        seeds=tuple(seeds),
        results=results,
        budgets=budgets,
        readings=readings,
        base=pool.base(flat),
        label="accuracy" if right_or_wrong else config.reported[0],
        tolerances=tolerances,
        pool=pool,
    )


def read_arms(
    pool: Pool, results: Mapping[str, Sequence[Result]], axis: Axis, budget: float
) -> dict[str, Reading | None]:
    """Read all arms at a budget, each against the first."""
    readings: dict[str, Reading | None] = {}
    for arm, runs in results.items():
        first = next(iter(readings.values()), None)
        readings[arm] = pool.read(runs, axis, budget, first)
    return readings
