"""The verifier of the embedded task as rewards.

`strict` is 1 if the image shows exactly what the prompt asks for, else 0; it is the accuracy that
is reported. `partial` gives credit for what is right in an image that is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowgrpo.rewards.geneval.metadata import problem
from flowgrpo.rewards.interface import RewardError


def strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]):
    """Score images [B] with 1 where all is right, else 0."""
    return _score(images, metadata)["strict"]


def partial(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]):
    """Score images [B] with the share of what is right, in [0, 1]."""
    return _score(images, metadata)["partial"]


def check(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise RewardError unless the metadata says what is to be seen, as those of nano's prompts."""
    from flowgrpo.nano.scenes import COLORS, SHAPES

    if not isinstance(metadata.get("include"), list):
        raise RewardError(
            f"the prompt {prompt!r} comes without a list 'include' of what is to be seen, which "
            "the rewards nano_strict and nano_partial compare images with; give the prompt set "
            "nano, or rewards of your own by --reward.weights and --reward.report."
        )
    if reason := problem(metadata, SHAPES, COLORS):
        raise RewardError(
            f"the metadata of the prompt {prompt!r} has {reason}, but what the prompt set nano has "
            "is expected, with which the rewards nano_strict and nano_partial compare images; "
            "correct it."
        )


strict.check = partial.check = check


def _score(images: Tensor, metadata: list[dict[str, Any]]) -> dict[str, Any]:
    from flowgrpo.nano import verify

    return verify.score(images, metadata)
