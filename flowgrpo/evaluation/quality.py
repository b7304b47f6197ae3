"""Quality figures: what no reward asks for and reward hacking would spoil.

A prompt set may name a function of its own. The module of that function may hold `TOLERANCES`:
figure -> largest allowed change of a training run, above 0 for a rise and below 0 for a fall.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Quality = Callable[[Tensor, list[dict[str, Any]]], Mapping[str, float]]
"""f(images uint8 [N, 3, H, W], metadata of each image) -> name -> figure."""

QUALITY = {
    "nano": "flowgrpo.nano.verify:quality",
    "nano_text": "flowgrpo.nano.text.verify:quality",
}
"""Prompt set -> "module:function" of its quality figures."""


def quality_of(prompt_set: str) -> Quality | None:
    """Import the quality figures that belong to a prompt set, or return None."""
    if prompt_set not in QUALITY:
        return None
    module, _, function = QUALITY[prompt_set].partition(":")
    return getattr(importlib.import_module(module), function)


def tolerances_of(prompt_set: str) -> dict[str, float]:
    """Read `TOLERANCES` beside a prompt set's quality figures; empty if it states none."""
    if prompt_set not in QUALITY:
        return {}
    module = importlib.import_module(QUALITY[prompt_set].partition(":")[0])
    return dict(getattr(module, "TOLERANCES", {}))


def within_tolerance(
    name: str,
    before: Mapping[str, float],
    after: Mapping[str, float],
    tolerances: Mapping[str, float],
) -> bool:
    """Compare the change of one quality figure with its tolerance; True without one."""
    if name not in tolerances:
        return True
    change, allowed = after[name] - before[name], tolerances[name]
    return change <= allowed if allowed >= 0 else change >= allowed
