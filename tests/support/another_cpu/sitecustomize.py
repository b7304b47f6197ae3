"""Rehearse the tests on another kind of CPU: FLOWGRPO_TEST_CPU=avx2 or bf16.

avx2: instructions up to AVX2 and no 16-bit arithmetic in hardware, so dtype auto is float32.
bf16: torch says that there is 16-bit arithmetic in hardware, so dtype auto is bfloat16; where there
is none it is emulated, which is slow and has the same meaning.

Python runs a file of this name at its start where the folder is on PYTHONPATH. tests/conftest.py
puts it there, so that the processes that tests start are of the same kind.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

KINDS = {
    "avx2": {
        "ATEN_CPU_CAPABILITY": "avx2",
        "FLOWGRPO_NATIVE_ISA": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "OPENBLAS_CORETYPE": "Haswell",
        # torch.compile would take up code for wider registers that it finds there.
        "TORCHINDUCTOR_CACHE_DIR": str(
            Path(tempfile.gettempdir()) / f"inductor-avx2-{os.getuid()}"
        ),
    },
    "bf16": {},
}
"""Kind -> environment variables that limit the instructions of the libraries."""

CHECKS = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
"""Functions of torch.cpu by which dtype auto is chosen."""


class TorchCpuFinder(importlib.abc.MetaPathFinder):
    """Imports torch.cpu as it is, with the answers of another CPU."""

    def __init__(self, fast_bfloat16: bool) -> None:
        self.fast_bfloat16 = fast_bfloat16

    def find_spec(self, name, path, target=None):
        if name != "torch.cpu":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            for check in CHECKS:
                setattr(module, check, lambda: self.fast_bfloat16)

        spec.loader.exec_module = exec_module
        return spec


def install(kind: str) -> None:
    """Pretend that this process and its children run on a CPU of that kind. Before torch loads."""
    for name, value in KINDS[kind].items():
        os.environ.setdefault(name, value)
    sys.meta_path.insert(0, TorchCpuFinder(kind == "bf16"))


if os.environ.get("FLOWGRPO_TEST_CPU") in KINDS:
    install(os.environ["FLOWGRPO_TEST_CPU"])
