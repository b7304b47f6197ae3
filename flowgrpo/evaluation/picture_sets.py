"""Pictures that another system made: a folder in GenEval's layout, or a JSONL file -> scores.

    GenEval's layout                     JSONL: an object a line
    DIR/00000/metadata.jsonl             {"prompt": text, "image": path of a file, ...}
    DIR/00000/samples/0000.png ...
    DIR/00000/grid.png    not read       in DIR/metadata.jsonl, or a file of any name

A folder's metadata.jsonl holds one object with a `prompt`. In JSONL `image` may be called `file` or
`file_name`, `prompt` may be called `caption` or `text`, and a path is relative to the JSONL file.
What else an object has goes to the rewards as metadata; what it has under `metadata` does too.

Pictures may differ in size. They are scored in batches of one size, and read again for each batch,
so that memory holds one batch.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo import rewards
from flowgrpo.config import ConfigError
from flowgrpo.config.validation import path_text, require
from flowgrpo.prompts.hub import COLUMNS as TEXTS
from flowgrpo.prompts.load import LINES_OF_JSON, check_unicode
from flowgrpo.records import Prompts, without_nulls
from flowgrpo.rewards.images import from_file

GENEVAL, JSONL = "GenEval's layout", "JSONL"
METADATA, SAMPLES = "metadata.jsonl", "samples"
FILES = ("image", "file", "file_name")
"""Keys of a JSONL object that may hold the picture's path."""
NO_PICTURES = (".json", ".jsonl", ".txt", ".md", ".csv", ".db", ".html", ".npy", ".safetensors")
"""Endings of files in a samples folder that are no pictures."""
NAMED = 8
"""Pictures that a message names, at most."""

OnProgress = Callable[[str, int], None]
"""Progress: f("reading" or "batches", pictures so far)."""


@dataclass(frozen=True)
class Unreadable:
    """A picture that cannot be read, or a prompt that has none."""

    path: str
    """Relative to the source."""
    reason: str


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one source, with the prompt of each."""

    source: Path
    layout: str
    """GENEVAL or JSONL."""
    files: tuple[Path, ...]
    """M pictures."""
    prompts: Prompts
    """M entries; pictures of one text have one index."""
    sizes: tuple[tuple[int, int], ...] = ()
    """(height, width) of each picture; empty until they were read."""
    without: tuple[Unreadable, ...] = ()
    """Prompts without a picture; after `read` also the pictures that were left out."""

    def __len__(self) -> int:
        return len(self.files)

    def take(self, rows: Sequence[int]) -> PictureSet:
        """Choose pictures by their position here."""
        return replace(
            self, files=tuple(self.files[row] for row in rows), prompts=self.prompts.take(rows)
        )


def one_index_a_text(prompts: Prompts) -> Prompts:
    """Give equal texts one index, so that an interval takes them for one prompt."""
    numbers: dict[str, int] = {}
    indices = [numbers.setdefault(text, len(numbers)) for text in prompts.texts]
    return Prompts(prompts.texts, prompts.metadata, torch.tensor(indices, dtype=torch.int64))


def find_pictures(source: Path, argument: str = "--images") -> PictureSet:
    """List the pictures of `source` with their prompts; no picture is opened.

    argument: what `source` was given by, for messages.

    Raises:
        ConfigError: `source` has neither layout, or metadata that cannot be used.
    """
    source = Path(source)
    if source.is_file():
        require(
            source.suffix.lower() in LINES_OF_JSON,
            f"{argument} is {str(source)!r}, a file that ends in {source.suffix or 'nothing'}, but "
            f"a folder, or a file in {', '.join(LINES_OF_JSON)}, is expected; name one.",
        )
        return _jsonl(source, source)
    require(
        source.is_dir(),
        f"{argument} is {str(source)!r}, which does not exist, but a folder of pictures or a JSONL "
        "file is expected; correct the path.",
    )
    if (source / METADATA).is_file():
        return _jsonl(source, source / METADATA)
    folders = sorted(
        (path for path in source.iterdir() if path.is_dir() and not path.name.startswith(".")),
        key=lambda path: path.name,
    )
    entries = [p for p in folders if (p / METADATA).is_file() or (p / SAMPLES).is_dir()]
    require(
        bool(entries),
        f"{argument} is {str(source)!r}, which has neither GenEval's layout (00000/{METADATA} "
        f"beside 00000/{SAMPLES}/) nor a {METADATA} of prompts and files, but one of these is "
        "expected; see docs/evaluation.md.",
    )
    return _geneval(source, entries)


def _geneval(source: Path, folders: Iterable[Path]) -> PictureSet:
    files, texts, metadata, without = [], [], [], []
    for folder in folders:
        entry = _entry_of_folder(folder)
        pictures = _samples(folder / SAMPLES)
        if not pictures:
            without.append(Unreadable(f"{folder.name}/{SAMPLES}", "it has no picture"))
        files += pictures
        texts += [entry["prompt"]] * len(pictures)
        metadata += [entry] * len(pictures)
    prompts = one_index_a_text(Prompts.of(texts, metadata))
    return PictureSet(source, GENEVAL, tuple(files), prompts, without=tuple(without))


def _samples(folder: Path) -> list[Path]:
    """List the pictures of one prompt; any other file counts, to be named when it is no picture."""
    if not folder.is_dir():
        return []
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix.lower() not in NO_PICTURES
        and not path.name.lower().startswith((".", "grid"))
    )


def _entry_of_folder(folder: Path) -> dict[str, Any]:
    """Read the one object of a folder's metadata.jsonl."""
    path = folder / METADATA
    require(
        path.is_file(),
        f"the folder {folder} has {SAMPLES}/ but no {METADATA}, and one with the prompt is "
        "expected; write it, or remove the folder.",
    )
    entries = [entry for _, entry in _objects(path)]
    require(
        len(entries) == 1,
        f"{path} has {len(entries)} objects, but one is expected, that of the folder's prompt; "
        "correct it.",
    )
    return entries[0]


