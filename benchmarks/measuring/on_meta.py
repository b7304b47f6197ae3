"""torch's `meta` device as a stand-in for a GPU: counts of launches, waits and bytes.

Tensors on `meta` have shapes and no memory, so models of real size run through the trainer's
functions in seconds. `Watch` sees every operation below autograd and counts

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
"""Bytes: CUDA's caching allocator hands out multiples of it."""
aten = torch.ops.aten
ALLOCATIONS = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
}
ALLOCATIONS |= {aten._unsafe_view, aten.lift_fresh}
"""Operations beside views that launch nothing."""
READS = {aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select, aten._unique2}
"""Operations whose result, or the shape of it, the host learns from the device."""
DRAWS = {aten.uniform_, aten.normal_}
"""Operations that fill a tensor with values, which there are none of on `meta`."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}


class MixedDevices(RuntimeError):
    """An operation on tensors of host and device together."""


class Watch(TorchDispatchMode):
    """Counts the operations inside ``with watch:`` and the memory of the device's tensors."""

    def __init__(self, device: str = DEVICE) -> None:
        super().__init__()
        self.device = device
        self.live = self.most = 0
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []
        self._known: dict[int, tuple[Any, int]] = {}
        self._layouts: dict[Any, tuple[list[tuple[Any, ...]], bool]] = {}

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
        tensors = list(_tensors((*args, *kwargs.values())))
        ours = [t for t in tensors if self._here(t)]
        if packet in (aten._to_copy, aten.copy_):
            return self._copied(operation, tensors, args, kwargs)
        if packet in READS and ours:
            self._wait(operation)
            return self._answer(packet, ours[0])
        index = packet in INDEXING
        if ours and len(ours) < len(tensors):
            # A number in a 0-dim tensor on the host is handed to a kernel, but not an index.
            strange = [t for t in tensors if not self._here(t) and (t.ndim or index)]
            if strange:
                shapes = ", ".join(f"{list(t.shape)} on {t.device}" for t in tensors)
                raise MixedDevices(f"{operation} was given {shapes}, at {_caller()}")
        if index and any(t.dtype == torch.bool for t in ours[1:]):
            self._wait(operation)
        result = self._run(operation, args, kwargs)
        self._count(operation, result)
        return result

    def _run(self, operation, args, kwargs):
        """The operation's result. `meta` derives sizes in Python, which is most of the time; where
        they were derived before, empty tensors of these sizes are made instead."""
        if operation.overloadpacket in DRAWS and args[0].device.type == DEVICE:
            return args[0]
        if self.device != DEVICE or not _makes_tensors(operation):
            return operation(*args, **kwargs)
        key = (operation, _described(args), _described(sorted(kwargs.items())))
        if key in self._layouts:
            layouts, single = self._layouts[key]
            tensors = [torch.empty_strided(*sizes, dtype=d, device=DEVICE) for *sizes, d in layouts]
            return tensors[0] if single else tuple(tensors)
        result = operation(*args, **kwargs)
        single = isinstance(result, Tensor)
        tensors = (result,) if single else result
        if all(isinstance(t, Tensor) and self._here(t) for t in tensors):
            self._layouts[key] = [(t.shape, t.stride(), t.dtype) for t in tensors], single
        return result

    def _here(self, tensor: Tensor) -> bool:
        return tensor.device.type == self.device

    def _copied(self, operation, tensors, args, kwargs):
        """Count a copy, perhaps between host and device."""
        source = tensors[-1]
        to = torch.device(kwargs.get("device") or source.device)
        if operation.overloadpacket is aten.copy_:
            to = tensors[0].device
        crosses = (to.type == self.device) != self._here(source)
        # Numbers travel in the launch; and a copy from pinned memory need not be waited for.
        if crosses and not (source.ndim == 0 and not self._here(source)):
            self._wait(operation)
        if crosses and self._here(source):
            if operation.overloadpacket is aten.copy_:
                return tensors[0].zero_()
            return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        result = self._run(operation, args, kwargs)
        self._count(operation, result)
        return result

    def _answer(self, packet, tensor: Tensor):
        """A stand-in for values that do not exist."""
        if packet is aten.equal:
            return True
        if packet is aten._local_scalar_dense:
            return 1.0 if tensor.is_floating_point() else 1
        if packet is aten.nonzero:
            return tensor.new_zeros((1, tensor.ndim), dtype=torch.int64)
        raise NotImplementedError(f"{packet} on {self.device}, at {_caller()}")

    def _wait(self, operation) -> None:
        self.waits.append(f"{operation} at {_caller()}")

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
    """Counts waits that never reach a dispatch mode on `meta`: tensors made of Python's numbers,
    and lists as indices. Off inside backward passes, as torch has it."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        creates = function in (torch.tensor, torch.as_tensor, torch.asarray)
        if (
            creates
            and str(kwargs.get("device")) == self.watch.device
            and not isinstance(args[0], Tensor)
        ):
            self.watch._wait(function.__name__)
        indexed = function in (Tensor.__getitem__, Tensor.__setitem__) and self.watch._here(args[0])
        if indexed and any(isinstance(i, list) for i in _indices(args[1])):
            self.watch._wait("a list as an index")
        return function(*args, **kwargs)


@cache
def _computes(operation) -> bool:
    """Test for an operation that launches something: no view, no allocation."""
    aliases = [r.alias_info for r in operation._schema.returns]
    view = any(info is not None and not info.is_write for info in aliases)
    return not view and operation.overloadpacket not in ALLOCATIONS


@cache
def _makes_tensors(operation) -> bool:
    """Test for an operation that writes to nothing and whose results are all new tensors."""
    schema = operation._schema
    new = all(r.alias_info is None and str(r.type) == "Tensor" for r in schema.returns)
    return new and bool(schema.returns) and not schema.is_mutable


def _described(value: Any) -> Any:
    """All of an argument that the sizes of results depend on, to look them up by."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device.type
    if isinstance(value, list | tuple):
        return tuple(map(_described, value))
    return type(value), value


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among arguments or results, in order."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _indices(index: Any) -> tuple[Any, ...]:
    """The indices of one subscript, an index for each dimension."""
    return index if isinstance(index, tuple) else (index,)


