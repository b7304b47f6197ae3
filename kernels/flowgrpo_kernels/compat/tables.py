"""Tables for a peer's sigma tensor, cached for as long as the tensor lives; checks of latents."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..arguments import check_tensor
from ..checks import check_device

_tables: WeakIdKeyDictionary = WeakIdKeyDictionary()


def cached(sigmas: Tensor | Sequence[float], key: Hashable, make: Callable):
    """Returns make() of these sigmas and this key, cached until the tensor is written in place.

    Reads sigmas on the host the first time (one synchronisation when they live on a GPU); at every
    call where they are inference tensors, whose changes nothing counts, or no tensor.
    """
    if not isinstance(sigmas, Tensor) or sigmas.is_inference():
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


def latents(optional: str, **tensors: Tensor | None) -> list[Tensor | None]:
    """Checks floating tensors [B, ...] of one shape and device; casts float64 to float32.

    The one named `optional` may be None. Peers cast everything to float32; here 16-bit storage is
    rounded to and keeps its dtype.
    """
    present = {name: x for name, x in tensors.items() if x is not None or name != optional}
    for name, x in present.items():
        check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
    first, *others = present.items()
    if first[1].ndim < 2:
        raise ValueError(
            f"{first[0]} must be [B, ...] with at least 2 dims, got {list(first[1].shape)}"
        )
    for name, x in others:
        if x.shape != first[1].shape:
            raise ValueError(
                f"{name} must have the shape of {first[0]} {list(first[1].shape)}, "
                f"got {list(x.shape)}"
            )
        check_device(name, x, first[1].device)
    return [
        x.float() if x is not None and x.dtype == torch.float64 else x for x in tensors.values()
    ]


def rows(table: Tensor, step: Tensor) -> Tensor:
    """Gathers table[step] for int64 [N], NaN where the step is outside. Reads nothing back."""
    inside = (step >= 0) & (step < table.shape[0])
    values = table.index_select(0, step.clamp(0, table.shape[0] - 1))
    return torch.where(inside[:, None], values, float("nan"))
