"""Functions recorded as CUDA graphs, so that the host's share is paid once.

    graphs = Graphs(policy, CudaRecorder(policy.device))
    graphs(function, *arguments)        the result of function(*arguments), by one launch

The first call with new shapes runs the function twice, so that kernels are compiled and workspaces
exist, and records a further run. Tensors in the arguments (also inside dataclasses, tuples and
dicts) become static buffers that each call copies into. All other arguments, whether gradients are
on, and the switches of the policy's adapters are written into the graph; they decide which graph is
replayed.

1. The result lies in the graph's own memory and is overwritten by the next call: copy it.
2. A graph holds addresses. Those of every tensor of the policy's modules are compared before each
   replay; if one moved, the function is recorded again, and a log line says so. Values may change
   in place: optimizer steps and averaged weights need no new graph.
3. No two graphs run at the same time, so all share one memory pool: what one needs in between, the
   next may overwrite; inputs and results are held by their recording.
4. One stream serves every warm-up and capture, because cuBLAS has a workspace for each stream, and
   one that is first needed during a capture would lie in the pool.

What a function that is recorded must not do: wait for the device (`.item()`, `if tensor`), copy
between host and device (`.cpu()`, `torch.tensor(list, device="cuda")`), or keep a tensor that it
allocated for a later call. The first two raise `CaptureError` with the module and the line.
"""

from __future__ import annotations

import dataclasses
import gc
import logging
import traceback
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowgrpo.config import Config, ConfigError
from flowgrpo.policies import Policy, compiled, lora

WARM_UPS = 2
LIMIT = 12
"""Graphs that are kept. A run needs at most nine: the rollout's steps at four numbers of rows (or
the whole), its scouts, evaluation of the trained model, of the base and of that with guidance, the
update."""

log = logging.getLogger("flowgrpo")


class CaptureError(ConfigError):
    """A function cannot be recorded: it synchronises with the host, or memory ran out."""


