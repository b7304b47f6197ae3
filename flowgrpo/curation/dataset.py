"""A curated set, as ``flowgrpo curate`` writes it and supervised objectives read it.

    dataset.json      format, resolution, rewards, thresholds, counts, sources; written last
    train.jsonl       a line an image: {"prompt": ..., "image": "images/ab/<sha256>.png",
                      "scores": {reward: score}, "source": ..., "size": [width, height]} and
                      "metadata" where the source has some; validation.jsonl, test.jsonl likewise
    pairs.jsonl       optional, a line a pair of the training split: {"prompt": ..., "chosen":
                      image, "rejected": image, "scores": {"chosen": {...}, "rejected": {...}}}
    images/           PNG files, all of one size, named by the SHA-256 of their RGB bytes

The name of an image is its content, so lines alone make the fingerprint of a set, and an image that
is not what it was is seen when it is read.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import path_text, require
from flowgrpo.prompts.load import check_unicode
from flowgrpo.records import Prompts, without_nulls
from flowgrpo.rewards.images import from_pil

FORMAT = 1
FILE = "dataset.json"
"""The file that says that a set is finished."""
SPLITS = ("train", "validation", "test")
PAIRS = "pairs.jsonl"
CONTENT_NAME = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class CuratedSet:
    """N images of one split with their prompts and scores."""

    folder: Path
    split: str
    resolution: tuple[int, int]
    """Height and width of the images, in pixels."""
    rewards: tuple[str, ...]
    """Rewards that scored the set."""
    texts: tuple[str, ...]
    """N prompts."""
    paths: tuple[Path, ...]
    """N PNG files."""
    scores: tuple[dict[str, float], ...]
    """N times reward -> score."""
    metadata: tuple[dict[str, Any], ...]
    """N dicts for the rewards, as those of a prompt set; empty where the source had none."""
    sources: tuple[str, ...]
    """N times the name of the source and of the image in it."""
    sizes: tuple[tuple[int, int], ...]
    """N times the width and height that the image had in its source."""

    @classmethod
    def load(cls, folder: str | Path, split: str = "train") -> CuratedSet:
        """Load a split of the curated set in `folder`; pictures are read by `images`.

        Raises:
            ConfigError: the folder holds no finished set, or the split has no images; or a line is
                wrong, or names a file that is not there.
        """
        folder = Path(path_text(folder))
        about = read_about(folder)
        require(
            split in SPLITS,
            f"the split of the curated set {folder} is {split!r}, but one of {', '.join(SPLITS)} "
            "is expected; name one.",
        )
        rows = list(read_lines(folder, split))
        require(
            bool(rows),
            f"the curated set {folder} has no images in {split}.jsonl, but at least one is "
            "expected; choose another split, or curate with other shares or thresholds.",
        )
        entries = [entry for _, entry in rows]
        return cls(
            folder,
            split,
            tuple(about["resolution"]),
            tuple(about.get("rewards", ())),
            texts=tuple(entry["prompt"] for entry in entries),
            paths=tuple(path for path, _ in rows),
            scores=tuple(entry["scores"] for entry in entries),
            metadata=tuple(entry["metadata"] for entry in entries),
            sources=tuple(entry["source"] for entry in entries),
            sizes=tuple(entry["size"] for entry in entries),
        )

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def prompts(self) -> Prompts:
        """Texts and metadata of the images, a prompt an image."""
        return Prompts.of(self.texts, self.metadata)

    def images(self, index: Sequence[int]) -> Tensor:
        """Read the images at the positions `index`, uint8 [len(index), 3, H, W]."""
        return read_images([self.paths[int(i)] for i in index], self.resolution)


@dataclass(frozen=True)
class Pairs:
    """N pairs of images of one prompt each, the chosen one better by the weighted score."""

    folder: Path
    resolution: tuple[int, int]
    """Height and width of the images, in pixels."""
    texts: tuple[str, ...]
    """N prompts."""
    chosen: tuple[Path, ...]
    """N PNG files."""
    rejected: tuple[Path, ...]
    """N PNG files."""
    scores: tuple[dict[str, dict[str, float]], ...]
    """N times {"chosen": {reward: score}, "rejected": {...}}."""

    def __len__(self) -> int:
        return len(self.texts)

    def images(self, index: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Read the chosen and the rejected images at `index`, uint8 [len(index), 3, H, W] each."""
        numbers = [int(i) for i in index]
        chosen, rejected = (
            read_images([paths[i] for i in numbers], self.resolution)
            for paths in (self.chosen, self.rejected)
        )
        return chosen, rejected


