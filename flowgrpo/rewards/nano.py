"""The verifier of the embedded task as rewards.

`strict` is 1 if the image shows exactly what the prompt asks for, else 0; it is the accuracy that
is reported. `partial` gives credit for what is right in an image that is not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def strict(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]):
    """[B] scores in {0, 1}."""
    return _score(images, metadata)["strict"]


def partial(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]):
    """[B] scores in [0, 1]."""
    return _score(images, metadata)["partial"]


def _score(images: Tensor, metadata: list[dict[str, Any]]) -> dict[str, Any]:
    from flowgrpo.nano import verify

    return verify.score(images, metadata)
