"""The reader of curated sets, on folders written line by line."""

from __future__ import annotations

import hashlib
import io
import json

import pytest
import torch
from PIL import Image

from flowgrpo.config import ConfigError
from flowgrpo.curation import dataset
from flowgrpo.curation.dataset import CuratedSet, content_hash, load_pairs, read_image

SIZE = (2, 3)


def image(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, *SIZE), generator=generator, dtype=torch.uint8)


def save(folder, pixels: torch.Tensor) -> str:
    """Write a picture under the name of its content."""
    name = dataset.image_name(content_hash(pixels))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
    return name


def write_lines(path, lines) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def folder(tmp_path):
    names = [save(tmp_path, image(seed)) for seed in range(3)]
    lines = [
        {
            "prompt": f"prompt {i}",
            "image": name,
            "scores": {"aesthetic": i + 0.5},
            "source": f"photos/{i}.jpg",
            "size": [30 + i, 20],
        }
        for i, name in enumerate(names)
    ]
    lines[2]["metadata"] = {"tag": "colors", "empty": None}
    write_lines(tmp_path / "train.jsonl", lines)
    write_lines(tmp_path / "validation.jsonl", [])
    pair = {"prompt": "prompt 0", "chosen": names[1], "rejected": names[0]}
    pair["scores"] = {"chosen": {"aesthetic": 1.5}, "rejected": {"aesthetic": 0.5}}
    write_lines(tmp_path / "pairs.jsonl", [pair])
    about = {"format": 1, "resolution": list(SIZE), "rewards": ["aesthetic"]}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    return tmp_path


def lines_of(folder, name="train"):
    return list(map(json.loads, (folder / f"{name}.jsonl").read_text().splitlines()))


def test_a_split(folder):
    records = CuratedSet.load(folder)
    assert len(records) == 3 and records.resolution == SIZE and records.rewards == ("aesthetic",)
    assert records.texts == ("prompt 0", "prompt 1", "prompt 2")
    assert records.scores[1] == {"aesthetic": 1.5}
    assert records.metadata == ({}, {}, {"tag": "colors"})
    assert records.sources[2] == "photos/2.jpg" and records.sizes[2] == (32, 20)
    assert torch.equal(records.images([2, 0]), torch.stack([image(2), image(0)]))
    assert records.images([]).shape == (0, 3, *SIZE)
    assert records.prompts.take([2]).metadata == ({"tag": "colors"},)


def test_pairs(folder):
    pairs = load_pairs(str(folder))
    assert pairs.texts == ("prompt 0",) and len(pairs) == 1
    chosen, rejected = pairs.images([0])
    assert torch.equal(chosen[0], image(1)) and torch.equal(rejected[0], image(0))
    assert pairs.scores[0]["rejected"] == {"aesthetic": 0.5}


def test_content_hash_is_that_of_the_rgb_bytes():
    pixels = torch.tensor([[[1, 2]], [[3, 4]], [[5, 6]]], dtype=torch.uint8)
    assert content_hash(pixels) == hashlib.sha256(bytes([1, 3, 5, 2, 4, 6])).hexdigest()


def test_fingerprint_is_of_the_content(folder, tmp_path_factory):
    before = dataset.fingerprint(CuratedSet.load(folder))
    moved = tmp_path_factory.mktemp("elsewhere") / "set"
    folder.rename(moved)
    assert dataset.fingerprint(CuratedSet.load(moved)) == before
    assert dataset.content_of(CuratedSet.load(moved)) == {"count": 3, "sha256": before}
    lines = lines_of(moved)
    for change in ({"prompt": "another"}, {"image": lines[1]["image"]}, {"scores": {"a": 1.0}}):
        write_lines(moved / "train.jsonl", [{**lines[0], **change}, *lines[1:]])
        assert dataset.fingerprint(CuratedSet.load(moved)) != before, change
    write_lines(moved / "train.jsonl", lines[::-1])
    assert dataset.fingerprint(CuratedSet.load(moved)) != before
    assert dataset.fingerprint(load_pairs(moved)) != before


