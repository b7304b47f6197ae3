"""The shipped prompt sets: the generator's output, parts that share nothing, GenEval kept out."""

import json
from collections import Counter

import pytest

from flowgrpo.prompts import sets
from flowgrpo.prompts.load import load_prompts
from flowgrpo.prompts.sets import generate, geneval_prompts
from flowgrpo.rewards.ocr import quoted_text


def lines(name, part):
    path = sets.folder(name) / f"{part}_metadata.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_the_files_are_what_the_generator_writes():
    for name, found in generate.sets().items():
        assert (sets.folder(name.split("/")[0]).parent / name).read_text("utf-8") == generate.text(
            found
        )


@pytest.mark.parametrize("name", sets.NAMES)
def test_parts_share_no_content(name):
    key = generate.GRAMMARS[name].key
    train, test = ({key(line) for line in lines(name, part)} for part in ("train", "test"))
    assert train
    assert test
    assert not train & test
    everything = [line["prompt"] for part in ("train", "test") for line in lines(name, part)]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("name", sets.NAMES)
def test_sets_load_by_folder(name):
    folder = str(sets.folder(name))
    train, test = load_prompts(folder, "train"), load_prompts(folder, "heldout")
    assert len(train) == len(lines(name, "train"))
    assert test.metadata[0]["prompt"] == test.texts[0]
    assert {entry["tag"] for entry in test.metadata} == {e["tag"] for e in train.metadata}


def test_unknown_set():
    with pytest.raises(KeyError):
        sets.folder("imagenet")


def test_geneval_has_six_tasks_and_no_prompt_of_the_benchmark():
    tags = {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert len(geneval_prompts.CLASSES) == len(set(geneval_prompts.CLASSES)) == 80
    for part in ("train", "test"):
        found = lines("geneval", part)
        assert set(Counter(line["tag"] for line in found)) == tags
        for line in found:
            assert geneval_prompts.fingerprint(line) not in geneval_prompts.BENCHMARK
    # Prompts of the benchmark itself, and the same content in another order.
    known = [
        {"tag": "counting", "include": [{"class": "clock", "count": 4}]},
        {
            "tag": "position",
            "include": [
                {"class": "teddy bear", "count": 1},
                {"class": "dog", "count": 1, "position": ["right of", 0]},
            ],
        },
        {
            "tag": "position",
            "include": [
                {"class": "dog", "count": 1},
                {"class": "teddy bear", "count": 1, "position": ["left of", 0]},
            ],
        },
    ]
    for line in known:
        assert geneval_prompts.fingerprint(line) in geneval_prompts.BENCHMARK


def test_texts_to_render_can_be_read_from_every_prompt():
    found = [quoted_text(line["prompt"]) for line in lines("ocr", "train") + lines("ocr", "test")]
    assert len(set(found)) == len(found)
    assert all(3 <= len(text) <= 32 for text in found)
