"""A stand-in for the NVIDIA driver: launches counted, compared and timed without a GPU.

    stub = stub_driver.install(capabilities=(90,))      # before anything opens libcuda.so.1
    with stub.tensors_of("cpu"):                        # CPU tensors stand in for CUDA ones
        sde_step(...)
    stub.launches()                                     # what reached the driver

stub_driver.c is compiled by the C compiler here, and loaded under the name libcuda.so.1, so both
our loader and Triton's own C launcher find it. It checks what the driver would: context, target of
a binary, version of PTX, size of the parameters, a capture. It computes nothing, so results stay
uninitialised, and its calls take no time: what is timed over it is the host's part alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from flowgrpo_kernels.backends import compiled, cuda_driver, dispatch

SOURCE = Path(__file__).with_name("stub_driver.c")


class _Record(ctypes.Structure):
    """Record of stub_driver.c."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("image", ctypes.c_uint64),
        ("stream", ctypes.c_uint64),
        ("device", ctypes.c_int32),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("bytes", ctypes.c_uint32),
        ("parameters", ctypes.c_uint8 * 512),
    )


class Launch(NamedTuple):
    """One launch. image: a digest of the binary; parameters: the bytes that the kernel gets."""

    name: str
    image: int
    stream: int
    device: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int
    parameters: bytes


def missing() -> str:
    """Says why there can be no stub; an empty string when it can be built."""
    return "" if shutil.which("cc") else "no C compiler (cc)"


@functools.cache
def build() -> Path:
    """Compiles the stub into a folder of its own, once in a process; returns the library."""
    library = Path(tempfile.mkdtemp(prefix="stub-libcuda-")) / cuda_driver.LIBRARY
    soname = f"-Wl,-soname,{cuda_driver.LIBRARY}"
    command = ["cc", "-O1", "-shared", "-fPIC", soname, "-o", str(library), str(SOURCE)]
    subprocess.run([*command, "-lpthread"], check=True)
    return library


class Stub:
    """The loaded stub."""

    def __init__(self, library: Path) -> None:
        # Global: who opens libcuda.so.1 from now on, finds the library of this name.
        self.library = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_launch.restype = ctypes.POINTER(_Record)
        for name in ("stub_launches", "stub_modules", "stub_record_size"):
            getattr(self.library, name).restype = ctypes.c_int64
        self.library.stub_digest.restype = ctypes.c_uint64
        assert self.library.stub_record_size() == ctypes.sizeof(_Record)
        self.reset()

    def reset(self, capabilities: tuple[int, ...] = (90,), version: int = 13000) -> None:
        """Begins anew with devices of these capabilities (90 for 9.0) and a driver's version."""
        numbers = (ctypes.c_int32 * len(capabilities))(*capabilities)
        self.library.stub_reset(len(capabilities), numbers, version)
        compiled.forget()

    def set_device(self, device: int) -> None:
        """Makes a device's primary context current in this thread, as torch.cuda.set_device."""
        context = ctypes.c_void_p()
        self.library.cuInit(ctypes.c_uint(0))
        self.library.cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(device))
        self.library.cuCtxSetCurrent(context)

    def launches(self) -> list[Launch]:
        """Lists what was launched since the last reset, the last 4096 at most."""
        return self.last(4096)

    def last(self, number: int) -> list[Launch]:
        """Lists the last launches, `number` at most."""
        count, last_ones = self.library.stub_launches(), []
        for i in range(max(0, count - number), count):
            r = self.library.stub_launch(ctypes.c_int64(i)).contents
            last_ones.append(
                Launch(
                    r.name.decode(), r.image, r.stream, r.device, tuple(r.grid), tuple(r.block),
                    r.shared, bytes(r.parameters[: r.bytes]),
                )
            )  # fmt: skip
        return last_ones

    def modules(self) -> int:
        """Counts the binaries that were loaded since the last reset."""
        return self.library.stub_modules()

    def digest(self, binary: bytes) -> int:
        """Computes what a launch of this binary has as its image."""
        return self.library.stub_digest(ctypes.c_char_p(binary), ctypes.c_size_t(len(binary)))

    def fail(self, function: str, code: int) -> None:
        """Makes the next call of a function of the driver return a code."""
        self.library.stub_fail(function.encode(), code)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Makes the driver say that a CUDA graph is being captured."""
        self.library.stub_capture(1)
        try:
            yield
        finally:
            self.library.stub_capture(0)

    def record(self, on: bool) -> None:
        """Notes launches, or not, as for timings."""
        self.library.stub_record(int(on))

    @contextlib.contextmanager
    def tensors_of(self, device_type: str = "cpu", device: int = 0) -> Iterator[None]:
        """Takes CPU tensors for those of a CUDA device, and stream 0 for torch's current one."""
        before = compiled.device_of, compiled.stream_of
        order = dispatch.ORDER[device_type]
        compiled.DEVICES.append(device_type)
        compiled.device_of, compiled.stream_of = (lambda x: device), (lambda device: 0)
        dispatch.ORDER[device_type] = dispatch.ORDER["cuda"]
        dispatch.request(dispatch.requested())
        self.set_device(device)
        try:
            yield
        finally:
            compiled.DEVICES.remove(device_type)
            compiled.device_of, compiled.stream_of = before
            dispatch.ORDER[device_type] = order
            dispatch.request(dispatch.requested())


@functools.cache
def install() -> Stub:
    """Builds and loads the stub, once in a process."""
    return Stub(build())