def test_a_picture_that_changed_is_seen(folder):
    path = CuratedSet.load(folder).paths[0]
    Image.fromarray(image(7).permute(1, 2, 0).numpy()).save(path)
    with pytest.raises(ConfigError, match="is not what it was when it was curated"):
        read_image(path)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ConfigError, match=r"cannot be read .* restore it, or curate again"):
        read_image(path)


def test_a_picture_of_another_size(folder):
    records = CuratedSet.load(folder)
    other = folder / "other.png"
    Image.new("RGB", (4, 4)).save(other)
    assert read_image(other).shape == (3, 4, 4)
    with pytest.raises(ConfigError, match="has 4 x 4 pixels, but 3 x 2 is the size"):
        dataset.read_images([other], records.resolution)


def test_grey_and_palette_pictures_are_rgb(tmp_path):
    path, buffer = tmp_path / "grey.png", io.BytesIO()
    Image.new("L", (3, 2), 9).save(buffer, "png")
    path.write_bytes(buffer.getvalue())
    assert torch.equal(read_image(path), torch.full((3, 2, 3), 9, dtype=torch.uint8))


def refused(folder, message, load=CuratedSet.load, *rest):
    with pytest.raises(ConfigError, match=message) as error:
        load(folder, *rest)
    text = str(error.value)
    assert "\n" not in text and text.endswith(".")


def test_unfinished_and_foreign_folders(folder, tmp_path):
    refused(folder, "one of train, validation, test is expected", CuratedSet.load, "heldout")
    refused(folder, "has no images in validation.jsonl", CuratedSet.load, "validation")
    refused(folder, "test.jsonl cannot be read", CuratedSet.load, "test")
    (folder / "dataset.json").write_text(json.dumps({"format": 2}))
    refused(folder, "has the format 2, but 1 is expected")
    (folder / "dataset.json").write_text("[1")
    refused(folder, "dataset.json cannot be read")
    (folder / "dataset.json").write_text(json.dumps({"format": 1, "resolution": 64}))
    refused(folder, r"has the resolution 64, but \[height, width\] is expected")
    (folder / "dataset.json").unlink()
    refused(folder, "has no dataset.json, but the folder of a finished curated set is expected")
    refused(folder, "has no dataset.json", load_pairs)
    refused(tmp_path / "absent", "has no dataset.json")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": " "}, "line 2 of .*train.jsonl has the prompt ' '"),
        ({"prompt": None}, "has the prompt None"),
        ({"prompt": "\ud83d"}, "a surrogate by itself"),
        ({"image": "images/ab/absent.png"}, "which is not there"),
        ({"image": "a" * 5000 + "/b.png"}, "which is not there"),
        ({"image": "a\0/b.png"}, "which is not there"),
        ({"image": "../outside.png"}, "a file inside the folder is expected"),
        ({"image": "/etc/outside.png"}, "a file inside the folder is expected"),
        ({"image": 3}, "a file inside the folder is expected"),
        ({"scores": {"aesthetic": "high"}}, "a finite number for each reward"),
        ({"scores": {"aesthetic": float("nan")}}, "a finite number for each reward"),
        ({"scores": [1]}, "an object is expected"),
        ({"metadata": "tag"}, "an object is expected"),
    ],
)
def test_wrong_lines(folder, change, message):
    lines = lines_of(folder)
    lines[1] |= change
    write_lines(folder / "train.jsonl", lines)
    refused(folder, message)


def test_wrong_pairs(folder):
    [pair] = lines_of(folder, "pairs")
    for change, message in (
        ({"chosen": pair["rejected"]}, "the same image as chosen and as rejected"),
        ({"rejected": "images/none.png"}, "which is not there"),
        ({"scores": {"chosen": {}}}, "has scores None"),
    ):
        write_lines(folder / "pairs.jsonl", [pair | change])
        refused(folder, message, load_pairs)
    (folder / "pairs.jsonl").write_text("no json\n")
    refused(folder, "but a JSON object is expected", load_pairs)
    write_lines(folder / "pairs.jsonl", [])
    refused(folder, "has an empty pairs.jsonl", load_pairs)
    (folder / "pairs.jsonl").unlink()
    refused(folder, "curate with --pairs", load_pairs)
