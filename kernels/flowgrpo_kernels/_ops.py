"""torch.library registration of every op, and the choice of the backend that runs it.

    FLOWGRPO_KERNELS = auto        Triton on CUDA and ROCm tensors, the native library on CPU
                                   tensors, reference.py where those are missing; the default
                     = triton      Triton, or an error (CPU tensors only in Triton's interpreter)
                     = native      the native CPU library, or an error
                     = reference   reference.py everywhere

float64 inputs always run on the reference: it is the oracle. The first call on a device type logs
one line that says which backend runs and why; a fallback is a warning. The variable is read once.

Backends are modules with the functions of reference.py, same names, arguments and results. Tensors
reach them checked, and Triton's contiguous (also `seeds`, int64 [B]; `step`, int64 [B], has any
stride); outputs of `sde_step` are given. The native one is `_native.py`, which further has
`available() -> bool` and `reason() -> str` (why it is not available, or which library was loaded)
and may lack an op, which then falls back, loudly. Triton launchers register themselves from the
op's own file through `triton_launcher`. A subpackage adds ops of its own through `define`.

NAMESPACE is the only place where the namespace of the ops is written; other files take `op(name)`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from . import reference

NAMESPACE = "flowgrpo"
CHOICES = ("auto", "triton", "native", "reference")
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
log = logging.getLogger("flowgrpo_kernels")

_GUIDED = "Tensor velocity, Tensor? uncond_velocity, float guidance_scale, Tensor sample"
_LOSS = "Tensor? ref_velocity, Tensor? ref_uncond_velocity, Tensor? old_velocity"
_LOSS_ARGS = (
    f"{_GUIDED}, Tensor prev_sample, Tensor old_log_prob, Tensor advantages, Tensor table, "
    f"Tensor step, {_LOSS}, Tensor? row_weight, Tensor? kl_row_weight, "
    "float kl_weight, float clip_low, float clip_high, float adv_clip"
)
_LOSS_OUTPUTS = ", ".join(["Tensor"] * 7)
SCHEMAS = {
    "sde_step": f"({_GUIDED}, Tensor table, Tensor step, Tensor? seeds, Tensor? noise, "
    "Tensor(a!) prev_sample, Tensor(b!) log_prob) -> ()",
    "log_prob": f"({_GUIDED}, Tensor prev_sample, Tensor table, Tensor step) -> Tensor",
    "log_prob_backward": f"(Tensor grad, {_GUIDED}, Tensor prev_sample, Tensor table, Tensor step, "
    "bool uncond_grad) -> (Tensor, Tensor)",
    "grpo_loss_forward": f"({_LOSS_ARGS}) -> ({_LOSS_OUTPUTS})",
    "grpo_loss_gradient": f"({_LOSS_ARGS}, float grad_loss, bool uncond_grad) "
    f"-> ({_LOSS_OUTPUTS}, Tensor, Tensor)",
    "grpo_loss_backward": f"(Tensor grad_loss, Tensor coefs, {_GUIDED}, Tensor prev_sample, "
    f"Tensor table, Tensor step, {_LOSS}, bool uncond_grad) -> (Tensor, Tensor)",
    "initial_noise": "(Tensor seeds, SymInt[] shape, ScalarType dtype) -> Tensor",
}

_requested = os.environ.get("FLOWGRPO_KERNELS", "auto").strip().lower() or "auto"
_triton: dict[str, Callable] = {}
_triton_reason = "no Triton kernel is defined"
# Of every op: the function of reference.py, and the backend that CPU tensors go to.
_references: dict[str, Callable] = {}
_on_cpu: dict[str, str] = {}
_chosen: dict[tuple[str, str], tuple[str, Callable]] = {}
_said: set[str] = set()


def triton_launcher(name: str) -> Callable[[Callable], Callable]:
    """Decorator: registers the Triton launcher of an op. It has the reference's signature."""

    def register(launcher: Callable) -> Callable:
        _triton[name] = launcher
        return launcher

    return register


