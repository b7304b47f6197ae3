"""Kernel tests: poisoned buffers, and every test that takes `backend` runs on each backend."""

from __future__ import annotations

import pytest
import torch

from flowgrpo_kernels.backends import dispatch


def _available(name: str) -> bool:
    return name == "reference" or bool(dispatch.backends()[name]["available"])


@pytest.fixture(autouse=True)
def _poison(poisoned_empty):
    torch.manual_seed(0)


@pytest.fixture(params=["reference", "native"])
def backend(request):
    """The name of a backend that runs CPU tensors. Triton's interpreter: test_triton.py."""
    if not _available(request.param):
        pytest.skip(f"{request.param}: {dispatch.backends()[request.param]['reason']}")
    with dispatch.use_backend(request.param):
        yield request.param
