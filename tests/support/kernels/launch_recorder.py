"""Triton's launch path without a GPU: a driver that compiles for sm_90 and notes the launches.

    install()
    with recorded() as log:
        sde_step(...)                   # CPU tensors stand in for CUDA ones
    log.kernels                         # what reached the launcher, in order

Everything up to the launch is Triton's own: binding of arguments, specialisation, cache key,
options, the compiler with ptxas, the choice of the compiled kernel. Only loading the binary and the
launch itself are missing, so results stay uninitialised. Needs a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime import driver

from flowgrpo_kernels.backends import dispatch, triton

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
}
# Operations of PyTorch that launch nothing: views and allocations.
FREE = {
    *("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided"),
    *("aten::detach", "aten::expand", "aten::as_strided", "aten::select"),
}


@dataclass
class Launch:
    kernel: str
    grid: tuple[int, int, int]
    warps: int
    shared: int
    fusion: bool
    scalars: dict[str, object]


@dataclass
class Log:
    kernels: list[Launch] = field(default_factory=list)
    torch: list[str] = field(default_factory=list)  # PyTorch's operations that would launch
    compiled: dict[str, int] = field(default_factory=dict)  # how often each kernel was compiled


_log = Log()
_functions: dict[str, object] = {}


class Launcher:
    """One for each compiled kernel, as in Triton's drivers; checks arguments as theirs would."""

    def __init__(self, source, metadata):
        self.function, self.signature, self.metadata = source.fn, source.signature, metadata
        _functions[source.fn.__name__] = source.fn

    def __call__(self, x, y, z, stream, handle, packed, launch_metadata, enter, leave, *args):
        scalars = {}
        for (name, kind), value in zip(self.signature.items(), args, strict=True):
            if kind == "constexpr":
                continue
            if kind.startswith("*"):
                assert POINTERS[value.dtype] == kind, (name, kind, value.dtype)
            elif kind == "fp32":
                assert type(value) is float, (name, value)
                scalars[name] = value
            else:
                bits = int(kind[1:]) - 1
                assert type(value) is int and -(1 << bits) <= value < 1 << bits, (name, value)
                scalars[name] = value
        name, meta = self.function.__name__, self.metadata
        launch = Launch(
            name, (x, y, z), meta.num_warps, meta.shared, meta.enable_fp_fusion, scalars
        )
        _log.kernels.append(launch)


class Driver(DriverBase):
    """Device 0 of compute capability 9.0, on stream 0; also its own `utils`."""

    def __init__(self):
        self.utils, self.launcher_cls = self, Launcher

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
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}

    def load_binary(self, name, binary, shared, device):
        """(module, function, registers, spills, threads a program may have)"""
        assert binary[:4] == b"\x7fELF"
        return object(), object(), 0, 0, 1024


def install() -> None:
    """For the rest of the process: this driver, and Triton's launchers take CPU tensors."""
    driver.set_active(Driver())
    triton.interpreting = lambda: True
    dispatch.request("triton")


def variants() -> Counter:
    """How many compilations of each kernel Triton's own cache holds."""
    return Counter({name: len(f.device_caches[0][0]) for name, f in _functions.items()})


def launched(kernel) -> list[str]:
    """The PTX of every compilation of a kernel that was launched."""
    return [compiled.asm["ptx"] for compiled in kernel.device_caches[0][0].values()]


@contextlib.contextmanager
def recorded() -> Iterator[Log]:
    """The launches, PyTorch's own operations and the compilations within the block."""
    global _log
    before, _log = variants(), Log()
    with torch.autograd.profiler.profile() as profile:
        yield _log
    names = (event.name for event in profile.function_events)
    _log.torch = [name for name in names if name.startswith("aten::") and name not in FREE]
    _log.compiled = dict(variants() - before)
