"""FLUX's blocks by fused kernels, see policies/blocks.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
)
from diffusers.models.transformers.transformer_flux import (
    FluxAttention,
    FluxAttnProcessor,
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)
from torch import Tensor, nn

from flowgrpo.policies import blocks
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, projections
from flowgrpo.policies.blocks import FusedForward, modulation_rows
from flowgrpo_kernels.blocks import gated_residual, norm_modulate


def double_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of a FluxTransformerBlock: (text, image)."""
    blocks.check_arguments(joint_attention_kwargs)
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, *rows = modulation_rows(self.norm1, temb, 6)
    text_shift, text_scale, text_gate, *text_rows = modulation_rows(self.norm1_context, temb, 6)
    normed = norm_modulate(image, scale, shift, eps=self.norm1.norm.eps)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    projected = [
        projections(attn, TEXT_LAYERS, text_normed),
        projections(attn, IMAGE_LAYERS, normed),
    ]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = blocks.joint_attention(attn, projected, norms, image_rotary_emb)
    text_attended, attended = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](attended.contiguous())))
    image = blocks.feed_forward(self.norm2, self.ff, image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_attended.contiguous()))
    text = blocks.feed_forward(self.norm2_context, self.ff_context, text, *text_rows)
    return _in_range(text), image


def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of a FluxSingleTransformerBlock: (text, image)."""
    blocks.check_arguments(joint_attention_kwargs)
    attn, count = self.attn, encoder_hidden_states.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation_rows(self.norm, temb, 3)
    normed = norm_modulate(tokens, scale, shift, eps=self.norm.norm.eps)
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    projected = [projections(attn, IMAGE_LAYERS, normed)]
    attended = blocks.joint_attention(attn, projected, norms, image_rotary_emb)
    wide = torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=2)
    tokens = _in_range(gated_residual(tokens, gate, self.proj_out(wide)))
    # Not two slices, each of whose gradients would be a whole tensor of zeros and a part.
    return tokens.split([count, tokens.shape[1] - count], dim=1)


def _in_range(x: Tensor) -> Tensor:
    """Clip to float16's range, as diffusers does with FLUX's activations."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def check_double_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    for suffix in ("norm1", "norm1_context"):
        blocks.check_norm(f"{name}.{suffix}", getattr(block, suffix), AdaLayerNormZero)
    for suffix in ("norm2", "norm2_context"):
        blocks.check_layer_norm(f"{name}.{suffix}", getattr(block, suffix))
    _check_attention(f"{name}.attn", block.attn)


def check_single_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    blocks.check_norm(f"{name}.norm", block.norm, AdaLayerNormZeroSingle)
    _check_attention(f"{name}.attn", block.attn)


def _check_attention(name: str, attn: nn.Module) -> None:
    plain = type(attn.processor) is FluxAttnProcessor and not attn.fused_projections
    if type(attn) is not FluxAttention or not plain:
        raise blocks.unknown_module(name, attn)
    blocks.check_head_norms(name, attn, nn.RMSNorm)


FUSED = {
    FluxTransformerBlock: FusedForward(check_double_block, double_block, joint_projection="attn"),
    FluxSingleTransformerBlock: FusedForward(
        check_single_block, single_block, joint_projection="attn"
    ),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
