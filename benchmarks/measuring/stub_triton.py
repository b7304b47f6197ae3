"""Triton over the stand-in for the driver: its whole launch path, with its own launcher in C.

    stub_triton.install(stub)       # from now on kernel[grid](...) takes CPU tensors

Triton compiles that launcher with a C compiler, against Python's headers, at its first use.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
from triton.runtime import driver

TARGET = GPUTarget("cuda", 90, 32)


class Driver(DriverBase):
    """Triton's driver for NVIDIA but for what it asks torch: device 0, stream 0, an H100."""

    def __init__(self):
        self.utils, self.launcher_cls = CudaUtils(), CudaLauncher

    @classmethod
    def is_active(cls):
        return True

    def map_python_to_cpp_type(self, ty):
        raise NotImplementedError

    def get_benchmarker(self):
        raise NotImplementedError

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_current_target(self):
        return TARGET

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def missing() -> str:
    """Says why Triton's launcher cannot be compiled; an empty string when it can."""
    if not (shutil.which("gcc") or shutil.which("clang")):
        return "no C compiler (gcc or clang)"
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if headers.exists() else f"no {headers}"


def install(library: Path) -> None:
    """Makes Triton use the stub, which is loaded already, for the rest of the process."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)
    driver.set_active(Driver())