def read_lines(folder: Path, split: str) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Iterate over the images of a split: the picture's file and its line, all keys filled in.

    Raises:
        ConfigError: a line is wrong, or names a file that is not there.
    """
    files = _Files(folder)
    for line, entry in _entries(folder / f"{split}.jsonl"):
        size = entry.get("size", [])
        require(
            isinstance(size, list) and all(isinstance(n, int) for n in size),
            f"{line} has the size {size!r}, but [width, height] is expected; restore the line.",
        )
        yield (
            files.path(line, entry, "image"),
            {
                "prompt": _text(line, entry),
                "scores": _scores(line, entry.get("scores")),
                "metadata": without_nulls(_object(line, entry.get("metadata", {}), "metadata")),
                "source": str(entry.get("source", "")),
                "size": tuple(size),
            },
        )


def load_pairs(folder: str | Path) -> Pairs:
    """Load the pairs of the curated set in `folder`.

    Raises:
        ConfigError: the folder holds no finished set, or one without pairs; or a line is wrong,
            names a file that is not there, or the same image twice.
    """
    folder = Path(path_text(folder))
    about = read_about(folder)
    file, files = folder / PAIRS, _Files(folder)
    require(
        file.is_file(),
        f"the curated set {folder} has no {PAIRS}, but pairs of a better and a worse image are "
        "expected; curate with --pairs a source that has several images of a prompt.",
    )
    texts, chosen, rejected, scores = [], [], [], []
    for line, entry in _entries(file):
        texts.append(_text(line, entry))
        chosen.append(files.path(line, entry, "chosen"))
        rejected.append(files.path(line, entry, "rejected"))
        require(
            chosen[-1] != rejected[-1],
            f"{line} has the same image as chosen and as rejected, but two different ones are "
            "expected; remove the line.",
        )
        both = _object(line, entry.get("scores"), "scores")
        scores.append({name: _scores(line, both.get(name)) for name in ("chosen", "rejected")})
    require(
        bool(texts),
        f"the curated set {folder} has an empty {PAIRS}, but at least one pair is expected; curate "
        "with a smaller --pair-gap, or a source that has several images of a prompt.",
    )
    return Pairs(folder, tuple(about["resolution"]), *map(tuple, (texts, chosen, rejected, scores)))


def fingerprint(records: CuratedSet | Pairs) -> str:
    """SHA-256 of prompts, images, scores and metadata, in their order; the folder does not count.

    For content.json of a run, beside that of the prompts (`flowgrpo.prompts.load.fingerprint`).
    """
    if isinstance(records, CuratedSet):
        columns = (records.texts, _names(records.paths), records.scores, records.metadata)
    else:
        names = _names(records.chosen), _names(records.rejected)
        columns = (records.texts, *names, records.scores)
    digest = hashlib.sha256(json.dumps(list(records.resolution)).encode() + b"\n")
    for row in zip(*columns, strict=True):
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def content_of(records: CuratedSet | Pairs) -> dict[str, Any]:
    """Describe a curated set as content.json describes prompts: their count and fingerprint."""
    return {"count": len(records), "sha256": fingerprint(records)}


def read_about(folder: Path) -> dict[str, Any]:
    """Read dataset.json of a curated set.

    Raises:
        ConfigError: it is missing, so that the set is not finished; or it is none of this format.
    """
    path = folder / FILE
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            f"{folder} has no {FILE}, but the folder of a finished curated set is expected; name "
            "one that `flowgrpo curate` wrote, or repeat that command until it ends."
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), but the description of a curated set is expected; "
            "restore it, or curate again."
        ) from error
    version = about.get("format") if isinstance(about, dict) else None
    require(
        version == FORMAT,
        f"{path} has the format {version!r}, but {FORMAT} is expected; curate again with this "
        "version of flowgrpo.",
    )
    size = about.get("resolution")
    require(
        isinstance(size, list) and len(size) == 2 and all(isinstance(n, int) for n in size),
        f"{path} has the resolution {size!r}, but [height, width] is expected; restore it.",
    )
    return about


def read_image(path: str | Path) -> Tensor:
    """Read an image of a curated set, uint8 [3, H, W].

    Raises:
        ConfigError: it cannot be read, or its content is not what its name says.
    """
    path = Path(path)
    try:
        with Image.open(path) as picture:
            image = from_pil(picture)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"the picture {path} cannot be read ({error}), but a PNG file of a curated set is "
            "expected; restore it, or curate again."
        ) from error
    require(
        not CONTENT_NAME.fullmatch(path.stem) or content_hash(image) == path.stem,
        f"the picture {path} is not what it was when it was curated, because its name is the "
        "SHA-256 of its content then; restore it, or curate again.",
    )
    return image


def read_images(paths: Sequence[Path], resolution: tuple[int, int]) -> Tensor:
    """Read images that all have height and width `resolution`, uint8 [N, 3, H, W]."""
    images = [read_image(path) for path in paths]
    for path, image in zip(paths, images, strict=True):
        require(
            tuple(image.shape[1:]) == tuple(resolution),
            f"the picture {path} has {image.shape[2]} x {image.shape[1]} pixels, but "
            f"{resolution[1]} x {resolution[0]} is the size of this set; curate again.",
        )
    if not images:
        return torch.empty((0, 3, *resolution), dtype=torch.uint8)
    return torch.stack(images)


def content_hash(image: Tensor) -> str:
    """SHA-256 of an image's RGB bytes, row by row; uint8 [3, H, W]."""
    return hashlib.sha256(image.permute(1, 2, 0).contiguous().numpy()).hexdigest()


