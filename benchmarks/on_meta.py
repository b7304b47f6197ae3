"""torch's `meta` device as a stand-in for a GPU: what is launched, awaited and alive, by counting.

Tensors on `meta` have shapes and no memory, so models of real size run through the trainer's own
functions in seconds. `Watch` is told every operation below autograd and keeps

    launches    operations that compute or copy; views and empty tensors are none. A proxy: most are
                one kernel on a GPU, some are several, and a fused one may be a chain here
    waits       places where the host would wait for the device: a number read from a tensor, a
                shape that depends on values, a copy from the device, or one to it from ordinary
                memory. The program goes on with ones for numbers, zeros for copies
    live, most  bytes of tensors now and at most, in blocks of 512 as CUDA's allocator rounds them;
                no fragmentation, no workspaces of libraries, no pools of graphs

and raises where a tensor on the host meets one on the device.
"""

from __future__ import annotations

import gc
import sys
import traceback
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils as foreach
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "meta"
BLOCK = 512
"""Bytes; CUDA's caching allocator hands out multiples of it."""
aten = torch.ops.aten
NOTHING = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
NOTHING |= {aten._unsafe_view, aten.lift_fresh}
"""Operations that launch nothing, beside views."""
VALUES = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2}
"""Whose result, or the shape of it, the host learns from the device."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class MixedDevices(RuntimeError):
    """An operation was given tensors of host and device."""


class Watch(TorchDispatchMode):
    """Counts the operations inside ``with watch:`` and the memory of the device's tensors."""

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        self.device = device
        self.live = self.most = 0
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []
        self._known: dict[int, tuple[Any, int]] = {}

    @property
    def launches(self) -> int:
        return sum(self.operations.values())

    def restart(self) -> None:
        """Count from here; what is alive stays alive."""
        gc.collect()
        self.most = self.live
        self.operations.clear()
        self.waits.clear()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        packet = operation.overloadpacket
        given = list(_tensors((*args, *kwargs.values())))
        ours = [t for t in given if self._here(t)]
        if packet in (aten._to_copy, aten.copy_):
            return self._copied(operation, given, args, kwargs)
        if packet in VALUES and ours:
            self._wait(operation)
            return self._answer(packet, ours[0])
        index = packet in INDEXING
        if ours and len(ours) < len(given):
            # A number in a 0-dim tensor on the host is handed to a kernel, but not an index.
            strange = [t for t in given if not self._here(t) and (t.ndim or index)]
            if strange:
                shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in given)
                raise MixedDevices(f"{operation} was given {shapes}, at {_place()}")
        if index and any(t.dtype == torch.bool for t in ours[1:]):
            self._wait(operation)
        result = operation(*args, **kwargs)
        self._count(operation, result)
        return result

    def _here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device

    def _copied(self, operation, given, args, kwargs):
        """A copy, perhaps between host and device."""
        source = given[-1]
        to = torch.device(kwargs.get("device") or source.device)
        if operation.overloadpacket is aten.copy_:
            to = given[0].device
        crosses = (to.type == self.device) != self._here(source)
        # Numbers travel in the launch; and a copy from pinned memory need not be waited for.
        if crosses and not (source.ndim == 0 and not self._here(source)):
            self._wait(operation)
        if crosses and self._here(source):
            if operation.overloadpacket is aten.copy_:
                return given[0].zero_()
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        result = operation(*args, **kwargs)
        self._count(operation, result)
        return result

    def _answer(self, packet, tensor: Tensor):
        """What stands for values that are not there."""
        if packet is aten.equal:
            return True
        if packet is aten._local_scalar_dense:
            return 1.0 if tensor.is_floating_point() else 1
        if packet is aten.nonzero:
            return tensor.new_zeros((1, tensor.ndim), dtype=torch.int64)
        raise NotImplementedError(f"{packet} on {self.device}, at {_place()}")

    def _wait(self, operation) -> None:
        self.waits.append(f"{operation} at {_place()}")

    def _count(self, operation, result) -> None:
        here = False
        for tensor in _tensors((result,)):
            if self._here(tensor):
                here = True
                self._adopt(tensor)
        if (here or operation.namespace == "flowgrpo") and _computes(operation):
            self.operations[str(operation.overloadpacket)] += 1

    def _adopt(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self._known[key] = (weakref.ref(storage, lambda _: self._release(key)), size)
        self.live += size
        self.most = max(self.most, self.live)

    def _release(self, key: int) -> None:
        self.live -= self._known.pop(key)[1]


class Functions(TorchFunctionMode):
    """What never reaches a dispatch mode on `meta`: tensors made of Python's numbers, and lists as
    indices. Off inside backward passes, as torch has it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        made = function in (torch.tensor, torch.as_tensor, torch.asarray)
        if (
            made
            and str(kwargs.get("device")) == self.watch.device
            and not isinstance(args[0], Tensor)
        ):
            self.watch._wait(function.__name__)
        indexed = function in (Tensor.__getitem__, Tensor.__setitem__) and self.watch._here(args[0])
        if indexed and any(isinstance(i, list) for i in tree_of(args[1])):
            self.watch._wait("a list as an index")
        return function(*args, **kwargs)


@cache
def _computes(operation) -> bool:
    """Whether it launches something: no view, no allocation."""
    aliases = [r.alias_info for r in operation._schema.returns]
    view = any(info is not None and not info.is_write for info in aliases)
    return not view and operation.overloadpacket not in NOTHING


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def tree_of(index: Any) -> tuple[Any, ...]:
    return index if isinstance(index, tuple) else (index,)


def _flash(own, device, query, key, value, mask=None, dropout_p=0.0, is_causal=False, **more):
    """scaled_dot_product_attention; `own` is torch's."""
    mask = more.pop("attn_mask", mask)
    if query.device.type != device or mask is not None:
        return own(query, key, value, mask, dropout_p, is_causal, **more)
    if device != DEVICE and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        query, key, value = (x.to(half) for x in (query, key, value))
    kernel = aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, scale=more.get("scale"))[0]


