"""Memory that was never written, made visible.

A module of its own, not conftest, of which there are several: torch.compile looks a traced
function's module up by its name.
"""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poisoned_empty(monkeypatch):
    """torch.empty and its relatives return NaN, so that an output left unwritten is seen."""

    def poison(function):
        def wrapped(*args, **kwargs):
            tensor = function(*args, **kwargs)
            if torch.compiler.is_compiling() or not tensor.is_floating_point():
                return tensor
            return tensor.fill_(float("nan"))

        return wrapped

    # torch.device as a context goes by a list of these functions, made when it is first entered:
    # of the poisoned ones it would know no others for the rest of the process.
    with torch.device("cpu"):
        torch.empty(0)
    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
