"""The user's code apart from the run: what it sets for the whole process is put back.

Modules of research code set gradients off, another default dtype or device, or change to their own
folder while they are imported. The run would go on with it: without gradients, in other numbers, or
in another directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

log = logging.getLogger("flowgrpo")

SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], None]]] = {
    "the working directory": (os.getcwd, os.chdir),
    "torch.set_grad_enabled": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch.set_default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch.set_default_device": (
        torch.get_default_device,
        # None takes away what slows each call down.
        lambda device: torch.set_default_device(None if device.type == "cpu" else device),
    ),
    "torch.set_num_threads": (torch.get_num_threads, torch.set_num_threads),
    "torch.set_float32_matmul_precision": (
        torch.get_float32_matmul_precision,
        torch.set_float32_matmul_precision,
    ),
    "torch.backends.cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark,
        lambda value: setattr(torch.backends.cudnn, "benchmark", value),
    ),
    "torch.use_deterministic_algorithms": (
        lambda: (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "numpy.seterr": (np.geterr, lambda values: np.seterr(**values)),
}
"""Settings of the process: name -> (function that reads it, function that sets it)."""

_reported: set[tuple[str, str]] = set()
"""Pairs of code and setting that were logged."""


@contextmanager
def isolated(code: str) -> Iterator[None]:
    """Put the `SETTINGS` back, at the end of the block, that code of the user's changed; `code`
    names it, as "reward 'my.py:score'"."""
    before = _read()
    try:
        yield
    finally:
        after = _read()
        for setting, value in before.items():
            if after.get(setting) == value:
                continue
            # A working directory may be gone.
            with suppress(OSError):
                SETTINGS[setting][1](value)
            if (code, setting) not in _reported:
                _reported.add((code, setting))
                log.warning(
                    "%s changed %s from %s to %s, which holds for the whole process, so it "
                    "was put back",
                    code,
                    setting,
                    value,
                    after.get(setting),
                )


def _read() -> dict[str, Any]:
    values = {}
    for setting, (read, _) in SETTINGS.items():
        # RuntimeError: torch has no one answer where its old and new names were both used.
        with suppress(OSError, RuntimeError):
            values[setting] = read()
    return values
