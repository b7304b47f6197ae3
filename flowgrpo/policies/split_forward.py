"""Forwards of several steps, module by module in parts of one step each.

An update may run n trained steps of b rows in one forward of n b rows (`optim.steps_per_forward`),
so that weights which are gathered from other processes (`run.parallel` fsdp) are gathered once for
n steps. But the kernel of a matrix product, and with it the last bits of a row, depends on the
number of rows, and the rollout had b of them. So each module that has weights runs n times, on the
rows of one step at a time, in the order that they had in the rollout, and the weights stay where
they are meanwhile. Between these modules rows are only copied.

Rows come as [halves, n, b]: under guidance the unconditional rows of all steps stand before the
conditional ones, and a part has those of its step of both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo.policies.rotary import RowTables


@dataclass(eq=False)
class Parts:
    """How the forwards of a policy are split now; shared by its modules."""

    count: int = 1
    """Steps of a forward, n; 1: it is not split."""
    rows: int = 0
    """Rows of the present forward."""
    halves: int = 1
    """2 if it has unconditional rows before the conditional ones."""

    @contextmanager
    def of(self, count: int) -> Iterator[None]:
        """Split forwards inside into `count` parts."""
        with self._as(count, self.rows, self.halves):
            yield

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Contexts of a forward that is run again for its backward (`context_fn` of torch's
        checkpoint): none for the first time, and how it was split for the second."""
        return nullcontext(), self._as(self.count, self.rows, self.halves)

    @contextmanager
    def _as(self, *settings: int) -> Iterator[None]:
        before = self.count, self.rows, self.halves
        self.count, self.rows, self.halves = settings
        try:
            yield
        finally:
            self.count, self.rows, self.halves = before

    def take(self, value: Any, part: int) -> Any:
        """Take the rows of a part of a tensor of all rows, of those in a dictionary, or of tables
        of all rows; other values as they are."""
        if isinstance(value, dict):
            return {name: self.take(item, part) for name, item in value.items()}
        if isinstance(value, RowTables):
            return RowTables(*(self.take(table, part) for table in value))
        if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != self.rows:
            return value
        return value.unflatten(0, (self.halves, self.count, -1))[:, part].flatten(0, 1)

    def join(self, values: Sequence[Any]) -> Any:
        """Put the results of all parts together: tensors, tuples of them, or None."""
        first = values[0]
        if isinstance(first, tuple | list):
            return type(first)(self.join(column) for column in zip(*values, strict=True))
        if first is None:
            return None
        return torch.stack([v.unflatten(0, (self.halves, -1)) for v in values], dim=1).flatten(0, 2)


@dataclass(eq=False)
class Split:
    """Forward of a split module for the rows of a part; its `_flowgrpo`."""

    parts: Parts
    forward: Callable[..., Any]
    """The module's forward before."""


def rows(parts: Parts | None, count: int, halves: int) -> AbstractContextManager[None]:
    """Let a forward inside have `count` rows."""
    if parts is None:
        return nullcontext()
    if count % (halves * parts.count):
        raise ValueError(
            f"sample: {count} rows cannot be split into {parts.count} steps of {halves} x as many"
        )
    return parts._as(parts.count, count, halves)


def install(modules: Sequence[nn.Module], parts: Parts) -> None:
    """Let each of the modules run in parts, where `parts` says so.

    Adds to them: `_flowgrpo` (`Split`) and `forward`.
    """
    for module in modules:
        module._flowgrpo = Split(parts, module.forward)
        module.forward = MethodType(_forward, module)


def _forward(self: nn.Module, *arguments: Any, **named: Any) -> Any:
    parts, forward = self._flowgrpo.parts, self._flowgrpo.forward
    if parts.count == 1:
        return forward(*arguments, **named)
    results = []
    for part in range(parts.count):
        taken = [parts.take(value, part) for value in arguments]
        results.append(forward(*taken, **{n: parts.take(v, part) for n, v in named.items()}))
    return parts.join(results)