def _jsonl(source: Path, path: Path) -> PictureSet:
    files, texts, metadata = [], [], []
    for number, entry in _objects(path):
        names = [key for key in FILES if isinstance(entry.get(key), str) and entry[key]]
        require(
            bool(names),
            f"line {number} of {path} names no picture, but its path is expected under "
            f"{', '.join(FILES[:-1])} or {FILES[-1]}; add it.",
        )
        files.append(path.parent / path_text(entry[names[0]]))
        texts.append(entry["prompt"])
        metadata.append({key: value for key, value in entry.items() if key not in FILES})
    return PictureSet(source, JSONL, tuple(files), one_index_a_text(Prompts.of(texts, metadata)))


def _objects(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read (line number, object with a `prompt`) of each line that is not empty.

    Raises:
        ConfigError: the file is no UTF-8, or a line is no object with a text.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path} cannot be read as UTF-8 text ({error}), but JSON with a prompt is expected; "
            "convert it."
        ) from error
    entries = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            # Nulls go here, where too deep a nesting is still an error of the line.
            entry = without_nulls(json.loads(line))
        # Also a number of more digits than Python reads, and brackets in thousands.
        except (ValueError, RecursionError):
            entry = None
        values = dict(entry) if isinstance(entry, dict) else {}
        inner = values.pop("metadata", None)
        values = {**(inner if isinstance(inner, dict) else {}), **values}
        keys = [k for k in TEXTS if isinstance(values.get(k), str) and values[k].strip()]
        require(
            bool(keys),
            f"line {number} of {path} is {line[:60]!r}, but a JSON object with a string 'prompt' "
            "that is not empty is expected; correct the line.",
        )
        check_unicode(values, f"line {number} of {path}")
        entries.append((number, {**values, "prompt": values[keys[0]]}))
    return entries