class CudaRecorder:
    """Warms up and captures functions on a CUDA device: all of CUDA that `Graphs` knows."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self._broken: list[torch.cuda.CUDAGraph] = []

    def warm_up(self, body: Callable[[], Any]) -> None:
        """Run `body` until kernels are compiled and workspaces are allocated."""
        with self._aside():
            for _ in range(WARM_UPS):
                body()

    def capture(self, body: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record the kernels of `body`.

        Returns:
            A function that runs the recorded kernels again, and the result of `body`.
        """
        graph = torch.cuda.CUDAGraph()
        # A destructor that unloads a kernel or destroys an event would end the capture.
        gc.collect()
        enabled = gc.isenabled()
        gc.disable()
        # thread_local: threads that compute rewards may go on using the device meanwhile.
        recording = partial(
            torch.cuda.graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        )
        try:
            # _aside too puts the caller's stream back: torch.cuda.graph does not after a failure.
            with self._aside(), recording(graph):
                result = body()
        except BaseException:
            self._abandon(graph)
            raise
        finally:
            if enabled:
                gc.enable()
        return graph.replay, result

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Clean up after a capture that broke.

        torch (2.11) leaves its allocator and its generator in the state of capturing then, in which
        giving memory back and drawing numbers raise.
        """
        index = self.device.index
        index = torch.cuda.current_device() if index is None else index
        # RuntimeError: the capture itself has ended well, and so has the allocator's. The names are
        # torch's own, and another version may have others.
        with suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(index, self.pool)
            torch._C._cuda_releasePool(index, self.pool)
        generator = torch.cuda.default_generators[index]
        generator.graphsafe_set_state(generator.clone_state())
        # Its address stays with the allocator of pinned memory, and its memory in the pool.
        self._broken.append(graph)
        self.pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def _aside(self):
        """Switch to the stream of this recorder, in order with the launches before and after."""
        main = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(main)
        try:
            with torch.cuda.stream(self.stream):
                yield
        finally:
            main.wait_stream(self.stream)


@dataclass(frozen=True)
class Recording:
    """A graph of one function for arguments of one signature, with its static buffers."""

    inputs: list[Tensor]
    """The static buffers, in the order of the tensors in the arguments."""
    replay: Callable[[], None]
    result: Any
    addresses: tuple[int, ...]
    """Addresses of all tensors that the graph reads or writes beside its inputs."""


class Graphs:
    """The recorded functions of one policy."""

    def __init__(self, policy: Policy, recorder: CudaRecorder) -> None:
        self.policy, self.recorder = policy, recorder
        self.recordings: dict[Any, Recording] = {}

    def __call__(
        self,
        function: Callable[..., Any],
        *arguments: Any,
        changes: Sequence[Tensor] = (),
        option: str = "sample.capture",
    ) -> Any:
        """Run `function(*arguments)` as a graph, recorded at the first call with these shapes.

        Args:
            changes: tensors that the function changes in place, beside what it returns. Recording
                leaves them as they were.
            option: the field of the configuration that an error message names.

        Returns:
            The result, valid until the next call.

        Raises:
            CaptureError: the function cannot be recorded. No graph is kept of it, and `changes`
                have their values.
        """
        tensors: list[Tensor] = []
        signature = _signature(arguments, tensors)
        key = (function, signature, torch.is_grad_enabled(), _switches(self.policy))
        addresses = (*_addresses(self.policy), *(t.data_ptr() for t in changes))
        # Taken out and put back, which makes it the last in the order of use.
        recording = self.recordings.pop(key, None)
        if recording is not None and recording.addresses != addresses:
            log.warning(
                "%s is captured again, because the storage of %s moved; weights that are changed "
                "in place spare this",
                function.__name__,
                _moved(self.policy, recording.addresses, addresses),
            )
            recording = None
        if recording is None:
            recording = self._record(function, arguments, tensors, changes, addresses, option)
        self.recordings[key] = recording
        for static, tensor in zip(recording.inputs, tensors, strict=True):
            static.copy_(tensor)
        recording.replay()
        return recording.result

    def _record(
        self,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        tensors: list[Tensor],
        changes: Sequence[Tensor],
        addresses: tuple[int, ...],
        option: str,
    ) -> Recording:
        self._make_room(function, option)
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        remaining = iter(inputs)
        static_arguments = _replace_tensors(arguments, lambda _: next(remaining))
        before = [t.clone() for t in changes]
        problems: list[Exception] = []

        def body() -> Any:
            try:
                return function(*static_arguments)
            except Exception as error:
                # Ending a broken capture raises once more; this error says why it broke.
                problems.append(error)
                raise

        warm = False
        try:
            self.recorder.warm_up(body)
            warm = True
            with compiled.no_recompile() if self.policy.compiled else nullcontext():
                replay, result = self.recorder.capture(body)
        except Exception as error:
            first = problems[0] if problems else error
            full = isinstance(first, torch.OutOfMemoryError)
            if not (warm or full):
                # The function's own mistake, with or without a graph.
                raise
            explain = _explain_memory if full else _explain
            message = explain(first, function, self.policy, option)
            # The frames hold the tensors of the function that broke off.
            for problem in (first, error):
                traceback.clear_frames(problem.__traceback__)
            raise CaptureError(message) from first
        finally:
            for tensor, value in zip(changes, before, strict=True):
                tensor.copy_(value)
        shapes = ", ".join(str(list(t.shape)) for t in inputs[:2])
        log.info("captured %s for inputs %s, ...", function.__name__, shapes)
        return Recording(inputs, replay, result, addresses)

    def _make_room(self, function: Callable[..., Any], option: str) -> None:
        """Drop the least recently used graph when there are `LIMIT` of them."""
        if len(self.recordings) >= LIMIT:
            log.warning(
                "%s came with a shape that none of its graphs was made for, and %d graphs are "
                "kept already: the oldest is dropped; keep batch size and text length fixed, or "
                "set %s to off",
                function.__name__,
                LIMIT,
                option,
            )
            del self.recordings[next(iter(self.recordings))]


def prepare(policy: Policy, config: Config) -> None:
    """Set `policy.graphs`, by which rollouts and evaluations of the policy are captured, or None.

    Raises:
        ConfigError: the configuration asks for capture where there is no CUDA device.
    """
    cuda = policy.device.type == "cuda"
    for name, section in (("sample", config.sample), ("optim", config.optim)):
        if section.capture == "on" and not cuda:
            raise ConfigError(
                f"{name}.capture is on with policy.device {policy.device}, but CUDA graphs need a "
                f"CUDA device; set {name}.capture to off, or policy.device to cuda."
            )
    # Config refuses "on" for a sharded transformer, whose weights have no address to stay at.
    capture = cuda and config.sample.capture != "off" and not policy.sharded
    policy.graphs = Graphs(policy, CudaRecorder(policy.device)) if capture else None
    evaluated = policy.evaluated
    if evaluated is not policy:
        # One pool of memory, as no two graphs run at the same time.
        evaluated.graphs = Graphs(evaluated, policy.graphs.recorder) if capture else None


# Not torch.utils._pytree: every record and every section of the configuration would have to be
# registered, the walk before each replay takes a fifth longer, and a section without tensors would
# be built, and so checked, anew.
def _signature(value: Any, tensors: list[Tensor]) -> Any:
    """Build a hashable key of `value`, with shape, dtype and device in the place of tensors.

    The tensors are appended to `tensors`. Walks tuples, lists, dicts and dataclasses.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return value.shape, value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_signature(item, tensors) for item in value)
    if isinstance(value, dict):
        return tuple((name, _signature(item, tensors)) for name, item in value.items())
    if _is_record(value):
        fields = dataclasses.fields(value)
        return type(value), *(_signature(getattr(value, f.name), tensors) for f in fields)
    return value


