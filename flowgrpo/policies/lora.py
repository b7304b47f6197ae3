"""LoRA layers, one or several of one input, in one matrix product, over PEFT's modules.

    y = x W^T + b + s (x A^T) B^T  =  [x, x A^T] [W, s B]^T + b        s = alpha / r

W [out, in] is frozen and may be 16-bit; A [r, in] and B [out, r] are float32. PEFT computes the
second term by itself, in float32: on a 16-bit model x is cast up, the product is scaled and added
in two more passes over the output, and the sum is cast down, which together cost more than x W^T.
Here A and s B are rounded to W's dtype, and the sum is inside the product, in its float32
accumulator.

The gradient of W is never formed: dB = s dy^T (x A^T), dA = (s dy B)^T x, and dy [W, s B] gives
what both of them and dx need. PEFT's parameters, their names, saving, merging and switching off
stay.

Query, key and value of an attention layer have one input, and one product (`joint_projection`):
their A stand below each other, and so do their [W, s B], with s B of each layer in columns of its
own and zeros beside it. x is then read and extended once, and its gradient is one sum inside a
product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flowgrpo.policies.quantized import QuantizedLinear

Matrices = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True)
class SharedInput:
    """Groups of layers, by name, that a module calls by `joint_projection`; its `_flowgrpo`."""

    groups: tuple[tuple[str, ...], ...]


@dataclass(eq=False)
class Product:
    """The product that a LoRA layer computes; its `_flowgrpo`."""

    layers: tuple[nn.Module, ...]
    """The layers whose matrices are merged for it: itself, several of one input, or none, where it
    is one of several and not the first."""
    matrices: Matrices | None = None
    """Merged matrices that hold as they are, inside `merged_matrices`; None: they are made in each
    call."""
    fixed: Matrices | None = None
    """Memory of merged matrices that stays where it is."""
    initial: bool = False
    """True inside `initial_adapters`: A and B are the layer's `initial_A` and `initial_B`."""
    again: bool = False
    """True: each call merges anew, and so does its backward; nothing is kept (`merge_again`)."""


def lora_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that PEFT has put an adapter into, in the model's order."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def disable_adapters(layers: list[nn.Module]) -> Iterator[None]:
    """Switch the layers' adapters off inside: they compute what they did before PEFT."""
    # The flag alone: PEFT's enable_adapters also walks over the parameters to freeze and unfreeze
    # them, which took longer than a layer of a small model.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def keep_initial(layers: list[nn.Module]) -> None:
    """Keep the present A and B of each layer, those of an adapter that training starts from.

    Adds to the layers: buffers `initial_A` and `initial_B`, which are not saved with a model.
    """
    for layer in layers:
        for name, parameter in zip(("initial_A", "initial_B"), _parameters(layer), strict=True):
            # Buffers, so that a captured graph notices when they move. With gradients, as the
            # trained ones, so that compiled blocks run one code for both, to the same bits.
            initial = parameter.detach().clone().requires_grad_()
            layer.register_buffer(name, initial, persistent=False)


def has_initial(layers: list[nn.Module]) -> bool:
    """Tell if `keep_initial` has kept matrices of these layers."""
    return any("initial_A" in layer._buffers for layer in layers)


@contextmanager
def initial_adapters(layers: list[nn.Module]) -> Iterator[None]:
    """Let the layers compute inside with the A and B that `keep_initial` has kept."""
    products = [product_of(layer) for layer in layers]
    outside = [(product.matrices, product.fixed) for product in products]
    for product in products:
        if product.matrices is not None:
            # In use outside: matrices that are merged inside must not be written over them.
            product.fixed = None
        product.matrices, product.initial = None, True
    try:
        yield
    finally:
        for product, (matrices, fixed) in zip(products, outside, strict=True):
            product.matrices, product.initial = matrices, False
            if matrices is not None:
                product.fixed = fixed


