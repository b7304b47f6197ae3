"""Prompts by the library datasets, from folders as the Hub holds them."""

from __future__ import annotations

import builtins
import json
import sys

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


def test_rows_without_a_text_are_left_out_and_counted(folder, caplog):
    rows = [*ROWS, {"prompt": None, "tag": "x"}, {"prompt": "  ", "tag": "x"}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load_prompts(f"hub:{folder}").texts == ("a red dog", "two cats")
    assert "2 of the 4 rows" in caplog.text and "no text in the column prompt" in caplog.text
    rows = [{"prompt": ["a red dog", "a dog"]}, {"prompt": ["two cats"]}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "test.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"the column prompt of .* has no texts in the split"):
        load_prompts(f"hub:{folder}")


def test_a_folder_whose_path_has_a_colon(folder):
    other = folder.rename(folder.with_name("set:1"))
    assert load_prompts(f"hub:{other}").texts == ("a red dog", "two cats")


def test_a_table_in_a_folder(folder):
    """As the sentence on a .csv file says: folders train and test, the column prompt."""
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").unlink()
        (folder / split).mkdir()
        (folder / split / "any.csv").write_text(f"prompt,tag\na {split} dog,x\n")
    assert load_prompts(f"hub:{folder}").texts == ("a train dog",)
    assert load_prompts(f"hub:{folder}", "heldout").texts == ("a test dog",)


def test_a_folder_called_datasets_is_not_the_library(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    (tmp_path / "datasets").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match=r"cannot be imported.*pip install"):
        load_prompts("hub:acme/prompts")


def test_the_reason_of_a_set_that_cannot_be_read_is_the_readers(folder):
    """datasets says that an error occurred; what it was stands behind that."""
    rows = [{"prompt": "a", "tag": 1}, {"prompt": "b", "tag": {"x": 1}}]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ConfigError, match="cannot be loaded") as error:
        load_prompts(f"hub:{folder}")
    assert "tag" in str(error.value) and "\n" not in str(error.value)