def triton_missing(reason: str) -> None:
    """Records why the Triton kernels could not be defined."""
    global _triton_reason
    _triton_reason = reason


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def _native():
    """The native module, or None with a reason."""
    try:
        from . import _native as native
    except ImportError as error:
        return None, f"the native module cannot be imported: {error}"
    return (native if native.available() else None), native.reason()


def _candidate(backend: str, name: str, device_type: str) -> tuple[Callable | None, str]:
    """(function, "") when the backend can run the op on this device type, else (None, why not)."""
    if backend == "reference":
        return _references[name], ""
    if backend == "triton":
        if name not in _triton:
            return None, _triton_reason or f"there is no Triton kernel for {name}"
        if device_type != "cuda" and not _interpreting():
            return None, f"Triton kernels run on cuda tensors, got {device_type}"
        return _triton[name], ""
    if device_type != "cpu":
        return None, f"the native library runs on cpu tensors, got {device_type}"
    native, reason = _native()
    if native is None:
        return None, reason
    if not hasattr(native, name):
        return None, f"the native library has no {name}"
    return getattr(native, name), ""


def _say(level: int, line: str) -> None:
    """Logs a line the first time it is said."""
    if line not in _said:
        _said.add(line)
        log.log(level, line)


def _choose(name: str, device_type: str) -> tuple[str, Callable]:
    """The backend and function that run an op on a device type; logs its choice once."""
    if _requested not in CHOICES:
        raise RuntimeError(f"FLOWGRPO_KERNELS must be one of {CHOICES}, got {_requested!r}")
    if _requested != "auto":
        function, why = _candidate(_requested, name, device_type)
        if function is None:
            raise RuntimeError(
                f"FLOWGRPO_KERNELS={_requested} cannot run {name} on {device_type}: {why}; "
                "use FLOWGRPO_KERNELS=auto to fall back"
            )
        _say(logging.INFO, f"{device_type} tensors run on {_requested} (FLOWGRPO_KERNELS)")
        return _requested, function
    preferred = _on_cpu[name] if device_type == "cpu" else "triton"
    function, why = _candidate(preferred, name, device_type)
    if function is not None:
        _say(logging.INFO, f"{device_type} tensors run on {preferred}")
        return preferred, function
    _say(logging.WARNING, f"{device_type} tensors fall back to the PyTorch reference: {why}")
    return "reference", _references[name]


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block ops behave as under FLOWGRPO_KERNELS=name. For tests and benchmarks."""
    global _requested
    before = _requested
    _requested = name
    _chosen.clear()
    try:
        yield
    finally:
        _requested = before
        _chosen.clear()


def backends() -> dict[str, dict[str, object]]:
    """{backend: {"available": bool, "reason": str}} for backend_info()."""
    native, reason = _native()
    found = bool(_triton)
    interpreted = " in the interpreter" if _interpreting() else ""
    return {
        "triton": {
            "available": found,
            "reason": f"{len(_triton)} ops{interpreted}" if found else _triton_reason,
        },
        "native": {"available": native is not None, "reason": reason},
        "reference": {"available": True, "reason": "PyTorch"},
    }


def backend_of(name: str, device_type: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the backend that runs an op on a device type."""
    if dtype == torch.float64:
        return "reference"
    return _resolve(name, device_type)[0]


def _resolve(name: str, device_type: str) -> tuple[str, Callable]:
    key = (name, device_type)
    found = _chosen.get(key)
    if found is None:
        found = _chosen[key] = _choose(name, device_type)
    return found