@contextmanager
def merged_matrices(layers: list[nn.Module], fixed: bool = False) -> Iterator[None]:
    """Merge A and [W, s B] once for all calls inside: no parameter may change.

    Layers of `merge_again` go on merging in each call.

    fixed: always in the same memory, which stays taken, so that a CUDA graph that was recorded
    inside holds for every later time.
    """
    products = _lasting(layers)
    for product in products:
        if fixed:
            product.fixed = merge(product.layers, product.fixed)
            product.matrices = product.fixed
        else:
            product.matrices = merge(product.layers)
    try:
        yield
    finally:
        for product in products:
            product.matrices = None


def keep_merged(layers: list[nn.Module]) -> None:
    """Merge A and [W, s B] once for good: no parameter of the layers will change. Layers of
    `merge_again` go on merging in each call."""
    for product in _lasting(layers):
        product.fixed = merge(product.layers)
        product.matrices = product.fixed


def _lasting(layers: list[nn.Module]) -> list[Product]:
    """The products whose merged matrices may be kept."""
    products = map(product_of, layers)
    return [p for p in products if p is not None and p.layers and not p.again]


def merge_again(layers: list[nn.Module]) -> None:
    """Let each call merge A and [W, s B], and its backward once more, in place of keeping them.

    For weights that are whole only while a block runs, or packed: what is kept would be a copy of
    them all.
    """
    for product in map(product_of, layers):
        if product is not None:
            product.again = True


def share_input(module: nn.Module, *groups: tuple[str, ...]) -> None:
    """Say that `module` calls each of these groups of its layers by `joint_projection`.

    Adds to the module: `_flowgrpo` (`SharedInput`).
    """
    module._flowgrpo = SharedInput(groups)


def install(model: nn.Module) -> None:
    """Give each plain LoRA linear layer of `model` the forward of this file; leave the others.

    Adds to these layers: `_flowgrpo` (`Product`) and `forward`.
    """
    for layer in lora_layers(model):
        if _is_plain(layer):
            # On the instance, so that the layer stays of PEFT's class for everything else.
            layer.forward = MethodType(_forward, layer)
            layer._flowgrpo = Product((layer,), again=isinstance(layer.base_layer, QuantizedLinear))
    for module in model.modules():
        shared = vars(module).get("_flowgrpo")
        for names in shared.groups if isinstance(shared, SharedInput) else ():
            group = tuple(getattr(module, name, None) for name in names)
            if any(layer is None or product_of(layer) is None for layer in group):
                continue
            if len({layer.base_layer.bias is None for layer in group}) == 1:
                for layer in group:
                    layer._flowgrpo.layers = ()
                group[0]._flowgrpo.layers = group


def product_of(layer: nn.Module) -> Product | None:
    """The product of a layer that has the forward of this file; None: it has another."""
    product = vars(layer).get("_flowgrpo")
    return product if isinstance(product, Product) else None


