"""Prompts by the library datasets, from folders as the Hub holds them."""

from __future__ import annotations

import builtins
import json

import pytest

from flowgrpo.config import ConfigError
from flowgrpo.prompts.load import ANY, load_prompts

ROWS = [
    {"prompt": "a red dog", "tag": "colors", "include": [{"class": "dog", "count": 1}]},
    {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pytest.importorskip("datasets", reason="pip install flowgrpo[data]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    made = tmp_path / "set"
    made.mkdir()
    for split, rows in (("train", ROWS), ("test", ROWS[:1])):
        (made / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return made


def test_rows_become_prompts_and_metadata(folder):
    train = load_prompts(f"hub:{folder}")
    assert train.texts == ("a red dog", "two cats")
    assert train.metadata[1]["include"] == [{"class": "cat", "count": 2}]
    assert load_prompts(f"hub:{folder}", "heldout").texts == ("a red dog",)
    assert load_prompts(f"hub:{folder}:tag").texts == ("colors", "counting")


def test_a_key_that_is_absent_in_a_row_is_not_null(folder):
    """GenEval's own metadata: datasets gives every row every key, null where there was none."""
    from flowgrpo.rewards.geneval import rules

    rows = [
        *ROWS,
        {
            "prompt": "a red cat left of a dog, no cow",
            "tag": "position",
            "include": [
                {"class": "dog", "count": 1},
                {"class": "cat", "count": 1, "color": "red", "position": ["left of", 0]},
            ],
            "exclude": [{"class": "cow", "count": 1}],
        },
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(f"hub:{folder}")
    assert list(prompts.metadata) == rows
    for entry in prompts.metadata:
        rules.check(entry)


def test_parquet_with_pictures(folder):
    import io

    import pyarrow
    from PIL import Image
    from pyarrow import parquet

    made = folder.parent / "pairs"
    made.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (4, 4)).save(picture, "png")
    pictures = [{"bytes": picture.getvalue(), "path": None}] * 2
    # What the Hub's files say about their columns.
    kinds = {
        "image": {"_type": "Image"},
        "caption": {"dtype": "string", "_type": "Value"},
    }
    table = pyarrow.table({"image": pictures, "caption": ["one", "two"]})
    about = json.dumps({"info": {"features": kinds}})
    parquet.write_table(
        table.replace_schema_metadata({"huggingface": about}), made / "train.parquet"
    )
    found = load_prompts(f"hub:{made}")
    assert found.texts == ("one", "two")
    assert found.metadata[0] == {"caption": "one", "prompt": "one"}


def test_prompts_that_are_only_evaluated_may_be_the_training_ones(folder):
    assert load_prompts(f"hub:{folder}", ANY).texts == ("a red dog",)
    (folder / "test.jsonl").unlink()
    assert load_prompts(f"hub:{folder}", ANY).texts == ("a red dog", "two cats")


def test_errors_are_one_sentence(folder):
    (folder / "test.jsonl").unlink()
    for name, split, message in (
        (f"hub:{folder}", "heldout", "has the splits train, but one of test, validation"),
        (f"hub:{folder}:title", "train", "has the columns prompt, tag, include, but title"),
        (f"hub:{folder.parent / 'absent'}", "train", "cannot be loaded .*check the name"),
    ):
        with pytest.raises(ConfigError, match=message) as info:
            load_prompts(name, split)
        assert "\n" not in str(info.value)


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def without(name, *rest):
        if name == "datasets":
            raise ImportError("No module named 'datasets'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"pip install 'flowgrpo\[data\]'"):
        load_prompts("hub:someone/prompts")
    with pytest.raises(ConfigError, match=r"^--quality-prompts is 'hub:someone/prompts', which"):
        load_prompts("hub:someone/prompts", ANY, "--quality-prompts")
