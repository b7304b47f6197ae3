"""Prompt sets -> K prompts x G samples, each sample with its own seeds.

A set is "nano" (the embedded one), one of those in prompts/sets, a text file with one prompt a
line, a JSONL file with an object {"prompt": ..., anything the reward needs} a line, or a folder
with train and test files of either kind, as flow_grpo's data sets have: train.txt or
train_metadata.jsonl, test.txt or test_metadata.jsonl; or "hub:OWNER/NAME", a data set on the
Hugging Face Hub (hub.py).
"""

from __future__ import annotations

import json
from pathlib import Path

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import require, shown
from flowgrpo.prompts import hub, sets
from flowgrpo.records import Prompts

HELD_OUT = ("heldout", "test")
"""Names of the split that training does not see."""

TABLES = (".json", ".csv", ".tsv")
"""Files of text whose lines would be taken for prompts."""


def load_prompts(name: str, split: str = "train") -> Prompts:
    """Load a split of a prompt set. A single file is the same in every split."""
    if name == "nano":
        from flowgrpo.nano import prompts as nano_prompts

        return nano_prompts.split(split)
    require(
        split in ("train", *HELD_OUT),
        f"the split is {split!r}, but one of train, {', '.join(HELD_OUT)} is expected; name one.",
    )
    if name.startswith(hub.PREFIX):
        return Prompts.of(*hub.load(name, split))
    path = sets.folder(name) if name in sets.NAMES else Path(name)
    if _is_folder(path):
        path = _file_of_split(path, split)
    if not path.is_file():
        raise ConfigError(
            f"sample.prompts is {name!r}, which is neither one of nano, {', '.join(sets.NAMES)} "
            "nor an existing file or folder; name a text file with one prompt a line, a JSONL "
            "file, a folder with both splits, or hub:OWNER/NAME."
        )
    kind = path.suffix.lower()
    require(
        kind not in TABLES,
        f"sample.prompts is {name!r}, a {kind} file, whose lines are no prompts; write a text file "
        "with one prompt a line, or a JSONL file.",
    )
    prompts = _read_jsonl(path) if kind == ".jsonl" else _read_text(path)
    if not prompts.texts:
        raise ConfigError(f"the prompt file {path} has no prompts; write one a line.")
    return prompts


def has_splits(name: str) -> bool:
    """Tell whether training does not see all of the set: a single file has no splits."""
    return name in ("nano", *sets.NAMES) or name.startswith(hub.PREFIX) or _is_folder(Path(name))


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    # A name that is too long, or a folder that may not be looked into.
    except OSError as error:
        raise ConfigError(
            f"sample.prompts is {shown(str(path))}, which cannot be looked up ({error.strerror}); "
            "name another file or folder, or change its permissions."
        ) from error


def _file_of_split(folder: Path, split: str) -> Path:
    stem = "train" if split == "train" else "test"
    names = (f"{stem}_metadata.jsonl", f"{stem}.jsonl", f"{stem}.txt")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(
        f"the prompt folder {folder} has no file for the split {split!r}; put one of "
        f"{', '.join(names)} there."
    )


def _lines(path: Path) -> list[str]:
    try:
        # utf-8-sig: a byte order mark is no part of the first prompt. Not splitlines: it also
        # splits at separators that may stand inside a JSON string.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the prompt file {path} cannot be read as UTF-8 text ({error}); convert it."
        ) from error


def _read_text(path: Path) -> Prompts:
    return Prompts.of([line.strip() for line in _lines(path) if line.strip()])


def _read_jsonl(path: Path) -> Prompts:
    texts, metadata = [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        # A number of thousands of digits is a ValueError, a nesting of thousands a RecursionError.
        except (ValueError, RecursionError):
            entry = None
        text = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"line {number} of {path} is {line[:60]!r}, but a JSON object with a string "
                "'prompt' that is not empty is expected; correct the line."
            )
        texts.append(entry["prompt"])
        metadata.append(entry)
    return Prompts.of(texts, metadata)
