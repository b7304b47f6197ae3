"""The blocks of a transformer with fused element-wise kernels, over diffusers' modules.

Between its matrix products and its attention a block of SD3 or FLUX reads and writes its tokens a
dozen times: LayerNorm, scale and shift, RMSNorm of queries and keys, rotation, concatenation of
image and text, gates and residuals, each a kernel of its own with its own rounding. Here they are
three kernels (flowgrpo_kernels.blocks), which round once:

    norm_modulate      LN(x) (1 + scale) + shift, for both attentions of a dual block in one pass
    joint_heads        queries, keys or values of image and text, normalised and rotated
    gated_residual     x + gate y, for both attentions of a dual block in one pass

A family's table (`Family.fused_blocks`) has a forward for each class of its blocks, made of the
functions of this file. Like lora.py this replaces the forward of modules that are there: their
parameters and names, PEFT's layers in them, saving and gradient checkpointing stay. With gradients
and without, on any number of rows, the kernels give a token the same bits, so that rollout and
update agree as they do without them. Not to be joined with torch.compile, which fuses the same
operations by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from flowgrpo.config import ConfigError
from flowgrpo.policies import lora
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, attend
from flowgrpo.policies.family import Family, import_hook
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate


@dataclass(frozen=True)
class FusedForward:
    """The fused forward of one class of modules."""

    check: Callable[[str, nn.Module], None]
    """check(name, module) raises `unknown_module` unless the kernels are made for all in it."""
    forward: Callable[..., Any]
    """The class's own forward, by these kernels."""
    joint_projection: str = ""
    """Attribute of the attention layer whose projections become one product, if any."""


def fuse(transformer: nn.Module, family: Family) -> None:
    """Give each block, and the norm behind the last one, the forward of its family's table.

    After `attention.pin`, whose choice of a kernel stays, and before adapters are added. Adds to
    these modules `forward`, and to the attention layers that a row names what `lora.share_input`
    adds.

    Raises:
        ConfigError: a block or norm is none of those that the kernels are made for, or the family
            has none. Nothing is changed then.
    """
    if not family.fused_blocks:
        raise ConfigError(
            f"policy.fused is on, but the blocks of {type(transformer).__name__} have no fused "
            "forward; set policy.fused to false."
        )
    _check_sizes(transformer, *family.widths_of(transformer))
    table: dict[type, FusedForward] = import_hook(family.fused_blocks)
    last = transformer.get_submodule(family.last_norm)
    replaced = {*family.blocks_of(transformer), last}
    rows = {}
    for name, module in transformer.named_modules():
        if module in replaced:
            if type(module) not in table:
                raise unknown_module(name, module)
            rows[module] = table[type(module)]
            rows[module].check(name, module)
    for module, row in rows.items():
        module.forward = MethodType(row.forward, module)
        if row.joint_projection:
            layer = getattr(module, row.joint_projection)
            lora.share_input(layer, IMAGE_LAYERS, TEXT_LAYERS)


def norm_out(self: nn.Module, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    """The modulated norm behind the last block: tokens [B, N, C] -> the same shape."""
    scale, shift = self.linear(self.silu(conditioning_embedding).to(x.dtype)).chunk(2, dim=1)
    return norm_modulate(x, scale, shift, eps=self.norm.eps)


def modulation_rows(norm: nn.Module, c: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` rows [B, D], in diffusers' order; c is the time's embedding, or a row of the table of
    modulation.py."""
    return norm.linear(norm.silu(c)).chunk(count, dim=1)


def feed_forward(
    norm: nn.Module, ff: nn.Module, x: Tensor, shift: Tensor, scale: Tensor, gate: Tensor
) -> Tensor:
    """x + gate ff(LN(x) (1 + scale) + shift), for tokens x [B, N, C]."""
    return gated_residual(x, gate, ff(norm_modulate(x, scale, shift, eps=norm.eps)))


def joint_attention(
    attn: nn.Module,
    projected: list[list[Tensor]],
    norms: list[list[nn.Module | None]],
    rotary: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """[B, S, heads * d]: attention over the tokens of all inputs, before the output layers.

    projected: query, key and value [B, N_i, heads * d] of each input; norms: of each of the three,
    one for each input; mask: as for `attend`.
    """
    heads = []
    rotations = (rotary, rotary, None)
    for *inputs, input_norms, rotation in zip(*projected, norms, rotations, strict=True):
        if len(inputs) == 1 and input_norms == [None] and rotation is None:
            # Nothing to do but to look at it as heads.
            heads.append(inputs[0].unflatten(-1, (attn.heads, -1)))
            continue
        weights = [None if norm is None else norm.weight for norm in input_norms]
        eps = next((norm.eps for norm in input_norms if norm is not None), 1e-6)
        heads.append(joint_heads(inputs, weights, heads=attn.heads, eps=eps, rotary=rotation))
    return attend(*heads, attn.processor._attention_backend, mask).flatten(2)


def check_arguments(joint_attention_kwargs: dict[str, Any] | None) -> None:
    """Raise ValueError for arguments that only diffusers' own forward knows."""
    if joint_attention_kwargs:
        raise ValueError(
            f"joint_attention_kwargs: fused blocks know none, got {list(joint_attention_kwargs)}"
        )


def _check_sizes(transformer: nn.Module, width: int, head: int) -> None:
    """Raise ConfigError for sizes beyond the kernels' limits on a GPU."""
    if transformer.device.type == "cuda" and (head & (head - 1) or head > 256 or width > 8192):
        raise ConfigError(
            f"policy.fused is on, but {type(transformer).__name__} has heads of {head} and tokens "
            f"of {width} numbers, and the fused kernels need a power of two up to 256 and at most "
            "8192; set policy.fused to false."
        )


def check_norm(name: str, norm: nn.Module, kind: type) -> None:
    """Raise unless it is a norm of class `kind` with a modulation, over a LayerNorm without
    weights."""
    if type(norm) is not kind or getattr(norm, "emb", None) is not None:
        raise unknown_module(name, norm)
    check_layer_norm(f"{name}.norm", norm.norm)


def check_layer_norm(name: str, norm: nn.Module) -> None:
    """Raise unless it is a LayerNorm over one dimension without weights."""
    if type(norm) is not nn.LayerNorm or norm.weight is not None or len(norm.normalized_shape) != 1:
        raise unknown_module(name, norm)


def check_head_norms(name: str, attn: nn.Module, kind: type) -> None:
    """Raise unless queries and keys have an RMSNorm of class `kind` over a head, with a weight, or
    none; the same eps for image and text."""
    for pair in (("norm_q", "norm_added_q"), ("norm_k", "norm_added_k")):
        norms = {suffix: getattr(attn, suffix, None) for suffix in pair}
        norms = {suffix: norm for suffix, norm in norms.items() if norm is not None}
        for suffix, norm in norms.items():
            known = type(norm) is kind and norm.weight is not None and norm.eps is not None
            plain = known and getattr(norm, "bias", None) is None and norm.weight.dim() == 1
            if not plain or norm.eps != next(iter(norms.values())).eps:
                raise unknown_module(f"{name}.{suffix}", norm)


def unknown_module(name: str, module: nn.Module) -> ConfigError:
    """The error for a module that the kernels are not made for."""
    return ConfigError(
        f"policy.fused is on, but {name} is a {module}, and the fused kernels know only the blocks "
        "and norms of the model's family as diffusers makes them; set policy.fused to false."
    )
