"""The verifier of the embedded task as rewards.

`strict` is 1 if the image shows exactly what the prompt asks for, else 0; it is the accuracy that
is reported. `partial` gives credit for what is right in an image that is not. `classifier` is a
network's log-probability of the former: it passes a gradient on to the pixels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
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
            "nano's rewards compare images with; give the prompt set "
            "nano, or rewards of your own by --reward.weights and --reward.report."
        )
    if reason := problem(metadata, SHAPES, COLORS):
        raise RewardError(
            f"the metadata of the prompt {prompt!r} has {reason}, but what the prompt set nano has "
            "is expected, with which nano's rewards compare images; correct it."
        )


def classifier(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Score images [B] with the log-probability, <= 0, that all is right (flowgrpo/nano/cells.py).

    The network knows the pictures of the embedded model, and is fooled more easily than the
    verifier: report `nano_strict` beside it.
    """
    with torch.no_grad():
        return of_pixels(images.float(), prompts, metadata)


def of_pixels(pixels: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Score pixels, float32 [B, 3, 64, 64] in 0 ... 255, as `classifier` does, differentiable."""
    from flowgrpo.nano.classifier import load, score

    return score(load().to(pixels.device), pixels, metadata)


def check_cells(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise RewardError unless four cells can show what the metadata asks for; as `check`."""
    from flowgrpo.nano.cells import assignments

    check(prompt, metadata)
    try:
        assignments(dict(metadata))
    except ValueError as error:
        raise RewardError(
            f"the reward nano_classifier cannot judge the prompt {prompt!r}: {error}."
        ) from error


strict.check = partial.check = check
classifier.check, classifier.of_pixels = check_cells, of_pixels


def _score(images: Tensor, metadata: list[dict[str, Any]]) -> dict[str, Any]:
    from flowgrpo.nano import verify

    return verify.score(images, metadata)
