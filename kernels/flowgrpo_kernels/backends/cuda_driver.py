"""The NVIDIA driver, libcuda.so.1, through ctypes: devices, modules, launches. Nothing else needed.

    driver = load()
    function = driver.function(device, binary, "sde_step_kernel")      # loaded for that device
    driver.launch(kernel, launch)                                      # see KERNEL and LAUNCH

Modules go into the primary context of a device, which is the one that torch uses. A launch is one
C call with two arguments, the kernel's record and the launch's with the parameters behind it:
through libflowgrpo_native where it is there (csrc/cuda.cpp), else through cuLaunchKernel by ctypes.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p

from . import native_library

LIBRARY = "libcuda.so.1"
KERNEL = "<QQQIIIxxxx"
"""FgKernel of csrc/abi.h: cuLaunchKernel, function, a bit for each 32-bit word of the parameters
that must be a multiple of 16, threads of a program, bytes of shared memory, bytes of parameters."""
LAUNCH = "<QQ"
"""FgLaunch of csrc/abi.h: stream, programs. The parameters follow."""
MISALIGNED = -1
"""Result of a launch, in place of the driver's code, where a parameter is no multiple of 16."""
INVALID_CONTEXT = 201
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
# Keys of the last argument of cuLaunchKernel.
_POINTER, _SIZE, _END = 1, 2, 0


class DriverError(RuntimeError):
    """Raised when the driver is not there or refuses a call; `code` is the driver's."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class Driver:
    """An initialised driver."""

    def __init__(self) -> None:
        try:
            self.library = ctypes.CDLL(LIBRARY)
            self.address = ctypes.cast(self.library.cuLaunchKernel, c_void_p).value or 0
        except (OSError, AttributeError) as error:
            raise DriverError(f"the NVIDIA driver cannot be loaded: {error}") from None
        self.library.cuLaunchKernel.argtypes = (
            c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p
        )  # fmt: skip
        self.call("cuInit", c_uint(0))
        version, count = c_int(), c_int()
        self.call("cuDriverGetVersion", byref(version))
        self.call("cuDeviceGetCount", byref(count))
        self.version, self.devices = version.value, count.value
        self._contexts: dict[int, c_void_p] = {}
        self.launch = self._native() or self.launch_by_ctypes

    def call(self, name: str, *args) -> None:
        """Calls a function of the driver; DriverError unless it returns 0."""
        if code := getattr(self.library, name)(*args):
            raise DriverError(f"{name} failed: {self.describe(code)}", code)

    def describe(self, code: int) -> str:
        """Names an error in the driver's words."""
        text = c_char_p()
        if self.library.cuGetErrorString(c_int(code), byref(text)) or not text.value:
            return f"error {code}"
        return f"{text.value.decode()} (error {code})"

    def capability(self, device: int) -> tuple[int, int]:
        """Returns the compute capability of a device, (9, 0) for an H100."""
        handle, numbers = c_int(), (c_int(), c_int())
        self.call("cuDeviceGet", byref(handle), c_int(device))
        for attribute, number in zip((_CAPABILITY_MAJOR, _CAPABILITY_MINOR), numbers, strict=True):
            self.call("cuDeviceGetAttribute", byref(number), c_int(attribute), handle)
        return numbers[0].value, numbers[1].value

    def capturing(self, stream: int) -> bool:
        """Tells whether a CUDA graph is captured from a stream."""
        status = c_int()
        self.call("cuStreamIsCapturing", c_void_p(stream), byref(status))
        return status.value == 1

    def bind(self, device: int) -> None:
        """Makes the primary context of a device the current one of this thread."""
        context = self._contexts.get(device)
        if context is None:
            handle, context = c_int(), c_void_p()
            self.call("cuDeviceGet", byref(handle), c_int(device))
            self.call("cuDevicePrimaryCtxRetain", byref(context), handle)
            self._contexts[device] = context
        self.call("cuCtxSetCurrent", context)

    def function(self, device: int, binary: bytes, entry: str) -> int:
        """Loads a binary, or PTX, for a device and returns the handle of its kernel."""
        before, module, function = c_void_p(), c_void_p(), c_void_p()
        self.call("cuCtxGetCurrent", byref(before))
        self.bind(device)
        try:
            self.call("cuModuleLoadData", byref(module), c_char_p(binary))
            self.call("cuModuleGetFunction", byref(function), module, c_char_p(entry.encode()))
        finally:
            if before.value:
                self.call("cuCtxSetCurrent", before)
        return function.value or 0

    def _native(self):
        """Finds the launch of the native library, or None."""
        library = native_library.state()[0]
        if library is None:
            return None
        launch = library.flowgrpo_native_cuda_launch
        launch.argtypes = (c_char_p, c_char_p)
        return launch

    def launch_by_ctypes(self, kernel: bytes, launch: bytes) -> int:
        """Launches without the native library; returns the driver's code, or MISALIGNED."""
        _, function, sixteenths, threads, shared, size = struct.unpack(KERNEL, kernel)
        stream, programs = struct.unpack_from(LAUNCH, launch)
        bank = launch[struct.calcsize(LAUNCH) :]
        if any(bank[i * 4] & 15 for i in range(size // 4) if sixteenths >> i & 1):
            return MISALIGNED
        parameters, count = ctypes.create_string_buffer(bank, size), c_size_t(size)
        extra = (c_void_p * 5)(
            _POINTER, ctypes.addressof(parameters), _SIZE, ctypes.addressof(count), _END
        )
        return self.library.cuLaunchKernel(
            function, programs, 1, 1, threads, 1, 1, shared, stream, None, extra
        )


@functools.cache
def load() -> Driver:
    """Loads the driver once; DriverError when it is not there, also the next time."""
    return Driver()
