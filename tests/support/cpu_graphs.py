"""A recorder for `cuda_graphs.Graphs` that needs no GPU, and is as strict as a CUDA graph.

While a function is captured, every tensor operation is written down with the memory of its
operands. A replay runs these operations on that memory, and nothing of the function's Python: what
the function read from anywhere but tensors is frozen, a parameter that moved is read where it was,
and what lies in host memory or needs an answer from the device cannot be captured.
"""

from __future__ import annotations

import functools
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from flowgrpo import cuda_graphs
from flowgrpo.config import Config
from flowgrpo.policies import Policy
from flowgrpo.records import Trajectory
from flowgrpo.sampling.rollout import sample_images
from flowgrpo.train import Components
from support import setups

aten = torch.ops.aten
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select}
FROM_HOST = {aten.lift_fresh, aten.lift_fresh_copy}


class Recorder:
    """The two methods of `cuda_graphs.CudaRecorder`; counts its captures."""

    def __init__(self) -> None:
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, body):
        self.warm_ups += 1
        body()

    def capture(self, body):
        operations = Operations()
        with operations, _compiled(operations):
            result = body()
        self.captures += 1
        # As on a GPU: before the first replay there is nothing in the result.
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                tensor.data.fill_(torch.nan)

        def replay():
            self.replays += 1
            operations.run()

        return replay, result


class Operations(TorchDispatchMode):
    """Operations in the order they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.list: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        packet = operation.overloadpacket
        # Of tensors on the CPU the kernels read numbers, of others they do not.
        if packet in WAITING and not _called_from("flowgrpo_kernels"):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        if packet in FROM_HOST:
            raise RuntimeError("Cannot copy between CPU and CUDA tensors during CUDA graph capture")
        result = operation(*args, **(kwargs or {}))
        replay = _replay_of(operation)
        if replay is not None:
            # Aliases keep the memory, whatever becomes of the tensor object.
            args, kwargs, kept = tree_map_only(
                torch.Tensor, torch.Tensor.detach, (args, kwargs or {}, result)
            )
            self.list.append((replay, operation, args, kwargs, _tensors(kept)))
        return result

    @torch.no_grad()
    def run(self) -> None:
        for replay, *call in self.list:
            replay(*call)


@functools.cache
def _replay_of(operation):
    """How an operation is run again; None for a view, whose memory is that of its operand."""
    if operation.overloadpacket in (aten.empty, aten.empty_like, aten.new_empty):
        return _forget
    aliases = [r.alias_info for r in operation._schema.returns]
    if any(alias is not None and not alias.is_write for alias in aliases):
        return None
    return _in_place if aliases and all(aliases) else _anew


def _forget(operation, args, kwargs, kept) -> None:
    for tensor in kept:
        if tensor.is_floating_point():
            tensor.fill_(torch.nan)


def _in_place(operation, args, kwargs, kept) -> None:
    operation(*args, **kwargs)


def _anew(operation, args, kwargs, kept) -> None:
    """What is found anew goes into the memory of the first result."""
    found = operation(*args, **kwargs)
    found = [found] if isinstance(found, torch.Tensor) else _tensors(found)
    for old, new in zip(kept, found, strict=True):
        old.copy_(new)


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@contextmanager
def _compiled(operations: Operations):
    """Inside, what Inductor has compiled is one operation, whose kernels no mode could see."""
    from torch._inductor.output_code import CompiledFxGraph

    own = CompiledFxGraph.__call__

    def call(self, inputs):
        given = tree_map_only(torch.Tensor, torch.Tensor.detach, list(inputs))
        with _disable_current_modes():
            result = own(self, inputs)
        kept = tree_map_only(torch.Tensor, torch.Tensor.detach, result)
        again = lambda *values: own(self, list(values))  # noqa: E731
        operations.list.append((_anew, again, given, {}, _tensors(kept)))
        return result

    CompiledFxGraph.__call__ = call
    try:
        yield
    finally:
        CompiledFxGraph.__call__ = own


@functools.cache
def _parts(path: str) -> tuple[str, ...]:
    return Path(path).parts


def _called_from(folder: str) -> bool:
    frame = sys._getframe()
    while frame is not None:
        if folder in _parts(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def as_without_modes(transformer) -> None:
    """Let compiled blocks be compiled and called as where there is no mode: their guards look."""
    for block in transformer.transformer_blocks:

        def call(*args, own=block._compiled_call_impl, **kwargs):
            with _disable_current_modes():
                return own(*args, **kwargs)

        block._compiled_call_impl = call


def made(model, folder, **changes) -> tuple[Components, Config]:
    """Parts whose policy is captured by a `Recorder`, and their config."""
    config = setups.config(model, folder, **{"sample.share_prefix": False, **changes})
    parts = setups.parts(config)
    parts.policy.graphs = cuda_graphs.Graphs(parts.policy, Recorder())
    return parts, config


def eager(policy: Policy, call):
    """call() without graphs."""
    graphs, policy.graphs = policy.graphs, None
    try:
        return call()
    finally:
        policy.graphs = graphs


def evaluate(
    policy: Policy, steps: int = 5, rows: int = 6, scale: float = 1.0, batch_size: int = 3
) -> torch.Tensor:
    """Images by the deterministic sampler."""
    return sample_images(
        policy,
        policy.encode(setups.TEXTS[:3]),
        steps=steps,
        groups=torch.arange(rows) % 3,
        seeds=torch.arange(rows),
        batch_size=batch_size,
        uncond=policy.encode([""]) if scale != 1 else None,
        guidance_scale=scale,
    )


def assert_equal(one: Trajectory, other: Trajectory) -> None:
    """Bit for bit."""
    for name, value in vars(one).items():
        if value is not None:
            assert torch.equal(value, getattr(other, name)), name


class Silent:
    """The methods of `cuda_graphs.CudaRecorder`, for functions that are run and watched."""

    def __init__(self, watch) -> None:
        self.watch, self.captures = watch, 0

    def warm_up(self, body) -> None:
        body()

    def capture(self, body):
        before = len(self.watch.waits)
        result = body()
        assert self.watch.waits[before:] == []
        self.captures += 1
        return lambda: None, result
