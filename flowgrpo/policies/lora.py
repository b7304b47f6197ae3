"""LoRA layers with fewer passes over memory than PEFT's own forward.

    y = base(x) + (alpha / r) (x A^T) B^T         A [r, in], B [out, r] in float32

PEFT computes the second term in float32 whatever the model's dtype: x is cast up, the product
scaled and added in two further passes, and the sum cast back, which on a 16-bit model costs more
than the base product itself. Here A and B are cast to x's dtype, and scaling and sum are part of
the second product. The parameters, their names and PEFT's saving and switching off stay as they
are.
"""

from __future__ import annotations

from types import MethodType

import torch
from torch import Tensor, nn


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put an adapter into, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def shorten(model: nn.Module) -> None:
    """Give every plain LoRA linear layer of `model` the forward of this file; leave the others."""
    for layer in layers(model):
        if _is_plain(layer):
            # On the instance, so that the layer stays of PEFT's class for everything else.
            layer.forward = MethodType(_forward, layer)


def _is_plain(layer: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        list(layer.lora_A) == [name]
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not getattr(layer, "lora_variant", {})
    )


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    base = self.base_layer(x)
    if self.disable_adapters or self.merged:
        return base
    (name,) = self.lora_A
    a, b = (matrix[name].weight.to(x.dtype) for matrix in (self.lora_A, self.lora_B))
    low = torch.mm(x.reshape(-1, x.shape[-1]), a.t())
    out = torch.addmm(base.reshape(-1, base.shape[-1]), low, b.t(), alpha=self.scaling[name])
    return out.view(base.shape)
