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
        ("a single blue triangle", "colors", [{"class": "triangle", "count": 1, "color": "blue"}]),
        (
            "a circle with a square",
            "two_object",
            [{"class": "circle", "count": 1}, {"class": "square", "count": 1}],
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
            "a circle left of a square",
            "position",
            [
                {"class": "square", "count": 1},
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

    def contents(name):
        def key(m):
            entries = [
                (e["class"], e.get("color"), str(e.get("position", [""])[0])) for e in m["include"]
            ]
            return tuple(sorted(entries)) if m["tag"] == "color_attr" else tuple(entries)

        records = prompts.records(name)
        return {key(m) for m in records if m["tag"] in ("position", "color_attr")}

    assert not contents("train") & contents("heldout")
    assert not contents("train") & contents("tune")


def test_every_split_has_every_task():
    for name in prompts.SPLITS:
        assert {m["tag"] for m in prompts.records(name)} == set(prompts.TAGS)


def test_training_set_has_the_stated_proportions_and_all_training_prompts():
    found = prompts.split("train")
    counts = Counter(m["tag"] for m in found.metadata)
    whole = sum(prompts.TRAINING_SHARES.values())
    assert {t: n * whole / len(found) for t, n in counts.items()} == prompts.TRAINING_SHARES
    assert set(found.texts) == {m["prompt"] for m in prompts.records("train")}


def test_balanced_takes_tasks_in_turn():
    tags = [m["tag"] for m in prompts.balanced("heldout", 60)]
    assert Counter(tags) == dict.fromkeys(prompts.TAGS, 10)
    assert tags[:6] == list(prompts.TAGS)


def test_unknown_split():
    with pytest.raises(ConfigError, match="'test', but one of train, tune, heldout is expected"):
        prompts.split("test")


def test_every_prompt_fits_the_tokenizer():
    assert max(len(m["prompt"].split()) for n in prompts.SPLITS for m in prompts.records(n)) <= 8
