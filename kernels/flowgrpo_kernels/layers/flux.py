"""FLUX's blocks by fused kernels: diffusers' FluxTransformerBlock, FluxSingleTransformerBlock."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import gated_residual, norm_modulate
from . import parts
from .parts import AS_THEY_ARE, IMAGE_LAYERS, TEXT_LAYERS, AttentionCalls, modulation_rows

PROCESSORS = ("FluxAttnProcessor",)


def double_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    calls: AttentionCalls = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Forward of a FluxTransformerBlock: (text, image)."""
    parts.check_arguments(joint_attention_kwargs)
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, *rows = modulation_rows(self.norm1, temb, 6)
    text_shift, text_scale, text_gate, *text_rows = modulation_rows(self.norm1_context, temb, 6)
    normed = norm_modulate(image, scale, shift, eps=self.norm1.norm.eps)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.norm.eps)
    projected = [
        calls.project(attn, TEXT_LAYERS, text_normed),
        calls.project(attn, IMAGE_LAYERS, normed),
    ]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = parts.joint_attention(attn, projected, norms, image_rotary_emb, calls=calls)
    text_attended, attended = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](attended.contiguous())))
    image = parts.feed_forward(self.norm2, self.ff, image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_attended.contiguous()))
    text = parts.feed_forward(self.norm2_context, self.ff_context, text, *text_rows)
    return parts.in_range(text), image


def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    *,
    calls: AttentionCalls = AS_THEY_ARE,
) -> tuple[Tensor, Tensor]:
    """Forward of a FluxSingleTransformerBlock: (text, image)."""
    parts.check_arguments(joint_attention_kwargs)
    attn, count = self.attn, encoder_hidden_states.shape[1]
    tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = modulation_rows(self.norm, temb, 3)
    normed = norm_modulate(tokens, scale, shift, eps=self.norm.norm.eps)
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    projected = [calls.project(attn, IMAGE_LAYERS, normed)]
    attended = parts.joint_attention(attn, projected, norms, image_rotary_emb, calls=calls)
    wide = torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=2)
    tokens = parts.in_range(gated_residual(tokens, gate, self.proj_out(wide)))
    # Not two slices, each of whose gradients would be a whole tensor of zeros and a part.
    return tokens.split([count, tokens.shape[1] - count], dim=1)


def check_double_block(name: str, block: nn.Module) -> None:
    """Raise UnknownModule unless all modules of the block are those of `double_block`."""
    for suffix in ("norm1", "norm1_context"):
        parts.check_norm(f"{name}.{suffix}", getattr(block, suffix), "AdaLayerNormZero")
    for suffix in ("norm2", "norm2_context"):
        parts.check_layer_norm(f"{name}.{suffix}", getattr(block, suffix))
    parts.check_attention(f"{name}.attn", block.attn, "FluxAttention", PROCESSORS, nn.RMSNorm)


def check_single_block(name: str, block: nn.Module) -> None:
    """Raise UnknownModule unless all modules of the block are those of `single_block`."""
    parts.check_norm(f"{name}.norm", block.norm, "AdaLayerNormZeroSingle")
    parts.check_attention(f"{name}.attn", block.attn, "FluxAttention", PROCESSORS, nn.RMSNorm)
