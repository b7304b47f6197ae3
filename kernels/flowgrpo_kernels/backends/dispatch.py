"""Dispatch: the table of ops, their registration with torch.library, the choice of a backend.

    FLOWGRPO_KERNELS = auto        the first backend of ORDER that runs the op; the default
                     = compiled    the compiled GPU kernels of the package, or an error
                     = triton      Triton, or an error (CPU tensors only in Triton's interpreter)
                     = native      the native CPU library, or an error
                     = reference   reference.py everywhere

float64 inputs always run on the reference: it is the oracle. The first call on a device type logs
one line that says which backend runs and why; a fallback to the reference is a warning. The
variable is read once.

To add an op:
1. Write its reference in ../reference.py (a subpackage has its own): plain PyTorch, any float
   dtype. Its arguments and results are those of every backend.
2. In a file of its own, call `define(name, schema, reference, fake)`. It registers the op and
   returns what the public function calls.
3. Put its launcher into the same file, under `@triton.launcher(name)`, and the calls that make its
   kernels into ../aot/table.py, so that they are shipped compiled.
4. Write a function of the same name into native.py, and name it in native.OPS. An op without one
   is defined with `backends=LAUNCHED`: then CPU tensors run on the reference without a warning.

To add a backend: a module of this folder with two functions, a line in BACKENDS, and its name in
ORDER for each type of device, before the backends that it outruns.

    find(op, device_type) -> (function, "") or (None, why not)
    status() -> (available, reason)          reason: what was loaded, or why nothing was

A backend's functions get checked tensors, `seeds` and `step` as int64 [B] (`step` of any stride),
and the buffers to write of an op that writes. Launchers get contiguous tensors unless the op was
defined with any_strides. A function that has no code for a call raises Unserved: then the next
backend of ORDER runs it.

The namespace of the ops is that of _ops.py, which a build for Hugging Face's Hub replaces; other
files take `op(name)`.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix, ops
from . import compiled, native, triton
from .compiled import Unserved

NAMESPACE = add_op_namespace_prefix("").removesuffix("::")
BACKENDS = {"compiled": compiled, "triton": triton, "native": native}
# Those that run an op by its launcher.
LAUNCHED = ("compiled", "triton")
CHOICES = ("auto", *BACKENDS, "reference")
# Best first, by the type of device that the tensors are on.
ORDER = {
    "cpu": ("native", "reference"),
    "cuda": ("compiled", "triton", "reference"),  # ROCm devices have this name, too
}
# On another device the reference runs, after a warning that says what Triton asks for.
OTHER_DEVICES = ("triton", "reference")

log = logging.getLogger("flowgrpo_kernels")


@dataclass(frozen=True)
class Op:
    """One op: its schema, its reference, and the backends that are meant to implement it."""

    name: str
    schema: str
    reference: Callable
    backends: tuple[str, ...]


OPS: dict[str, Op] = {}

_library = torch.library.Library(NAMESPACE, "DEF")
_requested = os.environ.get("FLOWGRPO_KERNELS", "auto").strip().lower() or "auto"
# (op, device type) -> (backend, function), filled by the first call.
_chosen: dict[tuple[str, str], tuple[str, Callable]] = {}


def define(
    name: str,
    schema: str,
    reference: Callable,
    fake: Callable,
    *,
    backends: tuple[str, ...] = tuple(BACKENDS),
    any_strides: bool = False,
    in_float64: bool = False,
):
    """Registers an op and returns its overload.

    schema: arguments and results in the language of torch.library, without the name. The argument
    `sample`, or else the first, chooses the backend by its device and dtype.
    fake: the op on tensors without memory: shapes, dtypes and devices of the results.
    backends: those that are meant to implement it, beside the reference.
    any_strides: the launcher, too, reads tensors as they are.
    in_float64: every backend computes in float64, so that float64 tensors need no reference.
    """
    OPS[name] = Op(name, schema, reference, (*backends, "reference"))
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    body = _implementation(OPS[name], any_strides, in_float64)
    _library.impl(name, body, "CompositeExplicitAutograd")
    torch.library.register_fake(add_op_namespace_prefix(name), fake, lib=_library)
    return op(name)


def op(name: str):
    """Looks up an op's overload, as the public functions call it."""
    return getattr(ops, name).default


def _implementation(op: Op, any_strides: bool, in_float64: bool) -> Callable:
    """Makes the op's body for every device, which calls the chosen backend.

    Launched kernels get contiguous tensors; the others take any strides, and the native one reads
    rows of any distance, such as latents[:, i] of a trajectory, where they lie. An op that writes
    into a buffer reads copies, since its inputs may lie around that buffer. One step for all rows
    stays a view of stride 0: a copy would be a launch of its own.
    """
    arguments = torch._C.parse_schema(op.name + op.schema).arguments
    names = [argument.name for argument in arguments]
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    chooser = names.index("sample") if "sample" in names else 0
    copied = [i for i, name in enumerate(names) if name != "step"]

    def contiguous(args: tuple) -> tuple:
        for i in copied:
            # Arguments left at their default are not handed on.
            x = args[i] if i < len(args) else None
            if isinstance(x, Tensor) and not x.is_contiguous():
                args = (*args[:i], x.contiguous(), *args[i + 1 :])
        return args

    def run(*args):
        x = args[chooser]
        backend, function = "reference", op.reference
        if in_float64 or x.dtype != torch.float64:
            backend, function = _resolve(op.name, x.device.type)
        if written or (backend in LAUNCHED and not any_strides):
            args = contiguous(args)
        try:
            results = function(*args)
        except Unserved as error:
            results = _next(op, x.device.type, backend, str(error))(*args)
        # Backends write through pointers: without this, autograd would take what a backward has
        # saved of a buffer for unchanged.
        if written:
            buffers = [args[i] for i in written if i < len(args) and args[i] is not None]
            torch.autograd.graph.increment_version(buffers)
        return results

    run.__name__ = op.name
    return run


