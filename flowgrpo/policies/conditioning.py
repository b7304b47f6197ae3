"""Text embeddings of prompts, as the stages hand them on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of N prompts, in the transformer's dtype.

    `Policy.prepare` adds `table`: what a transformer makes of prompt and time alone. `at` takes the
    values of one step from it, which the forward then looks up instead of computing them.
    """

    embeds: Tensor
    """[N, L, D]: one vector a token; with a table, in the width of the transformer's blocks."""
    pooled: Tensor
    """[N, P]: one vector a prompt."""
    table: Tensor | None = None
    """[T, N, M]: all modulations (policies/modulation.py) of each of T steps."""
    modulation: Tensor | None = None
    """[N, M]: those of the step that a row is at."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def prepared(self) -> bool:
        """True: embeds are projected and modulations are here."""
        return self.table is not None or self.modulation is not None

    def to(self, device: torch.device) -> Conditioning:
        """Copy to `device`, where it is not there."""
        return self._each(lambda tensor, dim: tensor.to(device))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M]."""
        return self._each(lambda tensor, dim: tensor[(slice(None),) * dim + (index,)])

    def at(self, step: int) -> Conditioning:
        """Take the modulations of the step number `step`, for all prompts."""
        if self.table is None:
            return self
        return Conditioning(self.embeds, self.pooled, modulation=self.table[step])

    def rows_at(self, index: Tensor, steps: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M], each at its own step, int64 [M]."""
        if self.table is None:
            return self.rows(index)
        modulation = self.table[steps, index]
        return Conditioning(self.embeds[index], self.pooled[index], modulation=modulation)

    def repeat_interleave(self, count: int) -> Conditioning:
        """Each prompt `count` times in succession."""
        return self._each(lambda tensor, dim: tensor.repeat_interleave(count, dim=dim))

    def expand(self, count: int) -> Conditioning:
        """A single prompt as `count` rows."""
        return self._each(
            lambda tensor, dim: tensor.expand(*[-1] * dim, count, *[-1] * (tensor.dim() - dim - 1))
        )

    def then(self, other: Conditioning) -> Conditioning:
        """These prompts, then those of `other`.

        Raises:
            ValueError: one of them is prepared and the other is not.
        """
        return self._each(lambda a, b, dim: torch.cat([a, b], dim=dim), other)

    def _each(self, change: Callable[..., Tensor], *others: Conditioning) -> Conditioning:
        """Apply change(tensor, those of the others, dimension of the prompts) to each tensor."""
        changed: dict[str, Tensor] = {}
        for name in (f.name for f in fields(self)):
            tensors = [getattr(conditioning, name) for conditioning in (self, *others)]
            absent = [tensor is None for tensor in tensors]
            if any(absent) != all(absent):
                raise ValueError("other: both must be prepared alike (Policy.prepare), or neither")
            if not any(absent):
                # A table has the steps in front of the prompts.
                changed[name] = change(*tensors, 1 if name == "table" else 0)
        return Conditioning(**changed)
