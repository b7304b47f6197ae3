"""Sources of image-text pairs: one iterator of `Sample` for each kind, in an order that stays.

    FOLDER                pictures, in subfolders too, each with its caption in a .txt file beside
                          it; or metadata.jsonl or captions.jsonl with {"file_name": ..., "text":
                          ..., other keys} a line, as Hugging Face's imagefolder has it
    NAME.tar, FOLDER      webdataset shards, by the library webdataset (extra `data`): braces as in
                          shards/{0000..0099}.tar, or a folder of shards
    hub:OWNER/NAME        a data set of the Hugging Face Hub, by the library datasets (extra
                          `data`), streamed; a folder in place of OWNER/NAME is read in the same way
    FOLDER                a curated set: its pictures keep their source and size, and scores by the
                          same rewards are taken over

The caption is under `prompt`, `caption` or `text`, the first there is; of a list of captions the
first one counts. Other values that JSON can
hold become metadata, so a set in GenEval's form works with the reward geneval. A picture is read
when it is its turn, so a source of any length takes the same memory.
"""

from __future__ import annotations

import functools
import importlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import path_text, require
from flowgrpo.curation import dataset
from flowgrpo.curation.options import CurateOptions, without_services
from flowgrpo.prompts.hub import COLUMNS, PREFIX
from flowgrpo.prompts.load import check_unicode
from flowgrpo.records import without_nulls
from flowgrpo.rewards.images import to_pil

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jp2", ".avif")
"""Endings of the files that are taken for pictures."""
LISTS = ("metadata.jsonl", "captions.jsonl")
"""Files of a folder with a caption a line."""
SHARDS = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Sample:
    """A picture of a source that has not been read yet, with its caption."""

    source: str
    """Name of the source, and of the picture in it."""
    prompt: str | None
    """The caption; None if there is none."""
    open: Callable[[], Image.Image] = field(repr=False)
    """Opens the picture; any error says that it cannot be read."""
    metadata: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    """Scores that are known already."""
    size: tuple[int, int] | None = None
    """Width and height of before, where the picture has been curated."""


def samples(name: str, options: CurateOptions, skip: int = 0) -> Iterator[Sample]:
    """Iterate over the source `name`, without its first `skip` samples.

    Raises:
        ConfigError: there is no such source, a library is missing, a caption is no text in Unicode,
            or the source has no picture at all.
    """
    kind = _kind(name)
    count = 0
    for sample in kind(name, options, skip):
        check_unicode([sample.prompt, sample.metadata], f"the caption of {sample.source}")
        count += 1
        yield sample
    if not count and not skip:
        raise ConfigError(
            f"the source {name!r} has no pictures, but at least one is expected: files that end in "
            f"{', '.join(PICTURES)}, shards that hold such, or a column of pictures; name another."
        )


def check(name: str) -> None:
    """Raise ConfigError unless there is a source of this name; what it holds is not looked at."""
    _kind(name)


def _kind(name: str) -> Callable[[str, CurateOptions, int], Iterator[Sample]]:
    """Choose the iterator of a source by its name and by what is there."""
    if name.startswith(PREFIX):
        return _hub
    if _is_shard(name):
        return _shards
    folder = Path(name)
    try:
        is_folder = folder.is_dir()
        names = {file.name for file in folder.iterdir()} if is_folder else set()
    except OSError as error:
        raise ConfigError(
            f"the source {name[:200]!r} cannot be looked up ({error.strerror}); name another, or "
            "change its permissions."
        ) from error
    require(
        is_folder,
        f"the source {name!r} is neither a folder nor a shard (.tar) nor hub:OWNER/NAME, but one "
        "of these is expected; check the name.",
    )
    if {dataset.FILE, "train.jsonl"} <= names:
        return _curated
    shards = sorted(filter(_is_shard, names))
    loose = sorted(n for n in names if n in LISTS or Path(n).suffix.lower() in PICTURES)
    require(
        not (shards and loose),
        f"the source {name!r} holds shards such as {shards[:1]} and pictures such as {loose[:1]}, "
        "but one of the two is expected; name the shards themselves, or move one of the two.",
    )
    return _shards if shards else _folder


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARDS)


def _folder(name: str, options: CurateOptions, skip: int) -> Iterator[Sample]:
    return islice(_walk(Path(name), options), skip, None)


def _walk(root: Path, options: CurateOptions) -> Iterator[Sample]:
    """Iterate over a folder: the lines of its lists, then pictures that no list names."""

    def fail(error: OSError) -> None:
        raise ConfigError(
            f"{error.filename} cannot be read ({error.strerror}), but a folder of pictures is "
            "expected; change its permissions, or name another source."
        ) from error

    listed: set[str] = set()
    for folder, folders, names in os.walk(root, onerror=fail):
        # The order of a file system is any.
        folders[:] = sorted(entry for entry in folders if not entry.startswith("."))
        here = Path(folder)
        for file in (here / entry for entry in LISTS if entry in names):
            for sample, path in _listed(file, root, options):
                listed.add(path)
                yield sample
        for entry in sorted(names):
            path = here / entry
            if entry.startswith(".") or path.suffix.lower() not in PICTURES:
                continue
            if os.path.normpath(path) not in listed:
                yield Sample(_name(root, path), _text_beside(path), _opener(path))