def joint_projection(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """[layer(x) for layer in layers], from one product if their module has said so (`share_input`)
    and all of them have their adapters; the results are slices of it."""
    group, product = tuple(layers), getattr(layers[0], "_flowgrpo", None)
    joint = isinstance(product, Product) and product.layers == group
    if not joint or any(layer.disable_adapters or layer.merged for layer in group):
        return [layer(x) for layer in group]
    return _multiply(group, product.matrices or merge(group), x)


def _is_plain(layer: nn.Module) -> bool:
    from peft.tuners.lora import Linear

    if not isinstance(layer, Linear) or len(layer.active_adapters) != 1:
        return False
    (name,) = layer.active_adapters
    return (
        list(layer.lora_A) == [name]
        and type(layer.base_layer) in (nn.Linear, QuantizedLinear)
        and layer.lora_A[name].bias is None
        and layer.lora_B[name].bias is None
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and not getattr(layer, "lora_variant", {})
    )


def _forward(self: nn.Module, x: Tensor) -> Tensor:
    if self.disable_adapters or self.merged:
        return self.base_layer(x)
    group, product = (self,), self._flowgrpo
    # Those of the first of several layers are not its own.
    matrices = product.matrices if product.layers == group else None
    return _multiply(group, matrices or merge(group), x)[0]


def _multiply(group: tuple[nn.Module, ...], matrices: Matrices, x: Tensor) -> list[Tensor]:
    parameters = [w for layer in group for w in _parameters(layer)]
    scales = [_scale(layer) for layer in group]
    again = group if product_of(group[0]).again else None
    rows = x.reshape(-1, x.shape[-1])
    outputs = _LoraLinear.apply(rows, *matrices, scales, again, *parameters)
    return [y.unflatten(0, x.shape[:-1]) for y in outputs]


def _parameters(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """A [r, in] and B [out, r]: the trained ones, or those that training started from."""
    product = product_of(layer)
    if product is not None and product.initial:
        return layer.initial_A, layer.initial_B
    (name,) = layer.lora_A
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _scale(layer: nn.Module) -> float:
    """alpha / r."""
    (name,) = layer.lora_A
    return layer.scaling[name]


@torch.no_grad()
def merge(group: tuple[nn.Module, ...], into: Matrices | None = None) -> Matrices:
    """A [R, in], [W, s B] [out, in + R] and the bias [out] or None in the dtype of W, with R and
    out summed over the group; written over `into` if that fits."""
    terms = [(layer.base_layer, *_parameters(layer), _scale(layer)) for layer in group]
    base, low_a, b, scale = terms[0]
    # Reading a packed weight makes it whole: once for each layer.
    weights = [base.weight for base, _, _, _ in terms]
    weight, bias, scaled_b = weights[0], base.bias, b * scale
    if len(group) > 1:
        weight = torch.cat(weights)
        bias = None if bias is None else torch.cat([base.bias for base, _, _, _ in terms])
        low_a = torch.cat([a for _, a, _, _ in terms])
        scaled_b = torch.block_diag(*(b * scale for _, _, b, scale in terms))
    scaled_b = scaled_b.to(weight.dtype)
    if into is None or (into[0].dtype, into[0].device) != (weight.dtype, weight.device):
        return low_a.to(weight.dtype, copy=True), torch.cat((weight, scaled_b), dim=1), bias
    low, wide, copied = into
    if len(group) > 1 and bias is not None:
        bias = copied.copy_(bias)
    return low.copy_(low_a), torch.cat((weight, scaled_b), dim=1, out=wide), bias


class _LoraLinear(torch.autograd.Function):
    """The product of n layers: x [N, in], A [R, in] and [W, s B] [out, in + R] in x's dtype, bias
    [out] or None, the n values of s, the layers if the backward is to merge them again, and A_1,
    B_1, A_2, ..., the parameters that get the gradients -> n tensors [N, out_i]."""

    @staticmethod
    def forward(ctx, x, low_a, wide, bias, scales, again, *parameters):
        low = torch.mm(x, low_a.t())
        ctx.save_for_backward(x, low, *(() if again else (low_a, wide)))
        ctx.again, ctx.scales, ctx.ranks = again, scales, [a.shape[0] for a in parameters[::2]]
        y = F.linear(torch.cat((x, low), dim=1), wide, bias)
        return y.split([b.shape[0] for b in parameters[1::2]], dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, low, *matrices = ctx.saved_tensors
        low_a, wide = matrices or merge(ctx.again)[:2]
        dim, outs = x.shape[1], [grad.shape[1] for grad in grads]
        dy = grads[0] if len(grads) == 1 else torch.cat(grads, dim=1)
        if ctx.needs_input_grad[0]:
            dx, d_low = torch.mm(dy, wide).split((dim, low.shape[1]), dim=1)
            dx = torch.addmm(dx, d_low, low_a)
        else:
            dx, d_low = None, torch.mm(dy, wide[:, dim:])
        da = torch.mm(d_low.t(), x).float().split(ctx.ranks)
        # The blocks beside the diagonal, which belong to no parameter, cost less than n products.
        db = torch.mm(dy.t(), low).float().split(outs)
        db = [
            b.split(ctx.ranks, dim=1)[i] * s
            for i, (b, s) in enumerate(zip(db, ctx.scales, strict=True))
        ]
        gradients = [gradient for pair in zip(da, db, strict=True) for gradient in pair]
        return dx, None, None, None, None, None, *gradients