def image_name(digest: str) -> str:
    """Name of the image with this content hash, relative to the folder of its set."""
    return f"images/{digest[:2]}/{digest}.png"


def _names(paths: Sequence[Path]) -> list[str]:
    return [path.name for path in paths]


class _Files:
    """The files of a set's folder; each subfolder is listed once, which is faster than a look at
    every file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._names: dict[Path, set[str]] = {}

    def path(self, line: str, entry: dict[str, Any], key: str) -> Path:
        """Find the file that `entry[key]` names, or raise ConfigError."""
        name = entry.get(key)
        relative = isinstance(name, str) and name and ".." not in Path(name).parts
        require(
            bool(relative) and not Path(name).is_absolute(),
            f"{line} has {key} {name!r}, but the path of a file inside the folder is expected; "
            "restore the line.",
        )
        path = self.folder / name
        if path.parent not in self._names:
            try:
                names = {file.name for file in path.parent.iterdir()}
            # A name may be one that no file can have.
            except (OSError, ValueError):
                names = set()
            self._names[path.parent] = names
        require(
            path.name in self._names[path.parent],
            f"{line} names the picture {name}, which is not there; restore it, or curate again.",
        )
        return path


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read a JSONL file: its lines' names, for messages, and their objects."""
    try:
        with open(file, encoding="utf-8") as lines:
            for number, text in enumerate(lines, start=1):
                line = f"line {number} of {file}"
                try:
                    entry = json.loads(text)
                except (ValueError, RecursionError):
                    entry = None
                require(
                    isinstance(entry, dict),
                    f"{line} is {text[:60]!r}, but a JSON object is expected; restore it, or "
                    "curate again.",
                )
                check_unicode(entry, line)
                yield line, entry
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}), but a file of a curated set is expected; restore "
            "it, or curate again."
        ) from error


def _text(line: str, entry: dict[str, Any]) -> str:
    text = entry.get("prompt")
    require(
        isinstance(text, str) and bool(text.strip()),
        f"{line} has the prompt {text!r}, but a text that is not empty is expected; restore it.",
    )
    return text


def _scores(line: str, values: Any) -> dict[str, float]:
    scores = _object(line, values, "scores")
    numbers = all(
        isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score)
        for score in scores.values()
    )
    require(
        numbers,
        f"{line} has the scores {scores!r}, but a finite number for each reward is expected; "
        "restore the line.",
    )
    return {name: float(score) for name, score in scores.items()}


def _object(line: str, value: Any, key: str) -> dict[str, Any]:
    require(
        isinstance(value, dict),
        f"{line} has {key} {value!r}, but an object is expected; restore the line.",
    )
    return value
