"""The rules on detections made by hand: six tasks, thresholds, overlaps, margins."""

import json
import math

import numpy as np
import pytest

from flowgrpo.rewards import RewardError
from flowgrpo.rewards.geneval import rules
from flowgrpo.rewards.geneval.rules import Detection, check, partial, relations, select, strict


def seen(*found):
    """Detections from (name, box, score, color?)."""
    return [Detection(name, box, score, None, *more) for name, box, score, *more in found]


def judge(found, metadata):
    check(metadata)
    objects = select(found, metadata["tag"])
    return strict(objects, metadata)[0], partial(objects, metadata)


BOX = (10.0, 10.0, 50.0, 50.0)
LEFT, RIGHT = (0.0, 40.0, 40.0, 80.0), (100.0, 40.0, 140.0, 80.0)


def one(name, count=1, **more):
    return {"class": name, "count": count, **more}


def test_single_object():
    wish = {"tag": "single_object", "include": [one("dog")]}
    assert judge(seen(("dog", BOX, 0.31)), wish) == (True, 1.0)
    assert judge(seen(("cat", BOX, 0.99)), wish) == (False, 0.0)
    # The threshold itself is not above the threshold.
    assert judge(seen(("dog", BOX, 0.3)), wish) == (False, 0.0)
    # The benchmark wants at least one, flow_grpo's reward exactly one.
    assert judge(seen(("dog", BOX, 0.9), ("dog", LEFT, 0.8)), wish) == (True, 0.0)
    assert judge(seen(*[("dog", BOX, 0.9)] * 3), wish) == (True, -1.0)


def test_two_object():
    wish = {"tag": "two_object", "include": [one("dog"), one("cat")]}
    assert judge(seen(("dog", BOX, 0.5), ("cat", LEFT, 0.5)), wish) == (True, 1.0)
    assert judge(seen(("dog", BOX, 0.5)), wish) == (False, 0.5)
    assert judge(seen(), wish) == (False, 0.0)


def test_counting():
    wish = {
        "tag": "counting",
        "include": [one("cup", 3)],
        "exclude": [one("cup", 4)],
    }
    cups = [("cup", (20.0 * i, 0.0, 20.0 * i + 10, 10.0), 0.95) for i in range(5)]
    assert judge(seen(*cups[:3]), wish) == (True, 1.0)
    assert judge(seen(*cups[:2]), wish) == (False, pytest.approx(2 / 3))
    assert judge(seen(*cups[:4]), wish) == (False, pytest.approx(2 / 3))
    # In this task only detections above 0.9 count.
    weak = [("cup", (200.0, 0.0, 210.0, 10.0), 0.9), ("cup", (220.0, 0.0, 230.0, 10.0), 0.5)]
    assert judge(seen(*cups[:3], *weak), wish) == (True, 1.0)


def test_colors():
    wish = {"tag": "colors", "include": [one("car", color="red")]}
    assert judge(seen(("car", BOX, 0.9, "red")), wish) == (True, 1.0)
    assert judge(seen(("car", BOX, 0.9, "blue")), wish) == (False, 0.5)
    assert judge(seen(("dog", BOX, 0.9, "red")), wish) == (False, 0.0)
    # Only the most confident object is looked at.
    two = seen(("car", LEFT, 0.5, "red"), ("car", RIGHT, 0.9, "blue"))
    assert judge(two, wish) == (False, 0.0)
    assert judge([Detection("car", LEFT, 0.95, None, "red"), *two[1:]], wish)[0]


