"""Layers: forwards by fused kernels for the blocks and norms of diffusers' transformers.

    from flowgrpo_kernels.layers import fuse

    fuse(transformer)                 # an SD3, FLUX.1 or Qwen-Image transformer; in place

or, by Hugging Face's kernels library, from the Hub or from an installed copy (docs/hub.md):

    kernelize(transformer, mode=Mode.TRAINING)

Each class here has the name of the class of diffusers whose forward it has, and nothing else: no
state, no constructor. A module keeps its class, parameters and names; only `forward` is replaced.
Results are those of diffusers' forward to rounding, and rounded once where that rounds at each
operation. Rollout and update call the same kernels, with gradients and without, so that what they
give a token is the same bits.

Importing this imports torch alone. Not to be joined with torch.compile, which fuses the same
operations by itself: `can_torch_compile` is False, so that `kernelize` leaves diffusers' forward.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import Tensor, nn

from ..blocks import norm_modulate
from . import flux, parts, qwen, sd3
from .parts import AttentionCalls, UnknownModule

__all__ = [
    "AdaLayerNormContinuous",
    "AdaLayerNormZero",
    "AdaLayerNormZeroSingle",
    "AttentionCalls",
    "FluxSingleTransformerBlock",
    "FluxTransformerBlock",
    "JointTransformerBlock",
    "QwenImageTransformerBlock",
    "SD35AdaLayerNormZeroX",
    "UnknownModule",
    "fits",
    "fuse",
]

# What `kernelize` asks of a layer: no constructor, no methods and no attributes but two.


class JointTransformerBlock(nn.Module):
    """SD3's block."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        return sd3.joint_block(
            self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs
        )


class FluxTransformerBlock(nn.Module):
    """FLUX.1's block of two streams."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return flux.double_block(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip


class FluxSingleTransformerBlock(nn.Module):
    """FLUX.1's block of one stream."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Tensor]:
        return flux.single_block(
            self, hidden_states, encoder_hidden_states, temb, image_rotary_emb,
            joint_attention_kwargs,
        )  # fmt: skip


class QwenImageTransformerBlock(nn.Module):
    """Qwen-Image's block."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor | None,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict[str, Any] | None = None,
        modulate_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return qwen.joint_block(
            self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb,
            image_rotary_emb, joint_attention_kwargs, modulate_index,
        )  # fmt: skip


class AdaLayerNormContinuous(nn.Module):
    """The norm behind the last block."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
        return parts.norm_out(self, x, conditioning_embedding)


class AdaLayerNormZero(nn.Module):
    """The norm in front of attention, in blocks that have no fused forward."""

    can_torch_compile = False
    has_backward = True

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: Any = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        shift, scale, *rows = parts.modulation_rows(self, emb, 6)
        return (norm_modulate(x, scale, shift, eps=self.norm.eps), *rows)


class AdaLayerNormZeroSingle(nn.Module):
    """The norm of a block of one stream that has no fused forward."""

    can_torch_compile = False
    has_backward = True

    def forward(self, x: Tensor, emb: Tensor | None = None) -> tuple[Tensor, Tensor]:
        shift, scale, gate = parts.modulation_rows(self, emb, 3)
        return norm_modulate(x, scale, shift, eps=self.norm.eps), gate


class SD35AdaLayerNormZeroX(nn.Module):
    """The norm in front of two attentions, in blocks that have no fused forward."""

    can_torch_compile = False
    has_backward = True

    def forward(self, hidden_states: Tensor, emb: Tensor | None = None) -> tuple[Tensor, ...]:
        shift, scale, *rows, shift2, scale2, gate2 = parts.modulation_rows(self, emb, 9)
        normed, normed2 = norm_modulate(
            hidden_states, scale, shift, second=(scale2, shift2), eps=self.norm.eps
        )
        return (normed, *rows, normed2, gate2)


def _norm(kind: str) -> Callable[[str, nn.Module], None]:
    """Make the check of a norm of this class."""
    return lambda name, norm: parts.check_norm(name, norm, kind)


_BLOCKS: dict[str, tuple[type[nn.Module], Callable[[str, nn.Module], None]]] = {
    "JointTransformerBlock": (JointTransformerBlock, sd3.check_joint_block),
    "FluxTransformerBlock": (FluxTransformerBlock, flux.check_double_block),
    "FluxSingleTransformerBlock": (FluxSingleTransformerBlock, flux.check_single_block),
    "QwenImageTransformerBlock": (QwenImageTransformerBlock, qwen.check_joint_block),
}
_NORMS = {
    layer.__name__: (layer, _norm(layer.__name__))
    for layer in (
        AdaLayerNormContinuous,
        AdaLayerNormZero,
        AdaLayerNormZeroSingle,
        SD35AdaLayerNormZeroX,
    )
}


def fits(module: nn.Module) -> bool:
    """Tell if a layer of this module computes what `module` does: the condition for `kernelize`."""
    layer = (_BLOCKS | _NORMS).get(type(module).__name__)
    if layer is None:
        return False
    try:
        layer[1]("", module)
    except UnknownModule:
        return False
    return _runs(module)


def fuse(model: nn.Module) -> list[str]:
    """Give the blocks of a diffusers transformer, and its other modulated norms, forwards by fused
    kernels, in place.

    Before or after PEFT's adapters are added, and not with torch.compile.

    Returns:
        The names of the modules whose forward was replaced.

    Raises:
        UnknownModule: a block is none of those that the kernels are made for, for example with
            another attention processor. Nothing is changed then.
        ValueError: the model has no module that a layer is for, or heads or tokens beyond the
            kernels' limits on a GPU.
    """
    rows: dict[str, tuple[nn.Module, type[nn.Module]]] = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind in _BLOCKS:
            layer, check = _BLOCKS[kind]
            check(name, module)
        elif kind in _NORMS and not any(name.startswith(f"{block}.") for block in rows):
            layer, check = _NORMS[kind]
            check(name, module)
        else:
            continue
        if not _runs(module):
            raise ValueError(
                f"{name} has heads or tokens that the fused kernels cannot take on a GPU: heads "
                "must be a power of two up to 256, tokens at most 8192 numbers; leave this model "
                "as it is."
            )
        rows[name] = module, layer
    if not rows:
        raise ValueError(
            f"{type(model).__name__} has no block or norm that a fused forward is for, expected "
            f"those of {parts.KNOWN}; leave this model as it is."
        )
    for module, layer in rows.values():
        module.forward = MethodType(layer.forward, module)
    return list(rows)


def _runs(module: nn.Module) -> bool:
    """Tell if the sizes of a module are within the kernels' limits on its device."""
    parameter = next(module.parameters(), None)
    if parameter is None or parameter.device.type == "cpu":
        return True
    for child in module.modules():
        if isinstance(child, nn.LayerNorm) and child.normalized_shape[0] > 8192:
            return False
        heads = getattr(child, "heads", None)
        if heads is not None and hasattr(child, "to_q"):
            head = child.to_q.out_features // heads
            if head & (head - 1) or head > 256:
                return False
    return True
