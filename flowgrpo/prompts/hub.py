"""Prompts of a data set on the Hugging Face Hub, by the library `datasets` (extra `data`).

    hub:OWNER/NAME            the column prompt, caption or text, the first there is
    hub:OWNER/NAME:COLUMN     another one

A folder in place of OWNER/NAME is read in the same way: what `datasets.load_dataset` takes. Columns
that JSON can hold become the metadata (pictures cannot), so a set in GenEval's form works with the
reward geneval. Held-out prompts are those of the split test or else validation.
"""

from __future__ import annotations

import json
import logging
import os
from typing import Any

from flowgrpo.config.user_code import is_installed
from flowgrpo.config.validation import ConfigError, path_text, require

log = logging.getLogger("flowgrpo")

PREFIX = "hub:"
COLUMNS = ("prompt", "caption", "text")
MEDIA = ("Image", "Audio", "Video")
HELD_OUT = ("test", "validation")
CANDIDATES = {"train": ("train",), "any": (*HELD_OUT, "train")}
"""Split here -> names of splits there, the first that there is; HELD_OUT for others."""


def load(
    name: str, split: str, argument: str = "sample.prompts"
) -> tuple[list[str], list[dict[str, Any]]]:
    """Load texts and metadata of the set called `name`, "hub:..." as above.

    argument: what `name` was given by, for messages.

    Raises:
        ConfigError: the library is missing, or there is no such set, split or column.
    """
    try:
        if not is_installed("datasets"):
            raise ModuleNotFoundError("No module named 'datasets'")
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{argument} is {name!r}, which the library datasets reads, but it cannot be "
            f"imported ({error}); run pip install 'flowgrpo[data]'."
        ) from error
    source, column = path_text(name.removeprefix(PREFIX)), ""
    require(
        bool(source), f"sample.prompts is {name!r}, but {PREFIX}OWNER/NAME is expected; name one."
    )
    # A folder's path may have a colon of its own.
    if not os.path.isdir(source):
        source, _, column = source.partition(":")
    try:
        splits = datasets.load_dataset(source)
    # What the Hub, the network and the readers of a dozen formats raise.
    except Exception as error:
        # Behind "an error occurred" stands which.
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        reason = " ".join(str(cause).split())[:300]
        raise ConfigError(
            f"{argument} is {name!r}, but the data set {source!r} cannot be loaded "
            f"({type(cause).__name__}: {reason.rstrip('.')}); check the name and its files, and "
            "for the Hub your access and the network."
        ) from error
    candidates = CANDIDATES.get(split, HELD_OUT)
    present = [candidate for candidate in candidates if candidate in splits]
    require(
        bool(present),
        f"the data set {source!r} has the splits {', '.join(splits)}, but one of "
        f"{', '.join(candidates)} is expected for the {split} prompts; choose another set, or a "
        "file.",
    )
    table = splits[present[0]]
    columns = [name for name in ([column] if column else COLUMNS) if name in table.column_names]
    require(
        bool(columns),
        f"the data set {source!r} has the columns {', '.join(table.column_names)}, but "
        f"{column or ' or '.join(COLUMNS)} is expected to hold the prompts; name one by "
        f"{PREFIX}{source}:COLUMN.",
    )
    media = [name for name, kind in table.features.items() if type(kind).__name__ in MEDIA]
    table = table.remove_columns(media)
    prompt = columns[0]
    rows = [row for row in table if isinstance(row[prompt], str) and row[prompt].strip()]
    require(
        bool(rows),
        f"the column {prompt} of the data set {source!r} has no texts in the split {present[0]}, "
        "but one prompt a row is expected; name another column by "
        f"{PREFIX}{source}:COLUMN.",
    )
    if len(rows) < len(table):
        log.warning(
            "%d of the %d rows of %s, split %s, have no text in the column %s and are left out",
            len(table) - len(rows),
            len(table),
            source,
            present[0],
            prompt,
        )
    plain = [name for name in table.column_names if _is_plain(_first(name, rows))]
    metadata = [{name: row[name] for name in plain} | {"prompt": row[prompt]} for row in rows]
    return [entry["prompt"] for entry in metadata], metadata


def _first(name: str, rows: list[dict[str, Any]]) -> Any:
    """Find the first value of a column that is not null."""
    return next((row[name] for row in rows if row[name] is not None), None)


def _is_plain(value: Any) -> bool:
    """Tell whether JSON can hold `value`."""
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
