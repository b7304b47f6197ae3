"""Shared by every test: one torch thread, the Triton interpreter without a GPU, NaN buffers."""

from __future__ import annotations

import os

import pytest
import torch

# Triton reads this when its own library functions are decorated, so it comes before any test
# imports triton. Tests that need the compiler run in a subprocess without it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config):
    torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    def gpu(outcome):
        reports = terminalreporter.stats.get(outcome, [])
        return sum("gpu" in getattr(report, "keywords", ()) for report in reports)

    ran, skipped = gpu("passed") + gpu("failed"), gpu("skipped")
    terminalreporter.write_line(f"GPU tests: {ran} ran, {skipped} skipped")


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
