"""Frozen linear layers in 4 or 8 bits, made whole again for each product.

    quantizer   library        a weight                                         bytes
    nf4         bitsandbytes   one of 16 numbers, times the largest of its 64   0.5625
    int8        bitsandbytes   -127 to 127, times the largest of its row        1
    fp8         torch          float8_e4m3fn, times a scale of its row          1

    y = x W'^T + b        W' = dequantised W, in the type that W had

W' exists while a product runs: forward and backward make it anew, and autograd keeps nothing of it.
So rollout, update and reference multiply the same numbers by the same kernel, whatever their rows
and whether gradients are on, and the first ratio of an update is 1. The libraries' own layers do
not promise that: bitsandbytes' Linear4bit has another kernel for a single row without gradients,
and its Linear8bitLt rounds the activations too, by what else is in the batch; diffusers loads
these. Here a library packs and unpacks, and torch multiplies.

`QuantizedLinear` is an nn.Linear without a parameter `weight`: reading `weight` dequantises. PEFT
puts its adapters on it as on any linear layer, and lora.py merges them with W' in each call. It is
saved nowhere: a run saves adapters, and the model comes from its files.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import require
from flowgrpo.policies.weight_digests import digest_of

BLOCK = 64
"""Weights of nf4 that share a scale, in the order of memory."""


@dataclass(frozen=True)
class Quantizer:
    """One way to store a weight [out, in]; see `QUANTIZERS`."""

    library: str
    """Package that packs and unpacks."""
    pack: Callable[[Tensor], dict[str, Tensor]]
    """A weight on its device -> the tensors that it is stored as, by name."""
    unpack: Callable[[dict[str, Tensor], torch.Size, torch.dtype], Tensor]
    """These, the weight's shape and its type -> the dequantised weight."""


