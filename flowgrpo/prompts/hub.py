"""Prompts of a data set on the Hugging Face Hub, by the library `datasets` (extra `data`).

    hub:OWNER/NAME            the column prompt, caption or text, the first there is
    hub:OWNER/NAME:COLUMN     another one

A folder in place of OWNER/NAME is read in the same way: what `datasets.load_dataset` takes. Columns
that JSON can hold become the metadata (pictures cannot), so a set in GenEval's form works with the
reward geneval. Held-out prompts are those of the split test or else validation.
"""

from __future__ import annotations

import json
from typing import Any

from flowgrpo.config.validation import ConfigError, path_text, require

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
        import datasets
    except ImportError as error:
        raise ConfigError(
            f"{argument} is {name!r}, which the library datasets reads, but it cannot be "
            f"imported ({error}); run pip install 'flowgrpo[data]'."
        ) from error
    source, _, column = name.removeprefix(PREFIX).partition(":")
    source = path_text(source)
    try:
        splits = datasets.load_dataset(source)
    # What the Hub, the network and the readers of a dozen formats raise.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ConfigError(
            f"{argument} is {name!r}, but the data set {source!r} cannot be loaded "
            f"({type(error).__name__}: {reason.rstrip('.')}); check the name, your access and the "
            "network."
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
    rows = [row for row in table if isinstance(row[prompt], str)]
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
