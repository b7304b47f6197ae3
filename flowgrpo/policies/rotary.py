"""Rotary tables that are computed once, for one image size, in place of a transformer's module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class RowTables(NamedTuple):
    """Cosines and sines, float32 [B, S, head_dim], of rows that have positions of their own."""

    cos: Tensor
    sin: Tensor


class Rotary(nn.Module):
    """Rotary tables, a pair [N, head_dim], in place of a transformer's `pos_embed`."""

    def __init__(self, tables: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.tables = tables

    def forward(self, *positions: Any, **more: Any) -> tuple[Tensor, Tensor]:
        """Return the tables, whatever the positions."""
        return self.tables

    @contextmanager
    def put_into(self, transformer: nn.Module) -> Iterator[None]:
        """Give `transformer` these tables inside; its own module comes back, for other images."""
        replaced, transformer.pos_embed = transformer.pos_embed, self
        try:
            yield
        finally:
            transformer.pos_embed = replaced
