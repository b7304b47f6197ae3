"""Readings: scores at a budget by hand, pooled over seeds by hand."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from flowgrpo import files
from flowgrpo.comparison.folder import Attempt
from flowgrpo.comparison.readings import (
    Point,
    Pool,
    Reading,
    Result,
    agreeing_seeds,
    allowed_share,
    at,
    common_budget,
    order,
    read_result,
)
from flowgrpo.config import ConfigError
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.evaluation.statistics import bootstrap
from support import comparisons

# Scores of the six images: two of each of the prompts "a red circle", "a blue square" (colors) and
# "two circle" (counting).
LINES = [
    comparisons.evaluation(0, 0.0, [1, 0, 0, 0, 1, 1], quality={"q": 0.1}, partial=0.2),
    comparisons.evaluation(2, 4.0, [1, 1, 0, 0, 1, 1], quality={"q": 0.3}, partial=0.4, kl=0.5),
    comparisons.evaluation(4, 10.0, [1, 1, 1, 1, 1, 0], quality={"q": 0.2}, partial=0.8, kl=1.5),
]
OTHER = [
    comparisons.evaluation(0, 0.0, [1, 0, 0, 0, 1, 1], quality={"q": 0.1}, partial=0.2),
    comparisons.evaluation(4, 8.0, [0, 0, 0, 0, 1, 1], quality={"q": 0.5}, partial=0.2, kl=0.7),
]


@pytest.fixture
def runs(tmp_path):
    base = comparisons.recipe(tmp_path)
    return comparisons.plan(comparisons.study(), base, (0, 1), tmp_path / "out")


def result_of(run, lines) -> Result:
    comparisons.write_run(run, lines)
    return read_result(run, [], 2, 3)


def pool_of(run, tolerances=()) -> Pool:
    return Pool(load_evaluation_set(run.config), dict(tolerances))


def test_points_are_the_evaluations_of_the_run(runs):
    result = result_of(runs[0], LINES)
    assert result.state == "finished" and result.right_or_wrong
    assert [(p.images, p.seconds) for p in result.points] == [(0, 0.0), (16, 4.0), (32, 10.0)]
    assert [p.per_prompt.tolist() for p in result.points] == [[0.5, 0, 1], [1, 0, 1], [1, 1, 0.5]]
    assert [p.quality["q"] for p in result.points] == [0.1, 0.3, 0.2]
    # The model before training is its own reference.
    assert [p.kl for p in result.points] == [0.0, 0.5, 1.5]
    pool = pool_of(runs[0])
    # Two tasks of equal weight: (0.25 + 1) / 2, (0.5 + 1) / 2, (1 + 0.5) / 2.
    assert [pool.accuracy(p.per_prompt) for p in result.points] == [0.625, 0.75, 0.75]


@pytest.mark.parametrize(
    ("axis", "budget", "images", "seconds", "per_prompt", "q", "kl"),
    [
        ("images", 0, 0, 0.0, [0.5, 0, 1], 0.1, 0.0),
        ("images", 16, 16, 4.0, [1, 0, 1], 0.3, 0.5),
        ("images", 24, 24, 7.0, [1, 0.5, 0.75], 0.25, 1.0),
        ("seconds", 7.0, 24, 7.0, [1, 0.5, 0.75], 0.25, 1.0),
        ("seconds", 1.0, 4, 1.0, [0.625, 0, 1], 0.15, 0.125),
        ("images", 32, 32, 10.0, [1, 1, 0.5], 0.2, 1.5),
    ],
)
def test_a_budget_between_two_evaluations_is_linear(
    runs, axis, budget, images, seconds, per_prompt, q, kl
):
    point = at(result_of(runs[0], LINES).points, axis, budget)
    assert (point.images, point.seconds) == (images, seconds)
    assert point.per_prompt.tolist() == per_prompt
    assert point.quality["q"] == pytest.approx(q, abs=1e-15)
    assert point.kl == kl


def test_beyond_the_last_evaluation_there_is_no_reading(runs):
    points = result_of(runs[0], LINES).points
    assert at(points, "images", 33) is None and at(points, "seconds", 10.001) is None
    assert at((), "images", 1) is None


def test_a_prompt_whose_reward_failed_is_left_out(runs):
    nan = math.nan
    lines = [LINES[0], comparisons.evaluation(2, 4.0, [nan, nan, 1, 1, 1, 1])]
    point = at(result_of(runs[0], lines).points, "images", 8)
    assert np.isnan(point.per_prompt[0]) and point.per_prompt[1:].tolist() == [0.5, 1.0]
    assert pool_of(runs[0]).accuracy(point.per_prompt) == 0.75


def test_figures_that_are_not_measured_have_no_reading(runs):
    lines = [LINES[0], comparisons.evaluation(2, 4.0, [1] * 6)]
    point = at(result_of(runs[0], lines).points, "images", 8)
    assert point.kl is None and point.quality == {}


def test_pooling_is_the_mean_over_the_seeds_by_hand(runs):
    first, second = result_of(runs[0], LINES), result_of(runs[2], OTHER)
    pool = pool_of(runs[0], {"q": 0.25})
    reading = pool.read([first, second], "images", 32)
    # Prompts over both seeds: (1 + 0) / 2, (1 + 0) / 2, (0.5 + 1) / 2.
    assert reading.accuracy.value == (0.5 + 0.75) / 2
    assert reading.seeds == {0: 0.75, 1: 0.5}
    assert reading.change.value == 0.625 - 0.625
    assert reading.scores["partial"] == 0.5 and reading.quality["q"] == pytest.approx(0.35)
    assert reading.kl == 1.1 and reading.seconds == 9.0
    # 0.2 - 0.1 is within 0.25, 0.5 - 0.1 is not.
    assert reading.outside == {"q": 1}
    # At 5 s: 16 + 16 / 6 images of the first, 20 of the second.
    timed = pool.read([first, second], "seconds", 5.0)
    assert timed.images == pytest.approx((16 + 16 / 6 + 20) / 2)
    assert timed.seeds[0] == pytest.approx((0.5 + 0.5 / 6 + 1 - 0.5 / 6) / 2)
    assert timed.seeds[1] == pytest.approx(((0.5 - 0.5 * 0.625) / 2 + 1) / 2)


def test_the_interval_draws_prompts_with_all_their_seeds(runs):
    first, second = result_of(runs[0], LINES), result_of(runs[2], OTHER)
    pool = pool_of(runs[0])
    low, high = pool.read([first, second], "images", 32).accuracy.interval
    # In each task the prompts have equal means over the seeds: whatever is drawn is the mean.
    assert (low, high) == (0.625, 0.625)
    alone = pool.read([first], "images", 16).accuracy.interval
    scores = np.array([1.0, 0.0, 1.0])
    assert alone == bootstrap(scores, ["colors", "colors", "counting"], torch.arange(3))
    assert alone == (0.5, 1.0)


def test_arms_are_compared_prompt_by_prompt_on_the_seeds_of_both(runs):
    first, second = result_of(runs[0], LINES), result_of(runs[2], OTHER)
    pool = pool_of(runs[0])
    reference = pool.read([first, second], "images", 32)
    # Of the other arm the run of seed 0 alone: 0.5 less in each color, 0.5 more in counting.
    other = dataclasses.replace(second, run=runs[1])
    reading = pool.read([other], "images", 32, reference)
    assert reading.seeds == {0: 0.5}
    assert reading.against_first.value == ((0 - 1) + (1 - 0.5)) / 2
    assert reading.against_first.interval == (-0.25, -0.25)
    assert pool.read([other], "images", 32).against_first is None
    nobody = dataclasses.replace(reference, seeds={7: 1.0})
    assert pool.read([other], "images", 32, nobody).against_first is None


def test_a_budget_that_is_not_set_is_the_end_of_the_shortest_run(runs):
    first, second = result_of(runs[0], LINES), result_of(runs[2], OTHER)
    failed = Result(runs[1], "failed", "no")
    assert common_budget([first, second, failed], "seconds", 0) == 8.0
    assert common_budget([first, second], "images", 0) == 32
    assert common_budget([first, second], "images", 16) == 16
    assert common_budget([failed], "images", 0) == 0


def test_runs_that_are_not_finished_have_no_points(runs):
    attempt = Attempt("A-seed0", 1, False, "error: no", 1, 2, "cpu", "6", "abc", "now", 5)
    result = read_result(runs[0], [attempt], 2, 3)
    assert (result.state, result.error, result.points) == ("failed", "error: no", ())
    comparisons.write_run(runs[1], LINES, interrupted=True)
    result = read_result(runs[1], [dataclasses.replace(attempt, stopped=True)], 2, 3)
    assert (result.state, result.error, result.points) == ("unfinished", "", ())
    pool = pool_of(runs[0])
    assert pool.read([result], "images", 16) is None and pool.base([result]) is None


def test_evaluations_of_another_set_are_refused(runs):
    comparisons.write_run(runs[0], LINES)
    with pytest.raises(ConfigError, match="has 6 images, but 8 are expected, 2 of each of 4 pro"):
        read_result(runs[0], [], 2, 4)
    comparisons.write_run(runs[1], LINES[1:])
    with pytest.raises(ConfigError, match="has no evaluation of the model before training"):
        read_result(runs[1], [], 2, 3)


def test_scores_that_are_not_right_or_wrong_are_seen(runs):
    result = result_of(runs[0], [LINES[0], comparisons.evaluation(2, 1.0, [0.5, 1, 1, 1, 1, 1])])
    assert not result.right_or_wrong
    assert files.read_tensors(
        runs[0].folder / "evaluations" / "step-000002" / "images.safetensors"
    )["per_image"].tolist() == [0.5, 1, 1, 1, 1, 1]


def test_the_share_of_the_tolerances_that_is_used():
    base = {"palette": 0.1, "diversity": 0.2, "other": 1.0}
    tolerances = {"palette": 0.05, "diversity": -0.1}
    now = {"palette": 0.11, "diversity": 0.12, "other": 9.0}
    # 0.01 of 0.05 allowed upwards, 0.08 of 0.1 downwards.
    assert allowed_share(now, base, tolerances) == pytest.approx(0.8)
    assert allowed_share({"palette": 0.2}, base, tolerances) == pytest.approx(2.0)
    assert allowed_share({"palette": 0.05}, base, tolerances) == pytest.approx(-1.0)
    assert allowed_share(now, base, {}) is None


def reading(seeds) -> Reading:
    mean = float(np.mean(list(seeds.values())))
    fields = {field.name: None for field in dataclasses.fields(Reading)}
    return Reading(**{**fields, "accuracy": type("E", (), {"value": mean})(), "seeds": seeds})


def test_the_order_of_the_arms_and_the_seeds_that_agree():
    readings = {
        "A": reading({0: 0.5, 1: 0.6, 2: 0.7}),
        "B": reading({0: 0.7, 1: 0.5, 2: 0.9}),
        "C": None,
        "D": reading({0: 0.1, 1: 0.2}),
    }
    assert order(readings) == ["B", "A", "D"]
    # Both have seeds 0 and 1; in seed 1 A is before B.
    assert agreeing_seeds(readings) == (1, 2)
    assert agreeing_seeds({"C": None}) == (0, 0)


def test_interpolated_points_are_points(runs):
    points = result_of(runs[0], LINES).points
    assert isinstance(at(points, "seconds", 5.0), Point)
    assert at(points, "seconds", 10.0) is points[2]
