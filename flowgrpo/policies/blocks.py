"""The blocks of a transformer with fused element-wise kernels, over diffusers' modules.

Between its matrix products and its attention a block of SD3 or FLUX reads and writes its tokens a
dozen times: LayerNorm, scale and shift, RMSNorm of queries and keys, rotation, concatenation of
image and text, gates and residuals, each a kernel of its own with its own rounding. In
flowgrpo_kernels.layers they are three kernels, which round once.

A family's table (`Family.fused_blocks`) has a forward for each class of its blocks: one of
flowgrpo_kernels.layers with the attention of this trainer (`CALLS`), or one made of the functions
that this file hands on. Like lora.py this replaces the forward of modules that are there: their
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
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, attend, projections
from flowgrpo.policies.family import Family, import_hook
from flowgrpo_kernels.layers import parts
from flowgrpo_kernels.layers.parts import (
    AttentionCalls,
    UnknownModule,
    check_arguments,
    check_head_norms,
    check_layer_norm,
    check_norm,
    feed_forward,
    modulation_rows,
    norm_out,
)

__all__ = [
    "CALLS",
    "FusedForward",
    "check_arguments",
    "check_head_norms",
    "check_layer_norm",
    "check_norm",
    "feed_forward",
    "fuse",
    "joint_attention",
    "modulation_rows",
    "norm_out",
    "unknown_module",
]


@dataclass(frozen=True)
class FusedForward:
    """The fused forward of one class of modules."""

    check: Callable[[str, nn.Module], None]
    """check(name, module) raises `UnknownModule`, or `unknown_module`, unless the kernels are made
    for all in it."""
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
            try:
                rows[module].check(name, module)
            except UnknownModule as error:
                raise unknown_module(error.name, error.module) from None
    for module, row in rows.items():
        module.forward = MethodType(row.forward, module)
        if row.joint_projection:
            layer = getattr(module, row.joint_projection)
            lora.share_input(layer, IMAGE_LAYERS, TEXT_LAYERS)


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
    return parts.joint_attention(attn, projected, norms, rotary, mask, CALLS)


def _attend(
    attn: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> Tensor:
    return attend(query, key, value, attn.processor._attention_backend, mask)


CALLS = AttentionCalls(projections, _attend)
"""Attention as the trainer has it: one product for layers that share their input, and the kernel
that `attention.pin` has chosen."""


def _check_sizes(transformer: nn.Module, width: int, head: int) -> None:
    """Raise ConfigError for sizes beyond the kernels' limits on a GPU."""
    if transformer.device.type == "cuda" and (head & (head - 1) or head > 256 or width > 8192):
        raise ConfigError(
            f"policy.fused is on, but {type(transformer).__name__} has heads of {head} and tokens "
            f"of {width} numbers, and the fused kernels need a power of two up to 256 and at most "
            "8192; set policy.fused to false."
        )


def unknown_module(name: str, module: nn.Module) -> ConfigError:
    """The error for a module that the kernels are not made for."""
    return ConfigError(
        f"policy.fused is on, but {name} is a {module}, and the fused kernels know only the blocks "
        "and norms of the model's family as diffusers makes them; set policy.fused to false."
    )
