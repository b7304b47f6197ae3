"""Readings: run directories -> scores at a budget, pooled over seeds.

A run is evaluated at some points, each with its images and its seconds of training (rollouts,
rewards and updates; loading, evaluation and checkpoints are not counted). Its *reading* at a budget
is linear between the two points around it, image by image:

    y(b) = y0 + (b - x0) / (x1 - x0) (y1 - y0)        x0 <= b <= x1, for y the score of an image,
                                                      a mean, a quality figure, the KL

so a reading at a point is that point's, and there is none beyond the last one. A budget that the
study does not set is where the shortest finished run ends.

Runs of one arm are *pooled*: the score of a prompt is its mean over the seeds, the accuracy the
mean of tasks of that. Its 95 % interval is the bootstrap of statistics.py over prompts, with all
seeds of a prompt together. So it says how sure the accuracy is for other prompts; how much another
seed of training may change it, the lowest and the highest seed say. Changes against the base and
against the first arm are paired: prompt by prompt, on equal noise.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from flowgrpo import files
from flowgrpo.comparison.folder import Attempt, Run, failure, read_json
from flowgrpo.config import ConfigError
from flowgrpo.evaluation.evaluation_set import EvaluationSet
from flowgrpo.evaluation.quality import within_tolerance
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap

Axis = Literal["images", "seconds"]
AXES: tuple[Axis, ...] = ("images", "seconds")


@dataclass(frozen=True)
class Point:
    """One evaluation of one run, or what lies between two."""

    images: float
    """Images trained on."""
    seconds: float
    """Seconds of training."""
    per_prompt: np.ndarray
    """float64 [N]: the first reward of each entry of the evaluation set, a mean of its images."""
    scores: dict[str, float]
    """Mean of each reported reward."""
    quality: dict[str, float]
    kl: float | None
    """To the base; None: not measured."""


@dataclass(frozen=True)
class Result:
    """Outcome of one run, so far."""

    run: Run
    state: Literal["finished", "failed", "unfinished"]
    error: str = ""
    """Last line of the log of a run that failed."""
    points: tuple[Point, ...] = ()
    """Its evaluations in order, the base first; of a finished run."""
    right_or_wrong: bool = False
    """True: all scores of single images are 0 or 1, so that their mean is an accuracy."""
    summary: Mapping[str, Any] | None = None
    attempt: Attempt | None = None
    """The last process."""


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval."""

    value: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Reading:
    """One arm at a budget, pooled over the seeds whose runs are finished."""

    accuracy: Estimate
    seeds: dict[int, float]
    """Seed -> the accuracy of its run."""
    change: Estimate
    """Against the base."""
    against_first: Estimate | None
    """Against the first arm, on the seeds that both have; None: it has none, or is the first."""
    scores: dict[str, float]
    quality: dict[str, float]
    outside: dict[str, int]
    """Quality figure -> the number of seeds in which it has left its tolerance."""
    kl: float | None
    images: float
    """Mean over the seeds, as the seconds."""
    seconds: float
    per_prompt: np.ndarray
    """float64 [S, N]."""