def _listed(file: Path, root: Path, options: CurateOptions) -> Iterator[tuple[Sample, str]]:
    """Iterate over the lines of metadata.jsonl or captions.jsonl, with the path of each picture."""
    for number, text in enumerate(_lines(file), start=1):
        if not text.strip():
            continue
        try:
            entry = without_nulls(json.loads(text))
        except (ValueError, RecursionError):
            entry = None
        name = entry.get("file_name") if isinstance(entry, dict) else None
        require(
            isinstance(name, str) and bool(name),
            f"line {number} of {file} is {text[:60]!r}, but a JSON object with the 'file_name' of "
            "a picture is expected; correct the line.",
        )
        path = file.parent / name
        prompt, metadata = _split_caption(entry, options.caption_column)
        del metadata["file_name"]
        sample = Sample(_name(root, path), prompt, _opener(path), metadata)
        yield sample, os.path.normpath(path)


def _lines(file: Path) -> Iterator[str]:
    """Read a file line by line, without a byte order mark."""
    try:
        with open(file, encoding="utf-8-sig", newline="\n") as lines:
            yield from lines
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{file} cannot be read as UTF-8 text ({error}), but captions are expected; convert it."
        ) from error


def _text_beside(path: Path) -> str | None:
    """Read the caption of a picture from the .txt file beside it; None if there is none."""
    file = path.with_suffix(".txt")
    return " ".join("".join(_lines(file)).split()) or None if file.is_file() else None


def _split_caption(
    entry: Mapping[str, Any], column: str | None
) -> tuple[str | None, dict[str, Any]]:
    """Take the caption out of a row: (caption or None, the other values)."""
    metadata = dict(entry)
    for name in (column,) if column else COLUMNS:
        value = metadata.get(name)
        if isinstance(value, list) and value:
            # Several captions of one picture.
            value = value[0]
        if isinstance(value, str):
            del metadata[name]
            return value.strip() or None, metadata
    return None, metadata


def _opener(path: Path) -> Callable[[], Image.Image]:
    return functools.partial(Image.open, path)


def _opener_of(content: bytes) -> Callable[[], Image.Image]:
    return lambda: Image.open(io.BytesIO(content))


def _name(root: Path, path: Path) -> str:
    """Name a picture by its source and its path there."""
    return f"{root}/{path.relative_to(root)}" if path.is_relative_to(root) else str(path)


def _shards(name: str, options: CurateOptions, skip: int) -> Iterator[Sample]:
    """Iterate over webdataset shards; the members of a sample share their name up to a dot."""
    webdataset = _library("webdataset", name)
    urls: str | list[str] = name
    if not _is_shard(name):
        folder = Path(name)
        urls = sorted(str(file) for file in folder.iterdir() if _is_shard(file.name))
    reader = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
    try:
        for members in islice(reader, skip, None):
            yield _member_sample(members, options.caption_column)
    except ConfigError:
        raise
    # The library, tarfile and gzip have errors of their own, and none in common.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"the source {name!r} cannot be read ({type(error).__name__}: {reason[:200]}), but "
            "webdataset shards are expected; check the name, or restore the file."
        ) from error


def _member_sample(members: Mapping[str, Any], column: str | None) -> Sample:
    """Make a sample of the members of one key: a picture, and text or JSON."""
    source = f"{members['__url__']}/{members['__key__']}"
    entry: dict[str, Any] = {}
    try:
        if "json" in members:
            entry = without_nulls(json.loads(members["json"]))
        texts = {
            key: members[key].decode("utf-8-sig")
            for key in (column, "txt", *COLUMNS)
            if key is not None and isinstance(members.get(key), bytes)
        }
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the caption of {source} cannot be read ({error}), but UTF-8 text and JSON are "
            "expected; restore the shard."
        ) from error
    require(
        isinstance(entry, dict),
        f"the member json of {source} is {str(entry)[:60]!r}, but a JSON object is expected; "
        "correct the shard.",
    )
    prompt, metadata = _split_caption(entry, column)
    if (column is None and texts) or column in texts:
        prompt = " ".join(next(iter(texts.values())).split()) or None
    pictures = [key for key in members if f".{key.lower()}".endswith(PICTURES)]
    if pictures:
        source = f"{source}.{pictures[0]}"
        return Sample(source, prompt, _opener_of(members[pictures[0]]), metadata)
    kinds = ", ".join(key for key in members if not key.startswith("__"))

    def fail() -> Image.Image:
        raise ValueError(f"no picture is among its members {kinds}")

    return Sample(source, prompt, fail, metadata)


