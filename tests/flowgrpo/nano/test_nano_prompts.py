"""Prompts of the embedded task: the grammar, its errors, and the splits."""

from __future__ import annotations

from collections import Counter

import pytest

from flowgrpo.config.validation import ConfigError
from flowgrpo.nano import prompts


@pytest.mark.parametrize(
    ("text", "tag", "include"),
    [
        ("a circle", "single_object", [{"class": "circle", "count": 1}]),
        ("just one square", "single_object", [{"class": "square", "count": 1}]),
        ("exactly three circles", "counting", [{"class": "circle", "count": 3}]),
        ("three red circles", "counting", [{"class": "circle", "count": 3, "color": "red"}]),
        ("a single black star", "colors", [{"class": "star", "count": 1, "color": "black"}]),
        (
            "a red circle with a square",
            "two_object",
            [{"class": "circle", "count": 1, "color": "red"}, {"class": "square", "count": 1}],
        ),
        (
            "a red circle and a blue square",
            "color_attr",
            [
                {"class": "circle", "count": 1, "color": "red"},
                {"class": "square", "count": 1, "color": "blue"},
            ],
        ),
        (
            "a circle left of a blue cross",
            "position",
            [
                {"class": "cross", "count": 1, "color": "blue"},
                {"class": "circle", "count": 1, "position": ["left of", 0]},
            ],
        ),
    ],
)
def test_parse_gives_geneval_records(text, tag, include):
    assert prompts.parse(text) == {"tag": tag, "include": include, "prompt": text}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a dog", "unknown word 'dog'"),
        ("", "1 to 8 words"),
        ("circle", "starts with one of"),
        ("a circles", "expected one of"),
        ("two crosss", "unknown word 'crosss'"),
        ("three circle", "expected one of"),
        ("a circle left a square", "between two objects"),
        ("a circle and a circle", "must differ"),
        ("three circles and two squares", "at most 4"),
        ("two circles above a square", "one object to one object"),
        ("a circle and a square and a", "nothing may follow"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(ValueError, match=message):
        prompts.parse(text)


def test_splits_are_disjoint_in_text_and_in_content():
    texts = {name: {m["prompt"] for m in prompts.records(name)} for name in prompts.SPLITS}
    assert not texts["train"] & texts["heldout"]
    assert not texts["train"] & texts["tune"]
    assert not texts["tune"] & texts["heldout"]

    mirrored = {"left of": "right of", "above": "below"}

    def content(m):
        """What is asked for, in whatever words and order."""
        entries = [(e["class"], e.get("color"), e["count"]) for e in m["include"]]
        if m["tag"] != "position":
            return tuple(sorted(entries, key=str))
        name = m["include"][1]["position"][0]
        return (name, *entries) if name in mirrored else (flip(name), *entries[::-1])

    def flip(name):
        return next(a for a, b in mirrored.items() if b == name)

    by_split = {
        name: {content(m) for m in prompts.records(name) if m["tag"] != "single_object"}
        for name in prompts.SPLITS
    }
    assert not by_split["train"] & by_split["heldout"]
    assert not by_split["train"] & by_split["tune"]
    assert not by_split["tune"] & by_split["heldout"]
    # Hundreds of combinations for each task that has more than one object.
    for tag in ("two_object", "counting", "position", "color_attr"):
        contents = {
            content(m) for n in prompts.SPLITS for m in prompts.records(n) if m["tag"] == tag
        }
        assert len(contents) >= 100


def test_every_split_has_every_task():
    for name in prompts.SPLITS:
        assert {m["tag"] for m in prompts.records(name)} == set(prompts.TAGS)


def test_training_set_has_the_stated_proportions_and_no_other_prompts():
    found = prompts.split("train")
    counts = Counter(m["tag"] for m in found.metadata)
    whole = sum(prompts.TRAINING_SHARES.values())
    assert {t: n * whole / len(found) for t, n in counts.items()} == prompts.TRAINING_SHARES
    assert set(found.texts) <= {m["prompt"] for m in prompts.records("train")}
    # Half of all training prompts at least, and all of those of a small task.
    assert len(set(found.texts)) >= len(prompts.records("train")) / 2
    counting = {m["prompt"] for m in prompts.records("train") if m["tag"] == "counting"}
    assert counting <= set(found.texts)


def test_balanced_takes_tasks_in_turn():
    tags = [m["tag"] for m in prompts.balanced("heldout", 60)]
    assert Counter(tags) == dict.fromkeys(prompts.TAGS, 10)
    assert tags[:6] == list(prompts.TAGS)


def test_unknown_split():
    with pytest.raises(ConfigError, match="'test', but one of train, tune, heldout is expected"):
        prompts.split("test")


def test_every_prompt_fits_the_tokenizer():
    assert max(len(m["prompt"].split()) for n in prompts.SPLITS for m in prompts.records(n)) <= 8
