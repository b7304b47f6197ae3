"""Quality figures of nano_text's pictures: all but the word, which RapidOCR reads."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from flowgrpo.nano.text.scenes import COLORS, LIGHT, PALETTE, SURFACES

TOLERANCES = {"palette": 0.02, "background": 0.02, "obeyed": -0.05, "diversity": -0.06}
"""Largest change of a training run: a rise, or where negative a fall."""
_COLOR_NAMES = tuple(COLORS)
# Pixels at the edge that no word reaches.
_EDGE = 2


def quality(images: Tensor, metadata: list[dict[str, Any]]) -> dict[str, float]:
    """Measure pictures, uint8 [M, 3, 32, 80], beside what their prompts ask for.

    "palette": mean distance of ground and ink, as shares of the largest possible, from the world's
    colours. "background": mean absolute deviation of the ground from its median, of 1. "obeyed":
    share of the pictures with the surface and, where it is asked for, the colour of the prompt.
    """
    pixels = images.numpy().astype(np.float32)
    edges = np.concatenate(
        [
            pixels[..., :_EDGE, :].reshape(len(pixels), 3, -1),
            pixels[..., -_EDGE:, :].reshape(len(pixels), 3, -1),
            pixels[..., :_EDGE].reshape(len(pixels), 3, -1),
            pixels[..., -_EDGE:].reshape(len(pixels), 3, -1),
        ],
        axis=-1,
    )
    ground = np.median(edges, axis=-1)
    away = np.linalg.norm(pixels - ground[..., None, None], axis=1).reshape(len(pixels), -1)
    ink = np.empty_like(ground)
    for i, (picture, distance) in enumerate(
        zip(pixels.reshape(len(pixels), 3, -1), away, strict=True)
    ):
        ink[i] = np.median(picture[:, distance >= 0.75 * distance.max()], axis=-1)
    light = np.array(LIGHT, np.float32)
    is_card = np.linalg.norm(ground - light, axis=-1) < np.linalg.norm(ink - light, axis=-1)
    dark, pale = np.where(is_card[:, None], ink, ground), np.where(is_card[:, None], ground, ink)
    distances = np.linalg.norm(dark[:, None] - PALETTE, axis=-1)
    color = distances.argmin(axis=-1)
    error = (distances.min(axis=-1) + np.linalg.norm(pale - light, axis=-1)) / 2
    obeyed = [
        SURFACES[int(card)] == m["surface"] and m.get("color", _COLOR_NAMES[c]) == _COLOR_NAMES[c]
        for card, c, m in zip(is_card, color, metadata, strict=True)
    ]
    return {
        "palette": float(error.mean() / (255 * 3**0.5)),
        "background": float(np.abs(edges - ground[..., None]).mean() / 255),
        "obeyed": float(np.mean(obeyed)),
    }