def _hub(name: str, options: CurateOptions, skip: int) -> Iterator[Sample]:
    """Stream a data set of the Hub, or a folder that `datasets` reads or has saved."""
    datasets = _library("datasets", name)
    source = path_text(name.removeprefix(PREFIX))
    try:
        rows = _open_hub(datasets, source, options.hub_split)
        features = rows.features or rows._resolve_features().features
    except ConfigError:
        raise
    # What the Hub, the network and the readers of a dozen formats raise.
    except Exception as error:
        raise _hub_error(name, error) from error
    kinds = {column: type(kind).__name__ for column, kind in features.items()}
    picture = options.image_column or next((c for c, kind in kinds.items() if kind == "Image"), "")
    require(
        kinds.get(picture) == "Image",
        f"the source {name!r} has the columns {', '.join(kinds)}, but "
        f"{options.image_column or 'one'} that holds pictures is expected; name one by "
        "--image-column, or another source.",
    )
    caption = options.caption_column
    require(
        any(column in kinds for column in ((caption,) if caption else COLUMNS)),
        f"the source {name!r} has the columns {', '.join(kinds)}, but "
        f"{caption or ' or '.join(COLUMNS)} is expected to hold the captions; name one by "
        "--caption-column.",
    )
    media = [c for c, kind in kinds.items() if kind in ("Image", "Audio", "Video") and c != picture]
    rows = rows.remove_columns(media).cast_column(picture, datasets.Image(decode=False))
    decoder = datasets.Image()
    iterator = iter(rows.skip(skip) if skip else rows)
    number = skip
    while True:
        try:
            row = dict(next(iterator))
        except StopIteration:
            return
        except Exception as error:
            raise _hub_error(name, error) from error
        value = row.pop(picture)
        prompt, metadata = _split_caption(without_nulls(row), caption)
        plain = {key: entry for key, entry in metadata.items() if _is_plain(entry)}
        yield Sample(
            f"{name}/{options.hub_split}/{number}",
            prompt,
            functools.partial(_decode, decoder, value),
            plain,
        )
        number += 1


def _open_hub(datasets: Any, source: str, split: str) -> Any:
    """Open a split as an iterable data set."""
    folder = Path(source)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    if saved:
        table = datasets.load_from_disk(source)
        splits = table if isinstance(table, dict) else {"train": table}
    else:
        splits = datasets.load_dataset(source, streaming=True)
    require(
        split in splits,
        f"the data set {source!r} has the splits {', '.join(map(str, splits))}, but --hub-split "
        f"{split} is expected; name one of them.",
    )
    return splits[split].to_iterable_dataset() if saved else splits[split]


def _decode(decoder: Any, value: Any) -> Image.Image:
    if value is None:
        raise ValueError("the row has no picture")
    return decoder.decode_example(value)


def _hub_error(name: str, error: Exception) -> ConfigError:
    reason = (str(error).strip().splitlines() or [""])[0]
    return ConfigError(
        f"the source {name!r} cannot be read ({type(error).__name__}: {reason.rstrip('.')}), but a "
        "data set of the Hub, or a folder of one, is expected; check the name, your access and the "
        "network."
    )


def _is_plain(value: Any) -> bool:
    """Tell whether JSON can hold `value`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _curated(name: str, options: CurateOptions, skip: int) -> Iterator[Sample]:
    """Iterate over a curated set, split after split."""
    folder = Path(name)
    about = dataset.read_about(folder)
    reward_options = about.get("options", {}).get("reward_options", {})
    valid = [
        reward
        for reward in about.get("rewards", ())
        if tuple(about["resolution"]) == options.size
        and _options_of(reward, reward_options) == _options_of(reward, options.reward_options)
    ]

    def rows() -> Iterator[Sample]:
        for split in dataset.SPLITS:
            for path, entry in dataset.read_lines(folder, split):
                yield Sample(
                    entry["source"] or _name(folder, path),
                    entry["prompt"],
                    functools.partial(_open_curated, path),
                    entry["metadata"],
                    {name: entry["scores"][name] for name in valid if name in entry["scores"]},
                    entry["size"] or None,
                )

    return islice(rows(), skip, None)


def _open_curated(path: Path) -> Image.Image:
    return to_pil(dataset.read_image(path))


def _options_of(reward: str, options: Mapping[str, str]) -> dict[str, str]:
    """Options of one reward that may change its scores."""
    prefix = f"{reward}."
    return {k: v for k, v in without_services(options).items() if k.startswith(prefix)}


def _library(module: str, source: str) -> Any:
    """Import a library of the extra `data`."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"the source {source!r} is read by the library {module}, which cannot be imported "
            f"({error}); run pip install 'flowgrpo[data]'."
        ) from error