def _resolve(name: str, device_type: str) -> tuple[str, Callable]:
    key = (name, device_type)
    choice = _chosen.get(key)
    if choice is None:
        choice = _chosen[key] = _choose(OPS[name], device_type)
    return choice


def _next(op: Op, device_type: str, backend: str, why: str) -> Callable:
    """Finds who runs a call that a backend has no code for; RuntimeError if it was demanded."""
    if _requested == backend:
        raise RuntimeError(
            f"FLOWGRPO_KERNELS={backend} cannot run this {op.name} on {device_type}: {why}; use "
            "FLOWGRPO_KERNELS=auto to fall back"
        )
    order = ORDER.get(device_type, OTHER_DEVICES)
    obstacles = [why]
    for other in order[order.index(backend) + 1 :]:
        if other not in op.backends:
            continue
        function, why = _find(other, op, device_type)
        if function is not None:
            break
        obstacles.append(why)
    level = logging.WARNING if other == "reference" else logging.INFO
    log_once(level, f"{op.name} on {device_type} also runs on {other}: {'; '.join(obstacles)}")
    return function


def _find(backend: str, op: Op, device_type: str) -> tuple[Callable | None, str]:
    """(function, "") when the backend runs the op on this type of device, else (None, why not)."""
    if backend == "reference":
        return op.reference, ""
    return BACKENDS[backend].find(op.name, device_type)


def _choose(op: Op, device_type: str) -> tuple[str, Callable]:
    """Chooses the backend and the function that run an op on a type of device, and logs it."""
    if _requested not in CHOICES:
        raise RuntimeError(f"FLOWGRPO_KERNELS must be one of {CHOICES}, got {_requested!r}")
    if _requested != "auto":
        function, why = _find(_requested, op, device_type)
        if function is None:
            raise RuntimeError(
                f"FLOWGRPO_KERNELS={_requested} cannot run {op.name} on {device_type}: {why}; "
                "use FLOWGRPO_KERNELS=auto to fall back"
            )
        log_once(logging.INFO, f"{device_type} tensors run on {_requested} (FLOWGRPO_KERNELS)")
        return _requested, function
    obstacles: list[str] = []
    for backend in ORDER.get(device_type, OTHER_DEVICES):
        # A backend that is not meant to have the op is no reason for a warning.
        if backend not in op.backends:
            continue
        function, why = _find(backend, op, device_type)
        if function is not None:
            break
        obstacles.append(why)
    if obstacles and backend == "reference":
        line = f"{device_type} tensors fall back to the PyTorch reference: {'; '.join(obstacles)}"
        log_once(logging.WARNING, line)
    elif obstacles:
        log_once(logging.INFO, f"{device_type} tensors run on {backend}: {'; '.join(obstacles)}")
    else:
        log_once(logging.INFO, f"{device_type} tensors run on {backend}")
    return backend, function


@functools.cache
def log_once(level: int, line: str) -> None:
    """Logs a line the first time it is said; log_once.cache_clear() forgets what was said."""
    log.log(level, line)


def requested() -> str:
    """Returns the value of FLOWGRPO_KERNELS that holds now."""
    return _requested


def request(name: str) -> None:
    """Makes ops behave as under FLOWGRPO_KERNELS=name from now on. For tests and benchmarks."""
    global _requested
    _requested = name
    _chosen.clear()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Makes ops behave as under FLOWGRPO_KERNELS=name within the block."""
    before = _requested
    request(name)
    try:
        yield
    finally:
        request(before)


@contextlib.contextmanager
def use_launch(launch: Callable) -> Iterator[None]:
    """Makes ops on CPU tensors run their launchers with `launch` within the block.

    For what records launches or compares them: `launch` may as well start nothing.
    """
    before = dict(_chosen)
    for name, launcher in triton.launchers.items():
        _chosen[name, "cpu"] = "triton", functools.partial(launcher, launch)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)


def backends() -> dict[str, dict[str, object]]:
    """Collects {backend: {"available": bool, "reason": str}} for backend_info()."""
    facts = {name: backend.status() for name, backend in BACKENDS.items()}
    facts["reference"] = True, "PyTorch"
    return {
        name: {"available": available, "reason": reason}
        for name, (available, reason) in facts.items()
    }


def backend_of(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Returns the name of the backend that runs an op on a type of device."""
    if dtype == torch.float64:
        return "reference"
    return _resolve(name, device_type)[0]


def in_one_pass(name: str, velocity: Tensor, sample: Tensor) -> bool:
    """Tells whether a loss also computes, in its forward pass, the gradient asked for by backward.

    name: the op that does. On the native backend: there a row is still in the cache when its
    scalars are known. Not under tracing, where backward could not ask for the value of grad_loss.
    """
    return (
        sample.device.type == "cpu"
        and type(velocity) in (Tensor, torch.nn.Parameter)
        and not torch.compiler.is_compiling()
        and backend_of(name, "cpu", sample.dtype) == "native"
    )
