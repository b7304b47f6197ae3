"""Sources: real folders, real shards, a data set as `datasets` saves it."""

from __future__ import annotations

import importlib
import io
import json
import tarfile

import pytest
from PIL import Image

from flowgrpo.config import ConfigError
from flowgrpo.curation import sources
from flowgrpo.curation.curate import curate
from flowgrpo.curation.dataset import CuratedSet
from flowgrpo.curation.options import CurateOptions
from support.grey_pictures import captioned, grey


def samples(name, skip=0, **changes):
    options = CurateOptions((str(name),), **changes)
    return list(sources.samples(str(name), options, skip))


def content(name, **changes) -> list[tuple]:
    """(name in the source, caption, grey of the first pixel, metadata)"""
    return [
        (
            sample.source.removeprefix(f"{name}/"),
            sample.prompt,
            sample.open().convert("L").getpixel((0, 0)),
            sample.metadata,
        )
        for sample in samples(name, **changes)
    ]


def test_captions_beside_pictures(tmp_path):
    captioned(
        tmp_path,
        {"b.png": (2, "two\n cats \n"), "a.jpg": (1, "\ufeffone"), "sub/c.webp": (3, "three")},
    )
    grey(tmp_path / "d.PNG", 4)
    (tmp_path / "letter.txt").write_text("no picture")
    grey(tmp_path / ".hidden" / "e.png", 5), grey(tmp_path / ".f.png", 6)
    assert content(tmp_path) == [
        ("a.jpg", "one", 1, {}),
        ("b.png", "two cats", 2, {}),
        ("d.PNG", None, 4, {}),
        ("sub/c.webp", "three", 3, {}),
    ]
    assert [s.prompt for s in samples(tmp_path, skip=2)] == [None, "three"]


@pytest.mark.parametrize("name", sources.LISTS)
def test_lists_of_captions(tmp_path, name):
    """In the order of the lines; a picture that no line names has the caption beside it, or none;
    a subfolder may have a list of its own."""
    for number, file in enumerate(("a.png", "b.png", "sub/c.png", "sub/d.png", "other.png")):
        grey(tmp_path / file, number)
    grey(tmp_path / "e.png", 9).with_suffix(".txt").write_text("beside")
    lines = [
        {"file_name": "b.png", "text": " two ", "tag": "colors", "none": None},
        {"file_name": "sub/c.png", "caption": "three", "text": "another"},
        {"file_name": "a.png", "text": [""]},
    ]
    (tmp_path / name).write_text("\n\n".join(map(json.dumps, lines)))
    (tmp_path / "sub" / name).write_text(json.dumps({"file_name": "d.png", "prompt": ["four", 4]}))
    assert content(tmp_path) == [
        ("b.png", "two", 1, {"tag": "colors"}),
        ("sub/c.png", "three", 2, {"text": "another"}),
        ("a.png", None, 0, {}),
        ("e.png", "beside", 9, {}),
        ("other.png", None, 4, {}),
        ("sub/d.png", "four", 3, {}),
    ]
    [*_, last] = content(tmp_path, caption_column="text")
    assert last == ("sub/d.png", None, 3, {"prompt": ["four", 4]})


def refused(message, name, **changes):
    with pytest.raises(ConfigError, match=message) as error:
        samples(name, **changes)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")


def test_wrong_folders(tmp_path):
    refused("neither a folder nor a shard", tmp_path / "absent")
    refused("has no pictures, but at least one is expected", tmp_path)
    grey(tmp_path / "a.png", 1)
    for line in ("no json", "[1]", '{"text": "a"}', '{"file_name": 3}'):
        (tmp_path / "metadata.jsonl").write_text(line)
        refused(r"line 1 of .*metadata.jsonl is .* with the 'file_name' of a picture", tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "\\ud83d"}')
    refused("the caption of .*a.png has .* a surrogate by itself", tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(b"\xff\xfe")
    refused("cannot be read as UTF-8 text", tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "absent.png", "text": "a"}')
    with pytest.raises(FileNotFoundError):
        samples(tmp_path)[0].open()


# Shards


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, "png")
    return buffer.getvalue()


