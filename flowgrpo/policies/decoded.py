"""Figures of what a policy decodes: taken on the device, read where the host waits anyway.

A velocity, a state or a pixel that is no number stays one to the end: x' = A x + B v + C eps keeps
NaN and infinity, and images are made of the last state. So the last latents and the pixels, which
`Policy.decode` has in its hands, tell of all steps before them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Figures:
    """Figures of all latents and pixels since `Decoded.begin`."""

    latent: float
    """Largest |number| of the latents; NaN where one of them is."""
    pixel: float
    """Largest |number| of the pixels, which lie in [-1, 1]; NaN where one of them is."""
    std: float
    """Standard deviation of the latents of a chunk, averaged over the chunks."""


class Decoded:
    """Collects the figures; nothing but `read` waits for the device."""

    def __init__(self) -> None:
        self._peaks: Tensor | None = None
        self._std: Tensor | None = None
        self._chunks = 0

    def begin(self) -> None:
        """Forget all figures."""
        self.__init__()

    def add(self, latents: Tensor, pixels: Tensor) -> None:
        """Add one chunk: its latents [B, ...] and pixels [B, 3, H, W]."""
        peaks = torch.stack([_largest(latents), _largest(pixels)])
        std = latents.float().std()
        # torch.maximum keeps NaN.
        self._peaks = peaks if self._peaks is None else torch.maximum(self._peaks, peaks)
        self._std = std if self._std is None else self._std + std
        self._chunks += 1

    def read(self) -> Figures:
        """Read the figures of the chunks so far."""
        if self._peaks is None:
            return Figures(0.0, 0.0, math.nan)
        latent, pixel, std = torch.cat([self._peaks, self._std[None]]).tolist()
        return Figures(latent, pixel, std / self._chunks)


def _largest(values: Tensor) -> Tensor:
    """Largest |number|, 0-dim; NaN if one is. One pass, without a copy."""
    return torch.linalg.vector_norm(values, math.inf, dtype=torch.float32)