def _implementation(name: str, arguments: list[str], written: list[int]) -> Callable:
    """The op's body for every device, which calls the chosen backend.

    Triton's kernels get contiguous tensors; the others take any strides, and the native one reads
    rows of any distance, such as latents[:, i] of a trajectory, where they lie. Of an op that is
    given a buffer, which may lie among them, it reads copies. One step for all rows stays a view of
    stride 0: a copy would be a launch of its own.
    """
    fallback = _references[name]
    # The argument whose dtype and device choose the backend.
    chooser = arguments.index("sample" if "sample" in arguments else "seeds")
    step = arguments.index("step") if "step" in arguments else -1

    def run(*args):
        given, sample = args, args[chooser]
        backend, function = "reference", fallback
        if sample.dtype != torch.float64:
            backend, function = _resolve(name, sample.device.type)
        if written or backend == "triton":
            for i, a in enumerate(args):
                if isinstance(a, Tensor) and i != step and not a.is_contiguous():
                    args = (*args[:i], a.contiguous(), *args[i + 1 :])
        results = function(*args)
        # Backends write through pointers: without this, autograd would take what a backward has
        # saved of a buffer for unchanged.
        if written:
            torch.autograd.graph.increment_version([given[i] for i in written])
        return results

    run.__name__ = name
    return run


_library = torch.library.Library(NAMESPACE, "DEF")


def _register(name: str, schema: str, function: Callable, body: Callable, cpu: str) -> None:
    """function: of the reference. body(name, names of the arguments, which of them are written):
    what the op calls."""
    _references[name], _on_cpu[name] = function, cpu
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    arguments = torch._C.parse_schema(name + schema).arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info and a.alias_info.is_write]
    function = body(name, [a.name for a in arguments], written)
    _library.impl(name, function, "CompositeExplicitAutograd")


for _name, _schema in SCHEMAS.items():
    _register(_name, _schema, getattr(reference, _name), _implementation, "native")


def op(name: str):
    """The op's overload, as called by the public functions."""
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def define(name: str, schema: str, function: Callable, fake: Callable) -> None:
    """Adds an op of a subpackage: `function` is its reference, which also runs CPU tensors.

    Its backends get the tensors as they are, whatever their strides; the first argument chooses.
    """

    def body(name: str, arguments: list[str], written: list[int]) -> Callable:
        def run(*args):
            first = args[0]
            if first.dtype == torch.float64:
                return function(*args)
            return _resolve(name, first.device.type)[1](*args)

        run.__name__ = name
        return run

    SCHEMAS[name] = schema
    _register(name, schema, function, body, "reference")
    _fake(name)(fake)


def _fake(name: str) -> Callable[[Callable], Callable]:
    return torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_library)


def _float(sample: Tensor) -> torch.dtype:
    return torch.float64 if sample.dtype == torch.float64 else torch.float32


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@_fake("sde_step")
def _(velocity, uncond, scale, sample, table, step, seeds, noise, prev_sample, log_prob):
    return None


@_fake("log_prob")
def _(velocity, uncond, scale, sample, prev_sample, table, step):
    return sample.new_empty(sample.shape[0], dtype=_float(sample))


@_fake("log_prob_backward")
def _(grad, velocity, uncond, scale, sample, prev_sample, table, step, uncond_grad):
    return _like(velocity), _uncond_like(velocity, uncond, uncond_grad)


def _fake_loss(sample: Tensor) -> tuple[Tensor, ...]:
    dtype, rows = _float(sample), sample.shape[0]
    scalars = [sample.new_empty((), dtype=dtype) for _ in range(4)]
    per_row = [sample.new_empty(rows, dtype=dtype) for _ in range(2)]
    return (*scalars, *per_row, sample.new_empty((rows, 3), dtype=dtype))


@_fake("grpo_loss_forward")
def _(velocity, uncond, scale, sample, *rest):
    return _fake_loss(sample)


@_fake("grpo_loss_gradient")
def _(velocity, uncond, scale, sample, *rest):
    outputs = _fake_loss(sample)
    return (*outputs, _like(velocity), _uncond_like(velocity, uncond, rest[-1]))


@_fake("grpo_loss_backward")
def _(
    grad, coefs, velocity, uncond, scale, sample, prev, table, step, ref, ref_u, old, uncond_grad
):
    return _like(velocity), _uncond_like(velocity, uncond, uncond_grad)


@_fake("initial_noise")
def _(seeds, shape, dtype):
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)


def _uncond_like(velocity: Tensor, uncond: Tensor | None, uncond_grad: bool) -> Tensor:
    if uncond is None:
        return velocity.new_empty(0)
    return _like(uncond) if uncond_grad else uncond.new_empty(0)