def _replace_tensors(value: Any, replacement: Callable[[Tensor], Tensor]) -> Any:
    """Replace the tensors in `value`, in the order of `_signature`; what has none stays itself."""
    if isinstance(value, Tensor):
        return replacement(value)
    if isinstance(value, tuple | list):
        items = [_replace_tensors(item, replacement) for item in value]
        changed = any(new is not old for new, old in zip(items, value, strict=True))
        return type(value)(items) if changed else value
    if isinstance(value, dict):
        named = {name: _replace_tensors(item, replacement) for name, item in value.items()}
        changed = any(named[name] is not item for name, item in value.items())
        return named if changed else value
    if _is_record(value):
        old = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        new = {name: _replace_tensors(item, replacement) for name, item in old.items()}
        replaced = {name: item for name, item in new.items() if item is not old[name]}
        return dataclasses.replace(value, **replaced) if replaced else value
    return value


def _is_record(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def _roots(policy: Policy) -> list[nn.Module]:
    """List the modules that a policy computes with: its transformer, and a copy as reference."""
    return [value for value in vars(policy).values() if isinstance(value, nn.Module)]


def _switches(policy: Policy) -> tuple[Any, ...]:
    """Collect what the modules decide in Python, which a replayed graph would not notice."""
    switches: list[Any] = [id(policy.transformer), policy.transformer.training]
    for module in _modules(policy.transformer):
        # Every PEFT layer has it in its own dict; hasattr on a module raises and catches an error.
        if "scaling" in vars(module):
            names = (tuple(module.active_adapters), tuple(module.merged_adapters))
            product = lora.product_of(module)
            # Merged matrices are read, and are no part of the graph; see policies/lora.py.
            ready = product is not None and product.matrices is not None
            initial = product is not None and product.initial
            flags = (module.disable_adapters, ready, initial)
            switches.append((*flags, *names, *module.scaling.items()))
            if ready and product.matrices is not product.fixed:
                raise RuntimeError(
                    "a graph was asked for inside Policy.frozen_weights, whose matrices will be "
                    "let go; set policy.graphs first, or enter frozen_weights with fixed=True"
                )
    return tuple(switches)


def _tensor_names(policy: Policy) -> list[str]:
    """Name the tensors of the policy and its modules, in the order of `_addresses`."""
    names = [name for name, value in vars(policy).items() if isinstance(value, Tensor)]
    for root in _roots(policy):
        paths = {module: path for path, module in root.named_modules()}
        for module in _modules(root):
            for tensors in (module._parameters, module._buffers):
                names += [
                    f"{paths[module]}.{name}".lstrip(".")
                    for name, tensor in tensors.items()
                    if tensor is not None
                ]
    return names


def _addresses(policy: Policy) -> tuple[int, ...]:
    """Collect the addresses of the tensors of the policy and its modules."""
    addresses = [t.data_ptr() for t in vars(policy).values() if isinstance(t, Tensor)]
    # Walked anew in every call: a list made once would miss a replaced module or parameter.
    for root in _roots(policy):
        for module in _modules(root):
            for tensors in (module._parameters, module._buffers):
                addresses += [t.data_ptr() for t in tensors.values() if t is not None]
    return tuple(addresses)


def _modules(root: nn.Module) -> list[nn.Module]:
    """List `root` and all modules below it."""
    # Not torch's `modules()`, which takes half as long again: SD3.5-medium with adapters has 2951
    # modules, walked over twice before each replay.
    modules = [root]
    for module in modules:
        modules += [child for child in module._modules.values() if child is not None]
    return modules


def _moved(policy: Policy, old: tuple[int, ...], new: tuple[int, ...]) -> str:
    """Name the tensors whose addresses changed, for the log."""
    names = _tensor_names(policy)
    if len(old) != len(new):
        return "the set of parameters"
    changed = [i for i, (a, b) in enumerate(zip(old, new, strict=True)) if a != b]
    first = names[changed[0]] if changed[0] < len(names) else "a gradient"
    return first if len(changed) == 1 else f"{first} and {len(changed) - 1} more"


def _explain(error: BaseException, function: Callable, policy: Policy, option: str) -> str:
    """Compose the message for an error in a capture: the module, the line and its error."""
    names = {module: name for name, module in policy.transformer.named_modules()}
    where, owner = "", None
    for frame, line in traceback.walk_tb(error.__traceback__):
        if isinstance(frame.f_locals.get("self"), nn.Module):
            owner = frame.f_locals["self"]
        # Inside torch itself the line says nothing; the caller's does.
        if Path(torch.__file__).parent not in Path(frame.f_code.co_filename).parents:
            where = f"{Path(frame.f_code.co_filename).name}, line {line}"
    # Outside of all modules, as in a backward pass, it is the function itself.
    kind = function.__name__ if owner is None else type(owner).__name__
    name = f" {names[owner]}" if names.get(owner) else ""
    return (
        f"{kind}{name} does something that a CUDA graph of {function.__name__} cannot hold "
        f"({where}: {_first_line(error)}), but inside it nothing may wait for the device or copy "
        f"from host memory; mend that line, or set {option} to off."
    )


def _explain_memory(error: BaseException, function: Callable, policy: Policy, option: str) -> str:
    """Compose the message for a capture that ran out of memory."""
    return (
        f"capturing {function.__name__} of {type(policy.transformer).__name__} ran out of device "
        f"memory ({_first_line(error)}), which a graph needs for good; lower sample.batch_size, or "
        f"set {option} to off."
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
