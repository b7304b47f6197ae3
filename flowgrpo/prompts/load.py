"""Prompt sets: texts with metadata, from the package, files or the Hugging Face Hub.

A set is "nano" or "nano_text" (of the embedded models), one of those in prompts/sets, a text file
with one prompt a line, a JSONL file (.jsonl, .ndjson, .jsonlines) with an object {"prompt": ...,
anything the reward needs} a line, for a model that edits with {"image": path of a picture, relative
to the file} in it, or a folder with train and test files of either kind, as
flow_grpo's data sets have: train.txt or train_metadata.jsonl, test.txt or test_metadata.jsonl; or
"hub:OWNER/NAME", a data set on the Hugging Face Hub (hub.py).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import path_text, require, shown
from flowgrpo.prompts import hub, sets
from flowgrpo.prompts.pictures import check_picture, content_of
from flowgrpo.records import Prompts, without_nulls

HELD_OUT = ("heldout", "test")
"""Names of the split that training does not see."""

EMBEDDED = {"nano": "flowgrpo.nano.prompts", "nano_text": "flowgrpo.nano.text.prompts"}
"""Set of an embedded model -> its module."""

ANY = "any"
"""Split for prompts that are only evaluated: the held-out one, or train where there is no other."""

LINES_OF_JSON = (".jsonl", ".ndjson", ".jsonlines")
"""Files with one JSON object a line."""

TABLES = (
    *(".json", ".csv", ".tsv", ".yaml", ".yml", ".toml", ".xml", ".html"),
    *(".parquet", ".arrow", ".xlsx", ".gz", ".zip", ".zst", ".tar", ".pkl", ".npy", ".npz"),
)
"""Files whose lines would be taken for prompts, or that have none."""


def load_prompts(
    name: str | Path, split: str = "train", argument: str = "sample.prompts"
) -> Prompts:
    """Load a split of a prompt set. A single file is the same in every split.

    argument: what `name` was given by, for messages.
    """
    name = path_text(name)
    require(bool(name), f"{argument} is empty, but a prompt set is expected; name one.")
    if name in EMBEDDED:
        embedded = importlib.import_module(EMBEDDED[name])
        return embedded.split("heldout" if split == ANY else split)
    require(
        split in ("train", ANY, *HELD_OUT),
        f"the split is {split!r}, but one of train, {', '.join(HELD_OUT)} is expected; name one.",
    )
    if name.startswith(hub.PREFIX):
        texts, metadata = hub.load(name, split, argument)
        check_unicode(metadata, f"the data set {name}")
        return Prompts.of(texts, metadata)
    path = sets.folder(name) if name in sets.NAMES else Path(name)
    if _is_folder(path, argument):
        path = _file_of_split(path, split)
    if not os.path.isfile(path):
        names = ", ".join((*EMBEDDED, *sets.NAMES))
        raise ConfigError(
            f"{argument} is {name!r}, which is neither one of {names} "
            "nor an existing file or folder; name a text file with one prompt a line, a JSONL "
            "file, a folder with both splits, or hub:OWNER/NAME."
        )
    kind = path.suffix.lower()
    require(
        kind not in TABLES,
        f"{argument} is {name!r}, a {kind} file, whose lines are no prompts; write a text file "
        "with one prompt a line, or a JSONL file, or put a table in a folder train (and test) of "
        "its own and name the folder above as hub:FOLDER.",
    )
    prompts = _read_jsonl(path) if kind in LINES_OF_JSON else _read_text(path)
    if not prompts.texts:
        raise ConfigError(f"the prompt file {path} has no prompts; write one a line.")
    return prompts


def has_splits(name: str | Path) -> bool:
    """Tell whether training does not see all of the set: a single file has no splits."""
    name = path_text(name)
    return name in (*EMBEDDED, *sets.NAMES) or name.startswith(hub.PREFIX) or _is_folder(Path(name))


def _is_folder(path: Path, argument: str = "sample.prompts") -> bool:
    try:
        return path.is_dir()
    # A name that is too long, or a folder that may not be looked into.
    except OSError as error:
        raise ConfigError(
            f"{argument} is {shown(str(path))}, which cannot be looked up ({error.strerror}); "
            "name another file or folder, or change its permissions."
        ) from error


def fingerprint(prompts: Prompts) -> str:
    """SHA-256 of the texts and metadata, in their order.

    A key whose value is None counts as absent, and an image that is edited by its file's content,
    wherever it lies.
    """
    digest, images = hashlib.sha256(), prompts.images or (None,) * len(prompts)
    for text, metadata, image in zip(prompts.texts, prompts.metadata, images, strict=True):
        values = {name: value for name, value in metadata.items() if value is not None}
        if image is not None:
            values["image"] = content_of(image)
        # What is no JSON, such as a date of a data set, counts by its text.
        entry = json.dumps([text, values], sort_keys=True, default=str)
        digest.update(entry.encode() + b"\n")
    return digest.hexdigest()


def _file_of_split(folder: Path, split: str) -> Path:
    stems = {"train": ("train",), ANY: ("test", "train")}.get(split, ("test",))
    suffixes = (*(f"_metadata{kind}" for kind in LINES_OF_JSON), *LINES_OF_JSON, ".txt")
    names = [stem + suffix for stem in stems for suffix in suffixes]
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
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        # Files that were joined have more than one.
        return [line.removeprefix("\ufeff") for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the prompt file {path} cannot be read as UTF-8 text ({error}); convert it."
        ) from error


def check_unicode(value: Any, source: str) -> None:
    """Raise unless all text in a JSON value can be encoded; `source` says where it stands.

    A surrogate by itself, as "\\ud83d" in JSON or a byte that is no UTF-8 on a command line, is
    text to Python alone: no tokenizer, file or server takes it.
    """
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values += [*value, *value.values()]
        elif isinstance(value, list | tuple):
            values += value
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise ConfigError(
                    f"{source} has {value[error.start]!a} in {value[:60]!a}, but text in Unicode "
                    "is expected, in which a surrogate by itself is no character; correct it."
                ) from error


def _read_text(path: Path) -> Prompts:
    texts = [line.strip() for line in _lines(path) if line.strip()]
    if texts and _object(texts[0]) is not None:
        raise ConfigError(
            f"the first line of {path} is {texts[0][:60]!r}, a JSON object, but a text file with "
            "one prompt a line is expected; name the file .jsonl."
        )
    if texts and texts[0][0] in "[{" and _is_json("\n".join(texts)):
        raise ConfigError(
            f"{path} is JSON as a whole, but a text file with one prompt a line is expected; write "
            "one, or a JSONL file with an object a line."
        )
    return Prompts.of(texts)


def _is_json(text: str) -> bool:
    """Tell whether `text` is a list or an object of JSON."""
    try:
        return isinstance(json.loads(text), list | dict)
    except (ValueError, RecursionError):
        return False


def _object(line: str) -> dict[str, Any] | None:
    """Read a line of JSON; None for anything but an object."""
    try:
        # Nulls go here, where too deep a nesting is still an error of the line.
        entry = without_nulls(json.loads(line))
    # Also a number of more digits than Python reads, and brackets in thousands.
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None


def _read_jsonl(path: Path) -> Prompts:
    texts, metadata, images = [], [], []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        entry = _object(line)
        text = None if entry is None else entry.get("prompt")
        if not isinstance(text, str) or not text.strip():
            raise ConfigError(
                f"line {number} of {path} is {line[:60]!r}, but a JSON object with a string "
                "'prompt' that is not empty is expected; correct the line."
            )
        check_unicode(entry, f"line {number} of {path}")
        image = entry.get("image")
        if image is not None:
            # The rewards get it among the metadata.
            image = entry["image"] = _image(image, path, f"line {number} of {path}")
        texts.append(entry["prompt"])
        metadata.append(entry)
        images.append(image)
    return Prompts.of(texts, metadata, images)


def _image(name: Any, path: Path, line: str) -> str:
    """Find the picture that a line of the file `path` has as its image."""
    require(
        isinstance(name, str) and name.strip() != "",
        f"{line} has {shown(name)} as its image, but the path of a picture, relative to the file, "
        "is expected; correct it, or leave image out.",
    )
    picture = os.path.abspath(os.path.join(path.parent, path_text(name)))
    check_picture(picture, f"the image of {line}")
    return picture