def read_result(run: Run, attempts: Sequence[Attempt], samples: int, entries: int) -> Result:
    """Read what `run` has come to.

    Args:
        attempts: its processes, the newest last.
        samples, entries: of the evaluation set.

    Raises:
        ConfigError: the run is finished, and its evaluations are not those of the evaluation set.
    """
    attempt = attempts[-1] if attempts else None
    if not run.finished:
        error = failure(run, attempts)
        return Result(run, "failed" if error else "unfinished", error, attempt=attempt)
    lines = read_evaluations(run.folder)
    images = [
        files.read_tensors(_folder(run.folder, line["iteration"]) / "images.safetensors")[
            "per_image"
        ]
        for line in lines
    ]
    for line, per_image in zip(lines, images, strict=True):
        if len(per_image) != samples * entries:
            raise ConfigError(
                f"the evaluation of iteration {line['iteration']} in {run.folder} has "
                f"{len(per_image)} images, but {samples * entries} are expected, {samples} of each "
                f"of {entries} prompts; restore the prompt set {run.config.sample.prompts!r}."
            )
    rows = run.config.sample.rows
    points = [
        Point(
            images=line["iteration"] * rows,
            seconds=line["seconds"]["training"],
            per_prompt=per_image.view(entries, samples).mean(dim=1).numpy(),
            scores=_numbers(line["scores"]),
            quality=_numbers(line["quality"]),
            # The model before training is its own reference.
            kl=0.0 if line["iteration"] == 0 else line.get("kl"),
        )
        for line, per_image in zip(lines, images, strict=True)
    ]
    scores = torch.cat(images)
    scores = scores[scores.isfinite()]
    return Result(
        run,
        "finished",
        points=tuple(points),
        right_or_wrong=bool(((scores == 0) | (scores == 1)).all()),
        summary=read_json(run.folder / "summary.json"),
        attempt=attempt,
    )


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """Read the evaluations of a run with the weights that it trains, in order, from metrics.jsonl.

    Raises:
        ConfigError: there is no evaluation of the model before training.
    """
    text = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    lines = [line for line in lines if line["kind"] == "eval"]
    if not lines or lines[0]["iteration"] != 0:
        raise ConfigError(
            f"{folder / 'metrics.jsonl'} has no evaluation of the model before training, but every "
            "run begins with one; restore the file, or remove the folder to run it again."
        )
    return lines


def _folder(run: Path, iteration: int) -> Path:
    return run / "evaluations" / f"step-{iteration:06d}"


def _numbers(values: Mapping[str, float | None]) -> dict[str, float]:
    """Read null as NaN."""
    return {name: float("nan") if value is None else value for name, value in values.items()}


def position(point: Point, axis: Axis) -> float:
    """Return the point's images or seconds."""
    return point.images if axis == "images" else point.seconds


def at(points: Sequence[Point], axis: Axis, budget: float) -> Point | None:
    """Interpolate a run's evaluations at a budget, see above; None if it lies beyond the last."""
    if not points or budget > position(points[-1], axis):
        return None
    if budget <= position(points[0], axis):
        return points[0]
    for before, after in pairwise(points):
        low, high = position(before, axis), position(after, axis)
        if low < budget <= high:
            return _between(before, after, (budget - low) / (high - low))
    raise AssertionError("the points are in order, and the budget is between the first and last")


def _between(before: Point, after: Point, weight: float) -> Point:
    """Interpolate two points: `weight` 0 is the one before, 1 the one after, to the bit."""
    if weight == 1:
        return after

    def mix(first: Any, last: Any) -> Any:
        return first + weight * (last - first)

    def mix_all(first: dict[str, float], last: dict[str, float]) -> dict[str, float]:
        return {name: mix(first[name], last[name]) for name in first if name in last}

    known = before.kl is not None and after.kl is not None
    return Point(
        images=mix(before.images, after.images),
        seconds=mix(before.seconds, after.seconds),
        per_prompt=mix(before.per_prompt, after.per_prompt),
        scores=mix_all(before.scores, after.scores),
        quality=mix_all(before.quality, after.quality),
        kl=mix(before.kl, after.kl) if known else None,
    )


def common_budget(results: Iterable[Result], axis: Axis, asked: float) -> float:
    """Choose the budget of an axis: the one that is asked for or, if that is 0, the end of the
    shortest finished run; 0 without any."""
    ends = [position(result.points[-1], axis) for result in results if result.points]
    return asked or min(ends, default=0.0)


