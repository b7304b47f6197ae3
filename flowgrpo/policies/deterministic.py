"""PyTorch's deterministic algorithms where an update needs them: around its backward passes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


@contextmanager
def deterministic_backward() -> Iterator[None]:
    """Give attention's gradients the same bits in each backward pass inside, where
    `prepare_process` asked for that. While PyTorch may only warn, its attention kernels go on
    adding them up in any order. Elsewhere it may only warn: a reward may want what it forbids."""
    if not torch.is_deterministic_algorithms_warn_only_enabled():
        yield
        return
    with _debug_mode("error"):
        yield


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Contexts of a forward that a `deterministic_backward` runs again (`context_fn` of torch's
    checkpoint): none for the first time, and the settings of now for the second. Under others
    PyTorch refuses some attention kernels (cuDNN's), and torch.compile would compile once more."""
    return nullcontext(), _debug_mode(torch.get_deterministic_debug_mode())


@contextmanager
def _debug_mode(mode: int | str) -> Iterator[None]:
    before = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode(mode)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(before)
