"""What a model is told about its prompts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of N prompts, in the transformer's dtype."""

    embeds: Tensor
    """[N, L, D]: one vector a token."""
    pooled: Tensor
    """[N, P]: one vector a prompt."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def to(self, device: torch.device) -> Conditioning:
        """The same on `device`."""
        return Conditioning(self.embeds.to(device), self.pooled.to(device))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M]."""
        return Conditioning(self.embeds[index], self.pooled[index])

    def repeat_interleave(self, count: int) -> Conditioning:
        """Each prompt `count` times in succession."""
        return Conditioning(
            self.embeds.repeat_interleave(count, dim=0), self.pooled.repeat_interleave(count, dim=0)
        )

    def expand(self, count: int) -> Conditioning:
        """A single prompt as `count` rows."""
        return Conditioning(self.embeds.expand(count, -1, -1), self.pooled.expand(count, -1))

    def then(self, other: Conditioning) -> Conditioning:
        """These prompts, then those of `other`."""
        return Conditioning(
            torch.cat([self.embeds, other.embeds]), torch.cat([self.pooled, other.pooled])
        )
