"""The picture: its lines by hand, its labels, and its panels."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flowgrpo.comparison import picture
from flowgrpo.comparison.report import make_report
from flowgrpo.comparison.studies import PANELS
from support import comparisons

BASE = comparisons.evaluation(0, 0.0, [0, 0, 0, 0, 0, 0], quality={"diversity": 0.4})


def line(iteration, seconds, right, **figures):
    return comparisons.evaluation(iteration, seconds, [right] * 6, **figures)


@pytest.fixture
def report(tmp_path, monkeypatch):
    """A: two seeds, of which one is evaluated more often; B: none is finished."""
    monkeypatch.setattr(
        "flowgrpo.comparison.report.tolerances_of", lambda name: {"diversity": -0.2}
    )
    study = comparisons.study(panels=tuple(PANELS))
    runs = comparisons.plan(study, comparisons.recipe(tmp_path), (0, 1), tmp_path / "out")
    figures = {"quality": {"diversity": 0.3}, "kl": 0.5}
    comparisons.write_run(runs[0], [BASE, line(2, 4.0, 1, **figures), line(4, 8.0, 1, **figures)])
    comparisons.write_run(runs[2], [BASE, line(4, 6.0, 1, quality={"diversity": 0.2}, kl=1.0)])
    return make_report(study, ("A", "B"), (0, 1), runs, tmp_path / "out")


def test_lines_are_means_between_the_lowest_and_the_highest_seed(report):
    [images] = picture.lines_over(report, "images").values()
    # At 16 images one seed is at 100 %, the other half of the way there.
    assert images.x.tolist() == [0, 16, 32]
    assert images.y.tolist() == [0, 75, 100]
    assert (images.low.tolist(), images.high.tolist()) == ([0, 50, 100], [0, 100, 100])
    [seconds] = picture.lines_over(report, "seconds").values()
    # To the end of the shortest run; its 6 s are a point of the other too.
    assert seconds.x.tolist() == [0, 4, 6]
    assert seconds.low.tolist() == [0, pytest.approx(100 * 4 / 6), 100]


def test_ways_go_through_the_evaluations_at_equal_images(report):
    assert picture.ways(report, "diversity") == {"A": ([0.4, 0.25], [0, 100])}
    assert picture.ways(report, "kl") == {"A": ([0.0, 0.75], [0, 100])}
    [(shares, _)] = picture.ways(report, "quality").values()
    # -0.1 and -0.2 of -0.2 that are allowed.
    assert shares == [0.0, pytest.approx(0.75)]
    assert picture.ways(report, "palette") == {}


@pytest.mark.slow
def test_all_panels_are_drawn_side_by_side(report, tmp_path):
    path = picture.draw(report, tmp_path / "all.png")
    width, height = Image.open(path).size
    assert (width, height) == (5 * 780, 600)
    # Each panel has lines of the arm's colour in it.
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(600, 5, 780, 3)
    color = np.array([0x4C, 0x78, 0xA8])
    close = (np.abs(pixels.astype(int) - color).max(axis=3) < 8).sum(axis=(0, 2))
    assert (close > 50).all(), close


@pytest.mark.slow
@given(
    heights=st.lists(st.floats(0, 1), min_size=1, max_size=8),
    step=st.floats(0.001, 0.3),
)
@settings(max_examples=60, deadline=None)
def test_labels_do_not_meet_and_keep_their_order(heights, step):
    labels = {str(number): height for number, height in enumerate(heights)}
    places = picture.spread(labels, step)
    before = sorted(labels, key=lambda label: labels[label])
    after = [places[label] for label in before]
    assert all(b - a >= step * (1 - 1e-9) for a, b in pairwise(after))
    # They are moved no more than needed: their mean stays.
    assert np.mean(after) == pytest.approx(np.mean(heights), abs=1e-9)


def test_labels_that_are_far_apart_stay():
    assert picture.spread({"a": 0.1, "b": 0.9}, 0.2) == {"a": 0.1, "b": 0.9}
    assert picture.spread({"a": 0.5, "b": 0.5}, 0.2) == {"a": 0.4, "b": 0.6}