def _pack_nf4(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes import functional

    # As one row: in unpacking several, the CPU's kernel (0.50.2) begins a block with each of them,
    # and in packing it does not.
    flat = weight.reshape(-1)
    codes, state = functional.quantize_4bit(flat, blocksize=BLOCK, quant_type="nf4")
    return {"codes": codes, "scales": state.absmax}


def _unpack_nf4(packed: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    state = functional.QuantState(
        absmax=packed["scales"],
        shape=torch.Size((shape.numel(),)),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
    )
    return functional.dequantize_4bit(packed["codes"], state).view(shape)


def _pack_int8(weight: Tensor) -> dict[str, Tensor]:
    from bitsandbytes import functional

    # The type that the GPU's kernel takes; its 11 bits are more than the 8 that are kept.
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return {"codes": codes, "scales": scales}


def _unpack_int8(packed: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    from bitsandbytes import functional

    return functional.int8_vectorwise_dequant(packed["codes"], packed["scales"]).to(dtype)


def _pack_fp8(weight: Tensor) -> dict[str, Tensor]:
    whole = weight.float()
    largest = whole.abs().amax(dim=1, keepdim=True)
    # A row of zeros has the scale 1.
    scales = torch.where(largest > 0, largest / torch.finfo(torch.float8_e4m3fn).max, 1.0)
    return {"codes": (whole / scales).to(torch.float8_e4m3fn), "scales": scales}


def _unpack_fp8(packed: dict[str, Tensor], shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return (packed["codes"].float() * packed["scales"]).to(dtype)


QUANTIZERS = MappingProxyType(
    {
        "nf4": Quantizer("bitsandbytes", _pack_nf4, _unpack_nf4),
        "int8": Quantizer("bitsandbytes", _pack_int8, _unpack_int8),
        "fp8": Quantizer("torch", _pack_fp8, _unpack_fp8),
    }
)
"""Value of policy.quantize and policy.quantize_text -> how a weight is stored."""
MODULATION = MappingProxyType({"nf4": "int8"})
"""Value of policy.quantize -> another quantizer for the layers that modulate by the time."""


def describe(name: str) -> str:
    """Name a quantizer with its library and the library's version."""
    library = QUANTIZERS[name].library
    return f"{name} ({library} {metadata.version(library)})"


class QuantizedLinear(nn.Linear):
    """An nn.Linear whose frozen weight is packed; made by `quantize_layers`.

    Its buffers are the packed tensors, `codes` and `scales`. They are not saved with a model.
    """

    def __init__(self, linear: nn.Linear, quantizer: str, device: torch.device) -> None:
        # Not nn.Linear's, which would make a parameter `weight`.
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.quantizer, self.compute_dtype = quantizer, linear.weight.dtype
        self.digest = digest_of(linear.weight.detach())
        """Digest of the weight before it was packed."""
        bias = linear.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().to(device), requires_grad=False)
        self.register_parameter("bias", bias)
        packed = QUANTIZERS[quantizer].pack(linear.weight.detach().to(device).contiguous())
        for name, tensor in packed.items():
            self.register_buffer(name, tensor, persistent=False)
        self.train(linear.training)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight [out, in], anew in each reading."""
        shape = torch.Size((self.out_features, self.in_features))
        packed = {name: self._buffers[name] for name in ("codes", "scales")}
        return QUANTIZERS[self.quantizer].unpack(packed, shape, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return _Product.apply(x, self)

    def extra_repr(self) -> str:
        """Its sizes and its quantizer, for print(model)."""
        return f"{super().extra_repr()}, quantizer={self.quantizer}"


class _Product(torch.autograd.Function):
    """x W'^T + b, of which autograd keeps nothing."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, None]:
        return torch.matmul(grad, ctx.layer.weight) if ctx.needs_input_grad[0] else None, None


@torch.no_grad()
def quantize_layers(
    model: nn.Module,
    layers: Collection[nn.Module],
    quantizer: str,
    device: torch.device,
    field: str,
) -> None:
    """Replace each nn.Linear of `model` that is among `layers` by a `QuantizedLinear`, in place.

    A weight is packed on `device`, one after the other, so that all of them are never there in
    full, and stays there.

    Args:
        field: that asked for it, such as policy.quantize, for the errors.

    Raises:
        ConfigError: the library is not installed, has no kernel for the device, or a weight has
            values that cannot be stored.
    """
    chosen = set(layers)
    places = [
        (parent, name, child, f"{path}.{name}" if path else name)
        for path, parent in model.named_modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and child in chosen
    ]
    if not places:
        return
    with _quiet():
        _try(quantizer, device, places[0][2].weight.dtype, field)
        for parent, name, child, path in places:
            _check(child.weight, path, quantizer, field)
            setattr(parent, name, QuantizedLinear(child, quantizer, device))


def _check(weight: Tensor, path: str, quantizer: str, field: str) -> None:
    """Raise ConfigError for a weight that has no scale: a NaN, an infinity, or past float16."""
    if weight.is_meta:
        return
    largest = weight.abs().max().item()
    require(
        # False for NaN.
        largest <= torch.finfo(torch.float16).max,
        f"{field} is {quantizer}, but the weights of {path} reach {largest:g}, and at most "
        f"{torch.finfo(torch.float16).max:g} can be stored; set {field} to none, or restore the "
        "model's files.",
    )


def _try(quantizer: str, device: torch.device, dtype: torch.dtype, field: str) -> None:
    """Raise ConfigError unless a small weight can be packed and unpacked on `device`."""
    library = QUANTIZERS[quantizer].library
    try:
        metadata.version(library)
        __import__(library)
    except Exception as error:
        raise ConfigError(
            f"{field} is {quantizer}, which needs the package {library}, but it cannot be imported "
            f"({type(error).__name__}: {_line(error)}); install it by pip install "
            f"'flowgrpo[quantize]', or set {field} to none."
        ) from error
    try:
        weight = torch.ones(BLOCK, BLOCK, dtype=dtype, device=device)
        packed = QUANTIZERS[quantizer].pack(weight)
        QUANTIZERS[quantizer].unpack(packed, weight.shape, dtype)
    except Exception as error:
        raise ConfigError(
            f"{field} is {quantizer}, but {library} {metadata.version(library)} cannot store "
            f"weights of {dtype} on {device} ({type(error).__name__}: {_line(error)}); choose "
            f"another quantizer or policy.device, or set {field} to none."
        ) from error


def _line(error: Exception) -> str:
    """Write the first line of an error's text."""
    return next(iter(str(error).strip().splitlines()), "")[:200].rstrip(".")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what bitsandbytes warns of while it is imported: kernels that it could have, and
    that nothing here calls."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def is_quantized(model: nn.Module) -> bool:
    """Tell if a model has a layer of `quantize_layers`."""
    return any(isinstance(module, QuantizedLinear) for module in model.modules())
