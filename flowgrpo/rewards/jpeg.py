"""JPEG size as a reward (Black et al., DDPO, https://arxiv.org/abs/2305.13301).

    incompressibility = bytes of the JPEG file at quality 95 / 1000
    compressibility   = -incompressibility / 500

The scales are flow_grpo's. No model and no download: a real reward for a first run of a real model.
"""

from __future__ import annotations

import io
from typing import Any

from torch import Tensor

from flowgrpo.rewards.images import check_images, to_pil

QUALITY = 95


def incompressibility(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float]:
    """Measure the JPEG size of each image [B], in kilobytes of 1000 bytes."""
    check_images(images, prompts, metadata)
    return [_kilobytes(image) for image in images]


def compressibility(
    images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> list[float]:
    """Score small files high: -size / 500 of each image [B]; 0 would be an empty file."""
    return [-size / 500 for size in incompressibility(images, prompts, metadata)]


def _kilobytes(image: Tensor) -> float:
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell() / 1000
