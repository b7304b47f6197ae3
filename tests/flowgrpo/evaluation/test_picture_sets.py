"""Pictures of other systems: both layouts, what cannot be read, batches of one size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowgrpo import rewards
from flowgrpo.config import ConfigError
from flowgrpo.evaluation import picture_sets
from flowgrpo.evaluation.picture_sets import PictureSet
from support import image_folders

RED = "support.processes:red"


def names(pictures: PictureSet) -> list[str]:
    return [str(path.relative_to(pictures.source)) for path in pictures.files]


def test_geneval_layout(tmp_path):
    """Folders in order, pictures in order; the grid and files that are no pictures are left."""
    image_folders.geneval(
        tmp_path,
        [
            ("a photo of a dog", {"tag": "single_object"}, [10, 20]),
            ("a photo of two cats", {"tag": "counting"}, [30]),
            ("a photo of a dog", {"tag": "single_object"}, [40]),
        ],
    )
    for name in ("00000/grid.png", "00000/samples/grid.png", "00001/samples/.DS_Store"):
        (tmp_path / name).write_bytes(b"no picture")
    (tmp_path / "00001" / "samples" / "notes.txt").write_text("none either")
    (tmp_path / "logs").mkdir()
    pictures = picture_sets.find_pictures(tmp_path)
    assert pictures.layout == picture_sets.GENEVAL
    assert names(pictures) == [
        "00000/samples/0000.png",
        "00000/samples/0001.png",
        "00001/samples/0000.png",
        "00002/samples/0000.png",
    ]
    assert pictures.prompts.texts[0] == pictures.prompts.texts[3] == "a photo of a dog"
    # Two folders of one text are one prompt.
    assert pictures.prompts.indices.tolist() == [0, 0, 1, 0]
    assert [entry["tag"] for entry in pictures.prompts.metadata][2] == "counting"
    assert picture_sets.read(pictures, False).sizes == ((8, 8),) * 4


@pytest.mark.parametrize("form", ["image", "file", "file_name"])
def test_jsonl(tmp_path, form):
    """Paths are relative to the file, or absolute; metadata at the top or in an object."""
    image_folders.picture(tmp_path / "p" / "a.png", 10)
    image_folders.picture(tmp_path / "b.webp", 20)
    lines = [
        {"prompt": "one", form: "p/a.png", "tag": "x", "include": [1]},
        {"caption": "two", form: str(tmp_path / "b.webp"), "metadata": {"tag": "y", "n": 2}},
        {"text": "one", form: "p/a.png", "tag": None},
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n", encoding="utf-8")
    for source in (path, tmp_path):
        pictures = picture_sets.find_pictures(source)
        assert pictures.layout == picture_sets.JSONL
        assert pictures.files == (
            tmp_path / "p/a.png",
            tmp_path / "b.webp",
            tmp_path / "p/a.png",
        )
        assert pictures.prompts.texts == ("one", "two", "one")
        assert pictures.prompts.indices.tolist() == [0, 1, 0]
        assert pictures.prompts.metadata == (
            {"prompt": "one", "tag": "x", "include": [1]},
            {"prompt": "two", "caption": "two", "tag": "y", "n": 2},
            {"prompt": "one", "text": "one"},
        )


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


BAD = {
    "neither layout": (lambda f: (f / "x").mkdir(), "neither GenEval's layout"),
    "no metadata": (
        lambda f: (f / "00000" / "samples").mkdir(parents=True),
        "has samples/ but no metadata.jsonl",
    ),
    "empty metadata": (lambda f: write(f / "00000/metadata.jsonl", ""), "has 0 objects"),
    "two objects": (
        lambda f: write(f / "00000/metadata.jsonl", '{"prompt": "a"}\n{"prompt": "b"}'),
        "has 2 objects",
    ),
    "no prompt": (
        lambda f: write(f / "00000/metadata.jsonl", '{"tag": "a"}'),
        "line 1 of .*a string 'prompt'",
    ),
    "no object": (lambda f: write(f / "00000/metadata.jsonl", "[1]"), "line 1 of "),
    "no JSON": (lambda f: write(f / "metadata.jsonl", '{"prompt": "a"'), "line 1 of "),
    "no text": (
        lambda f: write(f / "metadata.jsonl", '{"prompt": " ", "image": "a.png"}'),
        "is not empty",
    ),
    "no file": (
        lambda f: write(f / "metadata.jsonl", '\n{"prompt": "a", "image": 3}'),
        "line 2 of .* names no picture",
    ),
    "a surrogate": (
        lambda f: write(f / "metadata.jsonl", '{"prompt": "\\ud800", "image": "a.png"}'),
        "text in Unicode",
    ),
    "no UTF-8": (
        lambda f: (f / "metadata.jsonl").write_bytes(b"\xff\xfe"),
        "cannot be read as UTF-8",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_folders_that_cannot_be_used(tmp_path, name):
    prepare, words = BAD[name]
    prepare(tmp_path)
    with pytest.raises(ConfigError, match=words) as error:
        picture_sets.find_pictures(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_sources_of_another_kind(tmp_path):
    with pytest.raises(ConfigError, match=r"--quality-images is .*absent'.* does not exist"):
        picture_sets.find_pictures(tmp_path / "absent", "--quality-images")
    with pytest.raises(ConfigError, match=r"ends in \.csv, but a folder, or a file in \.jsonl"):
        picture_sets.find_pictures(write(tmp_path / "a.csv", "prompt,image"))


@pytest.fixture
def damaged(tmp_path):
    """Three prompts of six pictures, of which two are whole; the last prompt has none."""
    image_folders.geneval(
        tmp_path, [("one", {}, [10, 20, 30, 40]), ("two", {}, [50]), ("3", {}, [])]
    )
    samples = tmp_path / "00000" / "samples"
    cut = (samples / "0000.png").read_bytes()
    (samples / "0000.png").write_bytes(cut[: len(cut) // 2])
    (samples / "0001.png").write_text("a text")
    (samples / "0003.png").write_bytes(b"")
    return tmp_path


def test_pictures_that_cannot_be_read_are_named_counted_and_refused(damaged):
    with pytest.raises(ConfigError) as error:
        picture_sets.read(picture_sets.find_pictures(damaged), False)
    text = str(error.value)
    assert f"4 of 6 pictures in {damaged} cannot be read" in text and "--skip-unreadable" in text
    for words in (
        "00002/samples: it has no picture",
        "00000/samples/0000.png: ",
        "00000/samples/0001.png: it is no picture that Pillow knows",
        "00000/samples/0003.png: it is empty",
    ):
        assert words in text
    assert "\n" not in text


def test_pictures_are_left_out_only_when_asked(damaged):
    counts = []
    pictures = picture_sets.read(
        picture_sets.find_pictures(damaged),
        True,
        lambda stage, count: counts.append((stage, count)),
    )
    assert names(pictures) == ["00000/samples/0002.png", "00001/samples/0000.png"]
    assert pictures.prompts.texts == ("one", "two")
    assert len(pictures.without) == 4
    assert counts == [("reading", number) for number in range(1, 6)]
    assert picture_sets.sizes_of(pictures) == {"8x8": 2}


def test_a_message_names_some_of_many(tmp_path):
    image_folders.geneval(tmp_path, [("one", {}, [1] * 11)])
    for path in (tmp_path / "00000" / "samples").iterdir():
        path.write_bytes(b"")
    pictures = picture_sets.find_pictures(tmp_path)
    with pytest.raises(ConfigError, match=r"11 of 11 .*; and 3 more\)"):
        picture_sets.read(pictures, False)
    with pytest.raises(ConfigError, match="none of the 11 pictures in "):
        picture_sets.read(pictures, True)
    with pytest.raises(ConfigError, match=r"none of the 0 pictures in .*there is none"):
        picture_sets.read(picture_sets.find_pictures(write(tmp_path / "e.jsonl", "")), False)


def test_batches_have_one_size_and_keep_the_order():
    sizes = [(8, 8), (8, 16), (8, 8), (16, 8), (8, 8), (8, 16)]
    assert picture_sets.batches(sizes, 2) == [[0, 2], [4], [1, 5], [3]]
    assert picture_sets.batches([], 2) == []


def sized(images, prompts, metadata):
    """Height, width, red of the first pixel and number of the prompt, as one number."""
    height, width = images.shape[2:]
    assert len(images) <= 2
    return [
        1e6 * height + 1e4 * width + 10 * int(image[0, 0, 0]) + int(text)
        for image, text in zip(images, prompts, strict=True)
    ]


def test_pictures_of_several_sizes_are_scored_where_they_belong(tmp_path):
    sizes = [(8, 8), (16, 8), (8, 8), (8, 24), (16, 8), (8, 8)]
    lines = []
    for number, size in enumerate(sizes):
        image_folders.picture(tmp_path / f"{number}.png", 10 * number, size)
        lines.append(json.dumps({"prompt": str(number), "image": f"{number}.png"}))
    write(tmp_path / "metadata.jsonl", "\n".join(lines))
    pictures = picture_sets.read(picture_sets.find_pictures(tmp_path), False)
    assert pictures.sizes == tuple(sizes)
    counts = []
    scores = picture_sets.score(
        pictures,
        rewards.Scorer({"test_picture_sets:sized": 1.0, RED: 1.0}, retries=0),
        2,
        lambda stage, count: counts.append(count),
    )
    expected = [1e6 * h + 1e4 * w + 100 * n + n for n, (h, w) in enumerate(sizes)]
    assert scores["test_picture_sets:sized"].tolist() == expected
    assert scores["test_picture_sets:sized"].dtype == torch.float64
    assert scores[RED].tolist() == pytest.approx([10 * n / 255 for n in range(6)], rel=1e-6)
    assert counts == [2, 3, 5, 6]


def test_a_picture_that_changes_is_noticed(tmp_path):
    image_folders.geneval(tmp_path, [("one", {}, [10])])
    pictures = picture_sets.read(picture_sets.find_pictures(tmp_path), False)
    scorer = rewards.Scorer({RED: 1.0})
    path = pictures.files[0]
    Image.new("RGB", (4, 8)).save(path)
    with pytest.raises(ConfigError, match="had 8 x 8 pixels and has 4 x 8 now"):
        picture_sets.score(pictures, scorer, 4)
    path.unlink()
    with pytest.raises(ConfigError, match=r"cannot be now .there is no such file"):
        picture_sets.score(pictures, scorer, 4)