def _place() -> str:
    """The innermost line that is this project's, and the innermost that is not torch's."""
    own, other = "", ""
    root, skipped = Path(__file__).resolve(), Path(torch.__file__).parent
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        path = Path(frame.f_code.co_filename)
        if path == root or skipped in path.parents:
            continue
        other = other or f"{path.name}:{line}"
        if not own and {"flowgrpo", "flowgrpo_kernels", "benchmarks"} & set(path.parts):
            own = f"{path.name}:{line}"
    return other if own in ("", other) else f"{other}, called from {own}"


@contextmanager
def watching(watch: Watch | None = None) -> Iterator[Watch]:
    """Inside, everything on the watched device is counted, by `watch` or a new one."""
    watch = watch or Watch()
    with watch, Functions(watch), _as_on_a_gpu(watch.device):
        yield watch


@contextmanager
def pretending() -> Iterator[Watch]:
    """Inside, tensors on "cpu" have no memory and are the ones that are counted: for code under
    autocast, which `meta` does not have, and which reads no values. The CPU's autocast leaves
    normalisations in 16 bits that CUDA's computes, and keeps for the backward, in float32: what is
    counted is at most what a GPU would hold."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    moving = mock.patch.object(nn.Module, "_apply", _apply)
    with FakeTensorMode(), watching(Watch("cpu")) as watch, moving:
        yield watch


def _apply(
    self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True
) -> nn.Module:
    """nn.Module._apply, which cannot exchange the contents of tensors without memory."""
    for module in self.modules() if recurse else [self]:
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is not None and (new := function(old)) is not old:
                    kind = isinstance(old, nn.Parameter)
                    tensors[name] = nn.Parameter(new, old.requires_grad) if kind else new
    return self


@contextmanager
def _as_on_a_gpu(device: str) -> Iterator[None]:
    """Inside, torch takes the kernels that it would take on a GPU and, by its lists of device
    types, not here: attention without a matrix of scores, and those for many tensors at once in
    optimizer and gradient clipping."""
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    found = [(optimizer, "_get_fused_kernels_supported_devices")]
    found += [(m, "_get_foreach_kernels_supported_devices") for m in (optimizer, foreach)]
    attention = partial(_flash, torch.nn.functional.scaled_dot_product_attention, device)
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)
        )
        for module, name in found:
            allowed = [*getattr(module, name)(), device]
            stack.enter_context(mock.patch.object(module, name, lambda allowed=allowed: allowed))
        yield
