"""Compiled backend: the Triton kernels as binaries that come with the package, for NVIDIA GPUs.

Needs neither Triton nor a compiler: the driver loads what images.py reads (cuda_driver.py), and the
ops' own launchers launch it, by `launch` of this file in place of Triton's. A kernel is loaded for
a device when it is first needed there. Loading cannot happen while a CUDA graph is captured, so
call an op once before, or `warm_up(device)`, which loads everything.

What is not in the packs (another GPU, rows of odd sizes, dtypes that nobody mixes) raises Unserved,
and dispatch.py takes the next backend. The bits are Triton's: it is the same code.
"""

from __future__ import annotations

import functools
import re
import struct
import threading
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import triton
from .cuda_driver import INVALID_CONTEXT, KERNEL, LAUNCH, MISALIGNED, Driver, DriverError, load
from .images import ImageError, Manifest, Pack, launch_key

DEVICES = ["cuda"]
"""Types of device whose tensors are taken; a test adds "cpu", over a stand-in for the driver."""


class Unserved(Exception):
    """Raised by a backend's function that has no code for a call; the message says why.

    The next backend then computes everything anew.
    """


class _Plan(NamedTuple):
    """All of a launch that its tensors and numbers do not change.

    launch: of the driver; pack: makes the second of its arguments; kernel: the first.
    """

    launch: Callable[[bytes, bytes], int]
    pack: Callable[..., bytes]
    kernel: bytes


class _State(NamedTuple):
    """The driver, the manifest and the target of each device, or why there is none."""

    driver: Driver
    manifest: Manifest
    targets: list[tuple[str, str]]


_lock = threading.RLock()
_plans: dict[tuple, _Plan] = {}
_functions: dict[tuple[int, str], tuple[int, int, int, str]] = {}
_packs: dict[str, Pack] = {}


def find(op: str, device_type: str) -> tuple[Callable | None, str]:
    """(function, "") when the packs have the op for this type of device, else (None, why not)."""
    if op not in triton.launchers:
        return None, f"there is no compiled kernel for {op}"
    if device_type not in DEVICES:
        return None, f"compiled kernels run on cuda tensors, got {device_type}"
    if why := why_not():
        return None, why
    return functools.partial(triton.launchers[op], launch), ""


def status() -> tuple[bool, str]:
    """(whether a device is served, which images serve it, or why none does)."""
    if why := why_not():
        return False, why
    images = serving()
    return True, "; ".join(f"cuda:{i}: {text}" for i, text in enumerate(images))


def serving() -> list[str]:
    """Describes, for each device, the image that serves it, or says why none does."""
    if _why_not_loaded():
        return []
    present = _state()
    texts = []
    for target, why in present.targets:
        how = "by the driver's compiler, from " if target.startswith("ptx") else ""
        kernels = f"{len(present.manifest.kernels)} kernels {how}{target}"
        texts.append(f"{kernels} (Triton {present.manifest.versions['triton']})" if target else why)
    return texts


def why_not() -> str:
    """Says why no device is served; an empty string when one is."""
    if why := _why_not_loaded():
        return why
    targets = _state().targets
    if not targets:
        return "the NVIDIA driver sees no device"
    return "" if any(target for target, _ in targets) else targets[0][1]


def _why_not_loaded() -> str:
    """Says why there is no driver or no manifest; an empty string when both are there."""
    if torch.version.hip:
        return "the compiled kernels are for NVIDIA GPUs"
    try:
        _state()
    except (ImageError, DriverError) as error:
        return str(error)
    return ""


@functools.cache
def _loaded() -> _State | RuntimeError:
    try:
        manifest, driver = Manifest(), load()
        targets = [
            manifest.target_for(driver.capability(i), driver.version) for i in range(driver.devices)
        ]
    except (ImageError, DriverError) as error:
        return error
    return _State(driver, manifest, targets)


def _state() -> _State:
    """Reads the manifest and asks the driver for its devices, once; raises what went wrong."""
    state = _loaded()
    if isinstance(state, RuntimeError):
        raise state
    return state


def forget() -> None:
    """Forgets the driver, the packs and all that was loaded. For tests."""
    with _lock:
        _loaded.cache_clear()
        load.cache_clear()
        for cache in (_plans, _functions, _packs):
            cache.clear()


def forget_plans() -> None:
    """Forgets how launches are laid out, but not what was loaded. For tests and benchmarks."""
    _plans.clear()


def device_of(x: Tensor) -> int:
    """Returns the number of a tensor's device."""
    return x.get_device()


def stream_of(device: int) -> int:
    """Returns the handle of torch's current stream on a device."""
    return torch.cuda.current_stream(device).cuda_stream


# Triton and Inductor take this one: the public function makes an object of Python first.
stream_of = getattr(torch._C, "_cuda_getCurrentRawStream", stream_of)