def test_position():
    wish = {
        "tag": "position",
        "include": [one("dog"), one("cat", position=["left of", 0])],
    }
    assert judge(seen(("cat", LEFT, 0.9), ("dog", RIGHT, 0.9)), wish) == (True, 1.0)
    # flow_grpo's terms: dog 1, cat 1, wrong position 0 and 1.
    assert judge(seen(("cat", RIGHT, 0.9), ("dog", LEFT, 0.9)), wish) == (False, 0.75)
    # No dog: dog 0, cat 1, no target 0.
    assert judge(seen(("cat", LEFT, 0.9)), wish) == (False, pytest.approx(1 / 3))
    # No cat: dog 1, cat 0, position 0.
    assert judge(seen(("dog", RIGHT, 0.9)), wish) == (False, pytest.approx(1 / 3))


def test_color_attr():
    wish = {
        "tag": "color_attr",
        "include": [one("bowl", color="white"), one("book", color="green")],
    }
    right = seen(("bowl", LEFT, 0.9, "white"), ("book", RIGHT, 0.9, "green"))
    assert judge(right, wish) == (True, 1.0)
    swapped = seen(("bowl", LEFT, 0.9, "green"), ("book", RIGHT, 0.9, "white"))
    assert judge(swapped, wish) == (False, 0.5)
    assert judge(right[:1], wish) == (False, 0.5)


def test_color_fails_before_position():
    wish = {
        "tag": "position",
        "include": [one("dog"), one("cat", color="red", position=["left of", 0])],
    }
    found = seen(("cat", RIGHT, 0.9, "blue"), ("dog", LEFT, 0.9))
    # The position of an object of the wrong colour is not looked at: dog 1, cat 1, colour 0.
    assert judge(found, wish) == (False, pytest.approx(2 / 3))


def test_every_pair_of_a_position_must_hold():
    wish = {"tag": "position", "include": [one("dog", 2), one("cat", position=["left of", 0])]}
    dogs = [("dog", RIGHT, 0.9), ("dog", (200.0, 40.0, 240.0, 80.0), 0.9)]
    assert judge(seen(*dogs, ("cat", LEFT, 0.9)), wish)[0]
    assert not judge(seen(*dogs, ("cat", (160.0, 40.0, 190.0, 80.0), 0.9)), wish)[0]


def test_select_orders_and_limits():
    found = seen(*(("dog", BOX, 0.4 + i / 100) for i in range(20)), ("cat", BOX, 0.1))
    kept = select(found, "single_object")
    assert list(kept) == ["dog"]
    assert [d.score for d in kept["dog"]] == sorted((d.score for d in found), reverse=True)[:16]


def test_duplicate_boxes_stay_at_the_benchmarks_overlap(monkeypatch):
    found = seen(("dog", BOX, 0.9), ("dog", BOX, 0.8), ("dog", (11.0, 10.0, 50.0, 50.0), 0.7))
    assert select(found, "counting") == {}
    assert len(select(found, "two_object")["dog"]) == 3
    monkeypatch.setattr(rules, "MAX_OVERLAP", 0.9)
    kept = select(found, "two_object")["dog"]
    assert [d.score for d in kept] == [0.9]
    # Another class does not suppress.
    assert len(select([*found, *seen(("cat", BOX, 0.5))], "two_object")) == 2


def test_overlap_counts_whole_pixels():
    # 11 x 11 pixels each, 6 x 11 in common.
    assert rules.overlap((0, 0, 10, 10), (5, 0, 15, 10)) == 66 / (2 * 121 - 66)
    assert rules.overlap((0, 0, 10, 10), (20, 20, 30, 30)) == 0


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        (-100, 0, {"left of"}),
        (100, 0, {"right of"}),
        (0, -100, {"above"}),
        (0, 100, {"below"}),
        (-100, -100, {"left of", "above"}),
        # The margin: a tenth of 20 + 20 pixels. At 4 pixels nothing is left of the offset.
        (4, 0, set()),
        # 7.9 pixels: (7.9 - 4) / 7.9 < 0.5 is not enough, 8.1 is.
        (7.9, 0, set()),
        (8.1, 0, {"right of"}),
        # One direction carries the relation only if it has more than half of the distance.
        (100, 45, {"right of"}),
        (0, 0, set()),
    ],
)
def test_relations_and_margins(x, y, expected):
    a = Detection("dog", (x - 10.0, y - 10.0, x + 10.0, y + 10.0), 1.0)
    b = Detection("cat", (-10.0, -10.0, 10.0, 10.0), 1.0)
    assert relations(a, b) == expected
    mirrored = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert relations(b, a) == {mirrored[name] for name in expected}


