"""Tables for a peer's sigma tensor, computed once and cached for as long as the tensor lives."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached(sigmas: Tensor, key: Hashable, make: Callable):
    """Returns make() of this sigma tensor and key, cached until the tensor is written in place.

    Reads sigmas on the host the first time (one synchronisation when they live on a GPU); at every
    call where they are inference tensors, whose changes nothing counts.
    """
    if sigmas.is_inference():
        return make()
    version, entries = _tables.get(sigmas, (None, None))
    if version != sigmas._version:
        entries = {}
        _tables[sigmas] = (sigmas._version, entries)
    if key not in entries:
        # A rollout under inference_mode may be what makes it, and a backward what uses it next.
        with torch.inference_mode(False), torch.no_grad():
            entries[key] = make()
    return entries[key]


def rows(table: Tensor, step: Tensor) -> Tensor:
    """Gathers table[step] for int64 [N], NaN where the step is outside. Reads nothing back."""
    inside = (step >= 0) & (step < table.shape[0])
    values = table.index_select(0, step.clamp(0, table.shape[0] - 1))
    return torch.where(inside[:, None], values, float("nan"))