def shard(path, members: dict[str, bytes], mode: str = "w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def webdataset():
    return pytest.importorskip("webdataset", reason="pip install flowgrpo[data]")


@pytest.fixture
def shards(tmp_path, webdataset):
    folder = tmp_path / "shards"
    folder.mkdir()
    shard(
        folder / "000.tar",
        {
            "a.png": png(1),
            "a.txt": b"one\n",
            "b.png": png(2),
            "b.json": json.dumps({"caption": "two", "tag": "x", "none": None}).encode(),
        },
    )
    shard(
        folder / "001.tar",
        {"c.jpg": png(3), "d.txt": b"no picture", "e.png": png(5), "e.alt": b"five", "e.txt": b""},
    )
    return folder


def test_shards(shards):
    names = [f"{shards}/000.tar", f"{shards}/{{000..001}}.tar", shards]
    for name, count in zip(names, (2, 5, 5), strict=True):
        rows = samples(name)
        assert len(rows) == count
        assert rows[0].source == f"{shards}/000.tar/a.png" and rows[0].prompt == "one"
        assert rows[1].prompt == "two" and rows[1].metadata == {"tag": "x"}
        assert rows[1].open().getpixel((0, 0)) == 2
    assert [row.prompt for row in rows[2:]] == [None, "no picture", None]
    assert rows[2].open().getpixel((0, 0)) == 3
    with pytest.raises(ValueError, match="no picture is among its members txt"):
        rows[3].open()
    assert [row.source for row in samples(shards, skip=3)] == [row.source for row in rows[3:]]
    assert samples(shards, caption_column="alt")[4].prompt == "five"


def test_a_packed_shard(tmp_path, webdataset):
    file = shard(tmp_path / "a.tar.gz", {"a.png": png(7), "a.txt": b"seven"}, "w:gz")
    [sample] = samples(file)
    assert sample.prompt == "seven" and sample.open().getpixel((0, 0)) == 7


def test_wrong_shards(tmp_path, webdataset):
    refused(r"cannot be read \(FileNotFoundError", tmp_path / "absent.tar")
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    refused("but webdataset shards are expected", tmp_path / "text.tar")
    refused("has no pictures", shard(tmp_path / "empty.tar", {}))
    broken = shard(tmp_path / "json.tar", {"a.png": png(1), "a.json": b"[1"})
    refused("the caption of .*json.tar/a cannot be read", broken)
    refused("a JSON object is expected", shard(broken, {"a.png": png(1), "a.json": b"[1]"}))


def test_shards_among_pictures(shards):
    grey(shards / "loose.png", 1)
    refused(r"holds shards such as \['000.tar'\] and pictures such as \['loose.png'\]", shards)
    assert len(samples(f"{shards}/000.tar")) == 2


@pytest.mark.slow
def test_shards_become_a_set(shards, tmp_path):
    options = CurateOptions(
        (str(shards),),
        str(tmp_path / "out"),
        resolution=8,
        shares=(1.0, 0.0, 0.0),
        skip_unreadable=True,
        skip_uncaptioned=True,
    )
    about = curate(options)
    assert about["counts"]["dropped"] == {"no caption": 2, "unreadable": 1}
    assert CuratedSet.load(tmp_path / "out").texts == ("one", "two")


# Data sets


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    library = pytest.importorskip("datasets", reason="pip install flowgrpo[data]")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    library.disable_progress_bars()
    return library


@pytest.fixture
def table(datasets):
    import pyarrow

    rows = {
        "id": [7, 8, 9],
        "picture": [*({"bytes": png(n), "path": None} for n in (1, 2)), None],
        "caption": ["one", " two ", "three"],
        "second": [{"bytes": png(9), "path": None}] * 3,
    }
    kinds = datasets.Features(
        {
            "id": datasets.Value("int64"),
            "picture": datasets.Image(),
            "caption": datasets.Value("string"),
            "second": datasets.Image(),
        }
    )
    # A fingerprint, as dill pickles no table of some versions of pyarrow, of which it is a hash.
    table = datasets.table.InMemoryTable(pyarrow.table(rows, schema=kinds.arrow_schema))
    return datasets.Dataset(table, info=datasets.DatasetInfo(features=kinds), fingerprint="a")


@pytest.mark.slow
@pytest.mark.parametrize("form", ["parquet", "saved", "saved splits"])
def test_a_data_set(datasets, table, tmp_path, form):
    folder = tmp_path / "set"
    if form == "parquet":
        folder.mkdir()
        table.to_parquet(folder / "train.parquet")
    elif form == "saved":
        table.save_to_disk(folder)
    else:
        datasets.DatasetDict({"train": table, "test": table}).save_to_disk(folder)
        row = samples(f"hub:{folder}", 1, hub_split="test")[0]
        assert row.source == f"hub:{folder}/test/1" and row.prompt == "two"
    name = f"hub:{folder}"
    rows = samples(name)
    assert [row.prompt for row in rows] == ["one", "two", "three"]
    assert rows[1].source == f"{name}/train/1" and rows[1].metadata == {"id": 8}
    assert [row.open().getpixel((0, 0)) for row in rows[:2]] == [1, 2]
    with pytest.raises(ValueError, match="the row has no picture"):
        rows[2].open()
    assert [row.source for row in samples(name, skip=2)] == [rows[2].source]
    assert samples(name, image_column="second")[0].open().getpixel((0, 0)) == 9
    refused("has the columns id, .* --image-column", name, image_column="caption")
    refused("is expected to hold the captions", name, caption_column="title")
    refused("--hub-split validation is expected", name, hub_split="validation")


@pytest.mark.slow
def test_a_data_set_becomes_a_set(table, tmp_path):
    table.save_to_disk(tmp_path / "set")
    options = CurateOptions(
        (f"hub:{tmp_path}/set",),
        str(tmp_path / "out"),
        resolution=8,
        shares=(1.0, 0.0, 0.0),
        skip_unreadable=True,
    )
    assert curate(options)["counts"]["dropped"] == {"unreadable": 1}
    records = CuratedSet.load(tmp_path / "out")
    assert records.metadata == ({"id": 7}, {"id": 8})
    assert records.images([1])[0, 0, 0, 0] == 2


@pytest.mark.slow
def test_a_data_set_that_is_not_there(datasets, tmp_path):
    refused(r"the source 'hub:.*' cannot be read \(.*check the name", f"hub:{tmp_path}/absent")


def test_without_the_libraries(tmp_path, monkeypatch):
    real = importlib.import_module

    def without(name, *rest):
        if name in ("datasets", "webdataset"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", without)
    for name in ("hub:someone/pictures", f"{tmp_path}/a.tar"):
        refused(r"which cannot be imported .* pip install 'flowgrpo\[data\]'", name)