def test_relations_follow_the_papers_formula():
    """Against the formula in numpy, on boxes of any size and place."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        corners = np.sort(draw.uniform(0, 512, size=(2, 2, 2)), axis=1)
        a, b = (Detection("dog", tuple(box.ravel().tolist()), 1.0) for box in corners)
        centers, sizes = corners.mean(axis=1), corners[:, 1] - corners[:, 0]
        offset = centers[0] - centers[1]
        rest = np.sign(offset) * np.clip(abs(offset) - 0.1 * sizes.sum(axis=0), 0, None)
        dx, dy = rest / math.hypot(*offset)
        sides = (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)
        names = ("left of", "right of", "above", "below")
        assert relations(a, b) == {n for n, holds in zip(names, sides, strict=True) if holds}


@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"tag": "colors", "include": [one("unicorn")]},
        {"tag": "colors", "include": [one("car", color="mauve")]},
        {"tag": "counting", "include": [one("car", 0)]},
        {"tag": "position", "include": [one("car", position=["left of", 0])]},
        {"tag": "position", "include": [one("car"), one("dog", position=["left of", -1])]},
        {"tag": "position", "include": [one("car"), one("dog", position=["near", 0])]},
        {"tag": "position", "include": [one("car"), one("dog", position="left")]},
    ],
)
def test_metadata_that_is_not_genevals(metadata):
    with pytest.raises(RewardError, match="GenEval's is expected"):
        check(metadata)


@pytest.mark.parametrize(
    ("include", "named"),
    [
        ([one("car", 2.0)], r"include\[0\]\.count 2\.0, which is no whole number above 0"),
        ([one("car"), one("cat", True)], r"include\[1\]\.count True"),
        ([one("car", None)], r"include\[0\]\.count None"),
        ([one("car", color=None)], r"include\[0\]\.color None, which is none of red"),
        ([one(["car"])], r"include\[0\]\.class \['car'\]"),
        ([{"class": "car"}], r"include\[0\] without count"),
        (["car"], r"include\[0\] 'car', which is no object"),
        ([one("car"), one("dog", position=["left of", 0.0])], r"include\[1\]\.position 0\.0"),
        ([one("car"), one("dog", position=["left of", False])], r"include\[1\]\.position False"),
        ([one("car"), one("dog", position=[["above"], 0])], r"include\[1\]\.position \['above'\]"),
        ([one("car"), one("dog", position=["above", 1])], r"include\[1\]\.position 1, .*before it"),
        ([], r"include \[\], which asks for nothing"),
        ({"class": "car"}, r"include \{.*\}, which is no list"),
    ],
)
def test_the_key_that_is_wrong_is_named(include, named):
    with pytest.raises(RewardError, match=f"a prompt has {named}") as error:
        check({"tag": "colors", "include": include})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"exclude": [one("cat", 1.5)]}, r"exclude\[0\]\.count 1\.5"),
        ({"exclude": None}, "exclude None, which is no list"),
        ({"tag": 3}, "tag 3, which is no text"),
    ],
)
def test_the_other_keys_are_named_too(more, named):
    with pytest.raises(RewardError, match=f"a prompt has {named}"):
        check({"tag": "colors", "include": [one("car")], **more})


def test_the_shipped_prompts_have_genevals_metadata():
    from flowgrpo.prompts import sets

    for part in ("train", "test"):
        for line in (sets.folder("geneval") / f"{part}_metadata.jsonl").read_text().splitlines():
            check(json.loads(line))