def _flash(attention, device, query, key, value, mask=None, dropout_p=0.0, is_causal=False, **more):
    """scaled_dot_product_attention by the flash kernel; `attention` is torch's."""
    mask = more.pop("attn_mask", mask)
    if query.device.type != device or mask is not None:
        return attention(query, key, value, mask, dropout_p, is_causal, **more)
    if device != DEVICE and torch.is_autocast_enabled(device):
        half = torch.get_autocast_dtype(device)
        query, key, value = (x.to(half) for x in (query, key, value))
    kernel = aten._scaled_dot_product_flash_attention
    return kernel(query, key, value, dropout_p, is_causal, scale=more.get("scale"))[0]


def _caller() -> str:
    """The innermost line of this project, and the innermost outside torch."""
    other = ""
    for frame, line in traceback.walk_stack(sys._getframe(1)):
        name, project = _source(frame.f_code.co_filename)
        if not name:
            continue
        other = other or f"{name}:{line}"
        if project:
            innermost = f"{name}:{line}"
            return other if innermost == other else f"{other}, called from {innermost}"
    return other


@cache
def _source(filename: str) -> tuple[str, bool]:
    """(name of a source file, whether it is of this project); no name for this file and torch's."""
    path = Path(filename)
    if path == Path(__file__).resolve() or Path(torch.__file__).parent in path.parents:
        return "", False
    return path.name, bool({"flowgrpo", "flowgrpo_kernels", "benchmarks"} & set(path.parts))


@contextmanager
def watching(watch: Watch | None = None) -> Iterator[Watch]:
    """Count everything on the watched device, by `watch` or a new one."""
    watch = watch or Watch()
    with watch, Functions(watch), _as_on_a_gpu(watch.device):
        yield watch


@contextmanager
def pretending() -> Iterator[Watch]:
    """Count tensors on "cpu", which have no memory inside: for code under autocast, which `meta`
    does not have, and which reads no values. The CPU's autocast leaves normalisations in 16 bits
    that CUDA's computes, and keeps for the backward, in float32: the count is a lower bound."""
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
    """Let torch choose the kernels of a GPU, which its lists of device types keep from this device:
    attention without a matrix of scores, and those for many tensors at once in optimizer and
    gradient clipping."""
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    lists = [(optimizer, "_get_fused_kernels_supported_devices")]
    lists += [(m, "_get_foreach_kernels_supported_devices") for m in (optimizer, foreach)]
    attention = partial(_flash, torch.nn.functional.scaled_dot_product_attention, device)
    with ExitStack() as stack:
        stack.enter_context(
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attention)
        )
        for module, name in lists:
            allowed = [*getattr(module, name)(), device]
            stack.enter_context(mock.patch.object(module, name, lambda allowed=allowed: allowed))
        yield
