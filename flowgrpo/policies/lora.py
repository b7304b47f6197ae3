"""LoRA layers in one matrix product, over PEFT's modules.

    y = x W^T + b + s (x A^T) B^T  =  [x, x A^T] [W, s B]^T + b        s = alpha / r

W [out, in] is frozen and may be 16-bit; A [r, in] and B [out, r] are float32. PEFT computes the
second term by itself, in float32: on a 16-bit model x is cast up, the product is scaled and added
in two more passes over the output, and the sum is cast down, which together cost more than x W^T.
Here A and s B are rounded to W's dtype, and the sum is inside the product, in its float32
accumulator.

The gradient of W is never formed: dB = s dy^T (x A^T), dA = (s dy B)^T x, and dy [W, s B] gives
what both of them and dx need. PEFT's parameters, their names, saving, merging and switching off
stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put an adapter into, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def switched_off(these: list[nn.Module]) -> Iterator[None]:
    """Inside, the layers compute what they did before PEFT."""
    # The flag alone: PEFT's enable_adapters also walks over the parameters to freeze and unfreeze
    # them, which took longer than a layer of a small model.
    for layer in these:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in these:
            layer._disable_adapters = False


@contextmanager
def held(these: list[nn.Module], fixed: bool = False) -> Iterator[None]:
    """Inside, A and [W, s B] are made once and not in every call: no parameter may change.

    fixed: always in the same memory, which stays taken, so that a CUDA graph that was recorded
    inside holds for every later time.
    """
    short = [layer for layer in these if _is_short(layer)]
    for layer in short:
        if fixed:
            layer._fixed = _matrices(layer, layer._fixed)
        layer._matrices = layer._fixed if fixed else _matrices(layer)
    try:
        yield
    finally:
        for layer in short:
            layer._matrices = None


def shorten(model: nn.Module) -> None:
    """Give every plain LoRA linear layer of `model` the forward of this file; leave the others."""
    for layer in layers(model):
        if _is_plain(layer):
            # On the instance, so that the layer stays of PEFT's class for everything else.
            layer.forward = MethodType(_forward, layer)
            layer._matrices = layer._fixed = None


def _is_short(layer: nn.Module) -> bool:
    return getattr(layer.forward, "__func__", None) is _forward


def _is_plain(layer: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        list(layer.lora_A) == [name]
        and type(layer.base_layer) is nn.Linear
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not getattr(layer, "lora_variant", {})
    )


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    base = self.base_layer
    if self.disable_adapters or self.merged:
        return base(x)
    (name,) = self.lora_A
    a, b = self.lora_A[name].weight, self.lora_B[name].weight
    low_a, wide = self._matrices or _matrices(self)
    y = _LoraLinear.apply(
        x.reshape(-1, x.shape[-1]), low_a, wide, base.bias, a, b, self.scaling[name]
    )
    return y.view(*x.shape[:-1], y.shape[-1])


@torch.no_grad()
def _matrices(self: nn.Module, into: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """A [r, in] and [W, s B] [out, in + r] in the dtype of W, written over `into` if that fits."""
    (name,) = self.lora_A
    a, weight = self.lora_A[name].weight, self.base_layer.weight
    scaled_b = (self.lora_B[name].weight * self.scaling[name]).to(weight.dtype)
    if into is None or (into[0].dtype, into[0].device) != (weight.dtype, weight.device):
        return a.to(weight.dtype, copy=True), torch.cat((weight, scaled_b), dim=1)
    low_a, wide = into
    return low_a.copy_(a), torch.cat((weight, scaled_b), dim=1, out=wide)


class _LoraLinear(torch.autograd.Function):
    """x [N, in], A [r, in] and [W, s B] [out, in + r] in x's dtype, bias [out] or None; A and B,
    the parameters that get the gradients; s -> y [N, out]."""

    @staticmethod
    def forward(ctx, x, low_a, wide, bias, a, b, scale):
        low = torch.mm(x, low_a.t())
        ctx.save_for_backward(x, low, low_a, wide)
        ctx.scale = scale
        return F.linear(torch.cat((x, low), dim=1), wide, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, low, low_a, wide = ctx.saved_tensors
        dim = x.shape[1]
        if ctx.needs_input_grad[0]:
            dx, d_low = torch.mm(dy, wide).split((dim, low.shape[1]), dim=1)
            dx = torch.addmm(dx, d_low, low_a)
        else:
            dx, d_low = None, torch.mm(dy, wide[:, dim:])
        da = torch.mm(d_low.t(), x).float()
        db = torch.mm(dy.t(), low).float() * ctx.scale
        return dx, None, None, None, da, db, None