def launch(kernel, programs: int, tensors: tuple, numbers: tuple, **constants) -> None:
    """Launches a kernel of the packs, on torch's current stream; as triton.launch."""
    device = device_of(tensors[0])
    # By the kernel's name: Triton hashes it by its source.
    parts, pointers = [kernel.__name__, device, *constants, *constants.values()], []
    for x in tensors:
        if x is None:
            parts.append(None)
        else:
            parts.append(x.dtype)
            pointers.append(x.data_ptr())
    key = tuple(parts)
    plan = _plans.get(key)
    if plan is None:
        plan = _plans[key] = _plan(kernel, device, tensors, numbers, constants)
    start, pack, facts = plan
    try:
        parameters = pack(stream_of(device), programs, *pointers, *numbers)
    except (struct.error, OverflowError):
        raise Unserved("a size or a stride needs more than 32 bits") from None
    if code := start(facts, parameters):
        _launch_again(plan, kernel, tensors, parameters, device, code)


def _launch_again(
    plan: _Plan, kernel, tensors: tuple, parameters: bytes, device: int, code: int
) -> None:
    """Launches in a thread that has not used CUDA before; raises what else went wrong."""
    driver, name = _state().driver, kernel.__name__
    if code == MISALIGNED:
        chosen = zip(triton.arguments(kernel), tensors, strict=False)
        chosen = [x for n, x in chosen if x is not None and n in triton.specialised[name]]
        if any(x.data_ptr() % 16 for x in chosen):
            raise Unserved("a tensor does not begin at a multiple of 16 bytes")
        raise Unserved("rows are not of a multiple of 16 elements")
    if code == INVALID_CONTEXT:
        driver.bind(device)
        code = plan.launch(plan.kernel, parameters)
    if code:
        raise DriverError(
            f"{name} could not be launched on cuda:{device}: {driver.describe(code)}", code
        )


def _plan(kernel, device: int, tensors: tuple, numbers: tuple, constants: dict) -> _Plan:
    """Loads the kernel of a launch and lays out its records."""
    function, threads, shared, layout = _load(device, launch_key(kernel, tensors, constants))
    names = triton.arguments(kernel)
    passed = [name for name, x in zip(names, (*tensors, *numbers), strict=False) if x is not None]
    words = _sixteenths(layout, passed, triton.specialised[kernel.__name__])
    driver, size = _state().driver, struct.calcsize("<" + layout)
    return _Plan(
        launch=driver.launch,
        pack=struct.Struct(LAUNCH + layout).pack,
        kernel=struct.pack(KERNEL, driver.address, function, words, threads, shared, size),
    )


def _sixteenths(layout: str, names: list[str], chooses: tuple[str, ...]) -> int:
    """Marks the 32-bit words of the parameters `names` that chose the code as multiples of 16."""
    words, at, arguments = 0, 0, iter(names)
    for letter in layout:
        if letter != "x" and next(arguments) in chooses:
            words |= 1 << at // 4
        at += struct.calcsize("<" + letter)
    return words


def _load(device: int, key: str) -> tuple[int, int, int, str]:
    """Loads a kernel for a device: (function, threads, bytes of shared memory, layout)."""
    with _lock:
        loaded = _functions.get((device, key))
        if loaded is None:
            loaded = _functions[device, key] = _load_anew(device, key)
        return loaded


def _load_anew(device: int, key: str) -> tuple[int, int, int, str]:
    state = _state()
    if not 0 <= device < len(state.targets):
        raise Unserved(f"the driver sees no device {device}")
    target, why = state.targets[device]
    if not target:
        raise Unserved(why)
    name = key.split()[0]
    if key not in state.manifest.kernels:
        if re.sub(r"\bALIGN=\d+", "ALIGN=16", key) in state.manifest.kernels:
            raise Unserved("rows are not of a multiple of 16 elements, or do not begin at one")
        raise Unserved(f"{name} is not shipped for these dtypes and options ({key})")
    if state.driver.capturing(stream_of(device)):
        raise RuntimeError(
            f"{name} is not loaded on cuda:{device}, and a CUDA graph is being captured: call "
            "flowgrpo_kernels.warm_up(device), or the op once, before the capture"
        )
    try:
        if target not in _packs:
            _packs[target] = state.manifest.pack(target)
        image = _packs[target].image(key)
        function = state.driver.function(device, image.binary, image.entry)
    except (ImageError, DriverError) as error:
        raise Unserved(f"{name} of {target} cannot be loaded on cuda:{device}: {error}") from None
    return function, 32 * image.warps, image.shared, image.layout


def warm_up(device: torch.device | str | int | None = None) -> int:
    """Loads every compiled kernel for a CUDA device, as a capture needs; returns how many.

    device: by default the current one. Returns 0 where other backends serve it: Triton's kernels
    are compiled by a first call of the op. Takes neither memory of tensors nor a stream's time.
    """
    if why_not():
        return 0
    index = torch.device("cuda" if device is None else device).index
    if index is None:
        index = torch.cuda.current_device()
    state = _state()
    if not 0 <= index < len(state.targets):
        raise ValueError(f"device must be one of {len(state.targets)} CUDA devices, got {device}")
    if not state.targets[index][0]:
        return 0
    for key in state.manifest.kernels:
        _load(index, key)
    return len(state.manifest.kernels)
