"""Waits: each time the host waits for the GPU, by torch's warnings."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """A list that has, afterwards, one entry for each wait of the host inside."""
    waits: list[str] = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            # Not the warning that the mode is a prototype, which a process sees once.
            texts = (str(warning.message) for warning in caught)
            waits += [text for text in texts if "called a synchronizing" in text]
