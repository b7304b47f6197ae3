"""Prompt sets: files, errors, and the batches of an iteration."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.prompts import batches as prompts_batches
from flowgrpo.prompts.batches import check_count, row_seeds
from flowgrpo.prompts.load import ANY, has_splits, load_prompts
from flowgrpo.records import Prompts


def config(**changes) -> Config:
    base = {
        "sample.prompts_per_iteration": 3,
        "sample.group_size": 4,
        "sample.batch_size": 6,
        "run.seed": 11,
    }
    return replace(Config(), **{**base, **changes})


def test_text_file(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a red circle\n\n  zwei Äpfel  \n", encoding="utf-8")
    found = load_prompts(str(path))
    assert found.texts == ("a red circle", "zwei Äpfel")
    assert found.metadata == ({}, {}) and found.indices.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.JSONL"])
def test_a_file_as_windows_writes_it(tmp_path, name):
    """Byte order mark and CRLF are no part of a prompt."""
    lines = ["a red circle", "zwei Äpfel"]
    if name != "p.txt":
        lines = [json.dumps({"prompt": line}) for line in lines]
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert load_prompts(str(tmp_path / name)).texts == ("a red circle", "zwei Äpfel")


@pytest.mark.parametrize("kind", [".ndjson", ".jsonlines", ".NDJSON"])
def test_other_names_of_jsonl(tmp_path, kind):
    (tmp_path / f"train{kind}").write_text('{"prompt": "a dog", "tag": "x"}\n')
    prompts = load_prompts(str(tmp_path / f"train{kind}"))
    assert prompts.texts == ("a dog",) and prompts.metadata[0]["tag"] == "x"
    if kind.islower():
        assert load_prompts(str(tmp_path)).texts == ("a dog",)


def test_whole_characters_beyond_16_bits_are_text(tmp_path):
    """JSON writes them as two surrogates, which are one character."""
    (tmp_path / "p.jsonl").write_text('{"prompt": "a \\ud83d\\ude00 \\u00e9"}\n{"prompt": "😀"}')
    assert load_prompts(str(tmp_path / "p.jsonl")).texts == ("a 😀 é", "😀")
    (tmp_path / "p.txt").write_text("{a dog}\n[1, 2]\n", encoding="utf-8")
    assert load_prompts(str(tmp_path / "p.txt")).texts == ("{a dog}", "[1, 2]")


def test_jsonl_file_and_folder(tmp_path):
    lines = [{"prompt": "one\u2028line", "tag": "x"}, {"prompt": "b", "include": [1]}]
    for split in ("train", "test"):
        text = "\n".join(
            json.dumps(entry | {"split": split}, ensure_ascii=False) for entry in lines
        )
        (tmp_path / f"{split}_metadata.jsonl").write_text(text + "\n", encoding="utf-8")
    train = load_prompts(str(tmp_path))
    assert train.texts == ("one\u2028line", "b")
    assert train.metadata[1] == {"prompt": "b", "include": [1], "split": "train"}
    assert load_prompts(str(tmp_path), "heldout").metadata[0]["split"] == "test"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "has no prompts"),
        ("p.txt", b"\xff\xfe", "cannot be read as UTF-8"),
        ("p.jsonl", '{"prompt": "a"}\nno json', "line 2 of .* is 'no json'"),
        ("p.jsonl", '["prompt"]', "object with a string 'prompt'"),
        ("p.jsonl", '{"prompt": 3}', "object with a string 'prompt'"),
        ("p.jsonl", '{"prompt": " "}', "line 1 of .* 'prompt' that is not empty"),
        ("p.jsonl", '{"prompt": "a"}\n' + "[" * 100_000, "line 2 of .* 'prompt'"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "1" * 5_000 + "}", "line 1 of .* 'prompt'"),
        ("p.json", '[{"prompt": "a"}]', "a .json file, whose lines are no prompts"),
        ("p.CSV", "prompt\na", "a .csv file, whose lines are no prompts"),
        ("p.yaml", "- a dog", "a .yaml file, whose lines are no prompts"),
        ("p.yml", "- a dog", "a .yml file, whose lines are no prompts"),
        ("p.parquet", b"PAR1\x00", "a .parquet file.*hub:FOLDER"),
        ("p.jsonl.gz", b"\x1f\x8b", "a .gz file, whose lines are no prompts"),
        ("p.txt", '{"text": "a"}\n{"text": "b"}', "a JSON object, but a text file"),
        ("p.txt", '[\n  "a dog",\n  "a cat"\n]', "is JSON as a whole"),
        ("p.txt", '{\n  "prompts": ["a"]\n}', "is JSON as a whole"),
        ("p.txt", '{"prompt": "a"}', "a JSON object, but a text file .*; name the file .jsonl"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": "b \\ud83d"}', r"line 2 of .* has '\\ud83d' in"),
        ("p.jsonl", '{"prompt": "a", "x": [{"\\udfff": 1}]}', r"line 1 of .* has '\\udfff' in"),
        ("p.jsonl", '{"prompt": "a", "n": ' + "9" * 5000 + "}", "line 1 of .* is "),
        ("p.jsonl", '{"prompt": "a", "n": ' + "[" * 99999, "line 1 of .* is "),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message):
        load_prompts(str(path))


def test_prompts_that_are_only_evaluated(tmp_path):
    """The held-out ones, or those of training where a folder has no others."""
    (tmp_path / "train.txt").write_text("one\ntwo")
    assert load_prompts(tmp_path, ANY).texts == ("one", "two")
    (tmp_path / "test.jsonl").write_text('{"prompt": "three"}')
    assert load_prompts(tmp_path, ANY).texts == ("three",)
    for name in ("nano", "general"):
        assert load_prompts(name, ANY).texts == load_prompts(name, "heldout").texts
    with pytest.raises(ConfigError, match=r"^--quality-prompts is 'absent', which is neither"):
        load_prompts("absent", ANY, "--quality-prompts")
    (tmp_path / "a.csv").write_text("Prompts,Category")
    with pytest.raises(ConfigError, match=r"^--quality-prompts is .*, a \.csv file"):
        load_prompts(tmp_path / "a.csv", ANY, "--quality-prompts")


def test_a_path_and_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.txt").write_text("a dog")
    for name in (tmp_path, tmp_path / "train.txt", "~/train.txt", "~", Path("~") / "train.txt"):
        assert load_prompts(name).texts == ("a dog",)
    assert has_splits("~") and has_splits(tmp_path) and not has_splits("~/train.txt")


def test_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"'aaa.*cannot be looked up .File name too long"):
        load_prompts("a" * 5_000)
    with pytest.raises(ConfigError, match="neither one of nano, nano_text, geneval, ocr, general"):
        load_prompts(str(tmp_path / "absent.txt"))
    with pytest.raises(ConfigError, match="no file for the split 'heldout'"):
        load_prompts(str(tmp_path), "heldout")
    for name in ("nano", "geneval", "hub:a/b"):
        with pytest.raises(ConfigError, match="the split is 'trian', but one of train"):
            load_prompts(name, "trian")


@pytest.mark.parametrize("name", ["geneval", "ocr", "general"])
def test_sets_of_the_package(name):
    train, test = load_prompts(name, "train"), load_prompts(name, "test")
    assert len(train) > len(test) > 50
    assert not set(train.texts) & set(test.texts)


def test_metadata_must_match():
    with pytest.raises(ValueError, match="1 entries for 2 texts"):
        Prompts.of(["a", "b"], [{}])


def test_null_is_absent_at_any_depth(tmp_path):
    entry = {"prompt": "a dog", "exclude": None, "include": [{"class": "dog", "color": None}]}
    (tmp_path / "p.jsonl").write_text(json.dumps({**entry, "box": [None, 1], "n": 0, "t": ""}))
    metadata = {"prompt": "a dog", "include": [{"class": "dog"}], "box": [None, 1], "n": 0, "t": ""}
    assert load_prompts(str(tmp_path / "p.jsonl")).metadata == (metadata,)
    assert Prompts.of(["a dog"], [entry]).metadata[0].keys() == {"prompt", "include"}
    # The caller's own is as it was.
    assert entry["exclude"] is None and entry["include"][0]["color"] is None


def test_an_epoch_covers_the_set_once():
    found = Prompts.of([str(i) for i in range(11)])
    for epoch in range(3):
        batches = [prompts_batches.prompt_batch(found, config(), 3 * epoch + i) for i in range(3)]
        indices = torch.cat([batch.indices for batch in batches]).tolist()
        assert len(set(indices)) == 9
        assert [str(i) for i in indices] == [t for batch in batches for t in batch.texts]
    orders = [prompts_batches.prompt_batch(found, config(), i).texts for i in range(0, 30, 3)]
    assert len(set(orders)) > 5


def test_too_many_prompts_for_the_set():
    with pytest.raises(ConfigError, match=r"prompts_per_iteration is 3, but .* only 2 prompts"):
        check_count(Prompts.of(["a", "b"]), 3)


def test_row_seeds():
    own, initial = row_seeds(3, config(), 5)
    assert torch.equal(own, initial) and own.dtype == torch.int64 and len(own.unique()) == 12
    own_shared, shared = row_seeds(3, config(**{"sample.shared_noise": True}), 5)
    assert torch.equal(own, own_shared)
    assert torch.equal(shared.view(3, 4), shared[::4, None].expand(3, 4))
    assert len(shared.unique()) == 3 and not set(shared.tolist()) & set(own.tolist())
    # The first rows do not depend on how many prompts follow.
    assert torch.equal(row_seeds(2, config(), 5)[0], own[:8])
    assert not torch.equal(row_seeds(3, config(), 6)[0], own)


def test_brackets_and_braces_are_text_too(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("[a dog] in the rain\n{curly}\n")
    assert load_prompts(path).texts == ("[a dog] in the rain", "{curly}")


def test_byte_order_marks_of_files_that_were_joined(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa dog\n\xef\xbb\xbfa cat\n")
    assert load_prompts(path).texts == ("a dog", "a cat")
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n')
    assert load_prompts(path).texts == ("a", "b")


def test_nan_is_absent_as_null_is(tmp_path):
    """What pandas writes for a value that a row lacks."""
    path = tmp_path / "p.jsonl"
    entry = {"class": "dog", "count": 1, "color": float("nan"), "position": None}
    path.write_text(json.dumps({"prompt": "a dog", "tag": "x", "include": [entry], "n": math.nan}))
    (metadata,) = load_prompts(path).metadata
    include = [{"class": "dog", "count": 1}]
    assert metadata == {"prompt": "a dog", "tag": "x", "include": include}


@pytest.mark.parametrize("name", ["", "x" * 5000, "a\0b", "/" + "y/" * 3000])
def test_names_that_are_no_paths(name):
    with pytest.raises(ConfigError, match=r"sample\.prompts is"):
        load_prompts(name)