class Pool:
    """Pools readings of runs on one evaluation set."""

    def __init__(self, evaluation_set: EvaluationSet, tolerances: Mapping[str, float]) -> None:
        self.tags = evaluation_set.tags
        self.indices = evaluation_set.prompts.indices
        self.tolerances = tolerances

    def accuracy(self, per_prompt: np.ndarray) -> float:
        """Average the tasks of float64 [N]."""
        return balanced_mean(per_prompt, self.tags)

    def estimate(self, per_prompt: np.ndarray) -> Estimate:
        """Average float64 [S, N] over tasks, with its interval over prompts."""
        flat, tags = per_prompt.reshape(-1), self.tags * len(per_prompt)
        interval = bootstrap(flat, tags, self.indices.repeat(len(per_prompt)))
        return Estimate(balanced_mean(flat, tags), interval)

    def base(self, results: Iterable[Result]) -> Reading | None:
        """Read the model before training, which is the same in all runs."""
        for result in results:
            if result.points:
                return self._reading({result.run.seed: result.points[0]}, result.points[0], None)
        return None

    def read(
        self, results: Sequence[Result], axis: Axis, budget: float, first: Reading | None = None
    ) -> Reading | None:
        """Read one arm at a budget, over its finished runs; None if there are none.

        Args:
            results: the arm's runs.
            first: the reading of the first arm, to compare with.
        """
        points = {}
        for result in results:
            point = at(result.points, axis, budget)
            if point is not None:
                points[result.run.seed] = point
        if not points:
            return None
        base = next(result.points[0] for result in results if result.points)
        return self._reading(points, base, first)

    def _reading(self, points: dict[int, Point], base: Point, first: Reading | None) -> Reading:
        per_prompt = np.stack([point.per_prompt for point in points.values()])
        against = None
        if first is not None:
            shared = [seed for seed in points if seed in first.seeds]
            if shared:
                mine = per_prompt[[list(points).index(seed) for seed in shared]]
                other = first.per_prompt[[list(first.seeds).index(seed) for seed in shared]]
                against = self.estimate(mine - other)
        outside = {}
        for name in self.tolerances:
            count = sum(
                name in point.quality
                and not within_tolerance(name, base.quality, point.quality, self.tolerances)
                for point in points.values()
            )
            if count:
                outside[name] = count
        values = list(points.values())
        kls = [point.kl for point in values]
        return Reading(
            accuracy=self.estimate(per_prompt),
            seeds={seed: self.accuracy(point.per_prompt) for seed, point in points.items()},
            change=self.estimate(per_prompt - base.per_prompt),
            against_first=against,
            scores=_means([point.scores for point in values]),
            quality=_means([point.quality for point in values]),
            outside=outside,
            kl=None if None in kls else float(np.mean(kls)),
            images=float(np.mean([point.images for point in values])),
            seconds=float(np.mean([point.seconds for point in values])),
            per_prompt=per_prompt,
        )


def _means(entries: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average figures over the seeds, by name; those that all seeds have."""
    names = [name for name in entries[0] if all(name in entry for entry in entries)]
    return {name: float(np.mean([entry[name] for entry in entries])) for name in names}


def allowed_share(
    quality: Mapping[str, float], base: Mapping[str, float], tolerances: Mapping[str, float]
) -> float | None:
    """Compute the largest change of a quality figure as a share of its tolerance: above 1 it is
    outside; below 0 it moved the good way. None without tolerances that are not 0."""
    shares = [
        (quality[name] - base[name]) / allowed
        for name, allowed in tolerances.items()
        if allowed and name in quality and name in base
    ]
    return max(shares, default=None)


def order(readings: Mapping[str, Reading | None]) -> list[str]:
    """Sort the arms that have a reading by accuracy, the best first."""
    there = [label for label, reading in readings.items() if reading is not None]
    return sorted(there, key=lambda label: -readings[label].accuracy.value)


def agreeing_seeds(readings: Mapping[str, Reading | None]) -> tuple[int, int]:
    """Count the seeds that all arms with a reading have, and those of them in which each arm is
    before the next, or equal to it, as it is in the pooled `order`: (those, all)."""
    labels = order(readings)
    if not labels:
        return 0, 0
    shared = set.intersection(*(set(readings[label].seeds) for label in labels))
    pooled = [readings[label].accuracy.value for label in labels]
    agreeing = sum(
        _signs([readings[label].seeds[seed] for label in labels]) == _signs(pooled)
        for seed in shared
    )
    return agreeing, len(shared)


def _signs(values: Sequence[float]) -> list[int]:
    """Compare neighbours: 1 for a fall, 0 for equal values, -1 for a rise."""
    return [(first > second) - (first < second) for first, second in pairwise(values)]
