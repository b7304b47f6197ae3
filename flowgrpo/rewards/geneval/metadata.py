"""GenEval's metadata of a prompt, and the key of it that cannot be used.

{"tag": task, "include": [entry, ...], "exclude"?: [entry, ...], "prompt": text}
entry = {"class": name, "count": n, "color"?: name, "position"?: [relation, index of an entry]}
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral
from typing import Any

from flowgrpo.prompts.sets.geneval_prompts import POSITIONS


def problem(metadata: Mapping[str, Any], classes: Collection[str], colors: Collection[str]) -> str:
    """Name the key of `include` or `exclude` that cannot be used, with its value and the rule.

    The empty string if there is none, as "include[0].count 2.0, which is no whole number above 0".
    """
    if "include" not in metadata:
        return "no include"
    for name in ("include", "exclude"):
        entries = metadata.get(name, [])
        if not isinstance(entries, list | tuple):
            return f"{name} {entries!r}, which is no list"
        for number, entry in enumerate(entries):
            if reason := _problem_of_entry(entry, number, classes, colors):
                return f"{name}[{number}]{reason}"
    # Nothing to look for is found in every image.
    return "" if metadata["include"] else "include [], which asks for nothing"


def _problem_of_entry(
    entry: Any, number: int, classes: Collection[str], colors: Collection[str]
) -> str:
    """Name the key of one entry that cannot be used, as ".count 2.0, which ..."."""
    if not isinstance(entry, Mapping):
        return f" {entry!r}, which is no object"
    for key in ("class", "count"):
        if key not in entry:
            return f" without {key}"
    name, count = entry["class"], entry["count"]
    # Lists, since a value that cannot be hashed is to be named as well.
    if name not in list(classes):
        return f".class {name!r}, which is no class of the reward"
    if not _is_whole(count) or count < 1:
        return f".count {count!r}, which is no whole number above 0"
    if "color" in entry and entry["color"] not in list(colors):
        return f".color {entry['color']!r}, which is none of {', '.join(colors)}"
    position = entry.get("position")
    if "position" not in entry:
        return ""
    if not isinstance(position, list | tuple) or len(position) != 2:
        return f".position {position!r}, which is no pair of relation and index"
    relation, target = position
    if relation not in list(POSITIONS):
        return f".position {relation!r}, which is none of {', '.join(POSITIONS)}"
    if not _is_whole(target) or not 0 <= target < number:
        return f".position {target!r}, which is no index of an entry before it"
    return ""


def _is_whole(value: Any) -> bool:
    """Tell a whole number; true and 2.0 are none, though Python computes with them."""
    return isinstance(value, Integral) and not isinstance(value, bool)