def read(pictures: PictureSet, skip: bool, on_progress: OnProgress | None = None) -> PictureSet:
    """Read all pictures once: their sizes, and which of them cannot be read.

    Args:
        skip: leave these out, and the prompts without a picture; they are in `without`.

    Raises:
        ConfigError: some cannot be read, or prompts have no picture, and `skip` is false; or none
            is left.
    """
    rows, sizes, unreadable = [], [], list(pictures.without)
    for row, path in enumerate(pictures.files):
        try:
            image = from_file(path)
        except ValueError as error:
            unreadable.append(Unreadable(_relative(path, pictures.source), str(error)))
        else:
            rows.append(row)
            sizes.append((image.shape[1], image.shape[2]))
        if on_progress is not None:
            on_progress("reading", row + 1)
    count = len(pictures) + len(pictures.without)
    require(
        skip or not unreadable,
        f"{len(unreadable)} of {count} pictures in {pictures.source} cannot be read "
        f"({named(unreadable)}), but all are expected to be whole; mend them, or leave them out by "
        "--skip-unreadable.",
    )
    require(
        bool(rows),
        f"none of the {count} pictures in {pictures.source} can be read ({named(unreadable)}), but "
        "at least one is expected; mend them.",
    )
    return replace(pictures.take(rows), sizes=tuple(sizes), without=tuple(unreadable))


def named(unreadable: Sequence[Unreadable]) -> str:
    """Write paths and reasons in one line, of `NAMED` at most."""
    texts = [f"{entry.path}: {entry.reason}" for entry in unreadable[:NAMED]]
    more = len(unreadable) - NAMED
    return "; ".join(texts) + (f"; and {more} more" if more > 0 else "") or "there is none"


def _relative(path: Path, source: Path) -> str:
    folder = source if source.is_dir() else source.parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def batches(sizes: Sequence[tuple[int, int]], count: int) -> list[list[int]]:
    """Sort pictures into batches of one size and at most `count`, in their order within a size."""
    rows_of: dict[tuple[int, int], list[int]] = {}
    for row, size in enumerate(sizes):
        rows_of.setdefault(size, []).append(row)
    return [
        rows[start : start + count]
        for rows in rows_of.values()
        for start in range(0, len(rows), count)
    ]


def score(
    pictures: PictureSet,
    scorer: rewards.Scorer,
    batch_size: int,
    on_progress: OnProgress | None = None,
) -> dict[str, Tensor]:
    """Score pictures that were `read`: reward -> float64 [M], NaN where it failed.

    Raises:
        ConfigError: a picture has changed since it was read.
        RewardError: a reward returned a wrong number of scores, or failed for all pictures.
    """
    scores = {
        name: torch.full((len(pictures),), torch.nan, dtype=torch.float64)
        for name in scorer.weights
    }
    scored = 0
    for rows in batches(pictures.sizes, batch_size):
        images = torch.stack([_again(pictures, row) for row in rows])
        for name, values in scorer.score_each(images, pictures.prompts.take(rows), 1).items():
            scores[name][rows] = values
        scored += len(rows)
        if on_progress is not None:
            on_progress("batches", scored)
    return scorer.combine(scores, 1).rewards


def _again(pictures: PictureSet, row: int) -> Tensor:
    """Read a picture for the second time."""
    path, size = pictures.files[row], pictures.sizes[row]
    try:
        image = from_file(path)
    except ValueError as error:
        raise ConfigError(
            f"the picture {path} could be read before and cannot be now ({error}), but pictures "
            "are expected to stay as they are; start again."
        ) from error
    require(
        image.shape[1:] == size,
        f"the picture {path} had {size[1]} x {size[0]} pixels and has {image.shape[2]} x "
        f"{image.shape[1]} now, but pictures are expected to stay as they are; start again.",
    )
    return image


def sizes_of(pictures: PictureSet) -> dict[str, int]:
    """Count the pictures of each size, as width x height."""
    return dict(Counter(f"{width}x{height}" for height, width in pictures.sizes))
