"""Qwen-Image's blocks by fused kernels, see policies/blocks.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import AdaLayerNormContinuous, RMSNorm
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock
from torch import Tensor, nn

from flowgrpo.policies import blocks
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, projections
from flowgrpo.policies.blocks import FusedForward
from flowgrpo.policies.qwen.attention import MaskedAttention
from flowgrpo_kernels.blocks import gated_residual, norm_modulate


def joint_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of a QwenImageTransformerBlock: (text, image). The mask is that of
    attention.additive_mask, in `joint_attention_kwargs`; the rotary tables are its real ones."""
    arguments = dict(joint_attention_kwargs or {})
    mask = arguments.pop("attention_mask", None)
    blocks.check_arguments(arguments)
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, *rows = self.img_mod(temb).chunk(6, dim=-1)
    text_shift, text_scale, text_gate, *text_rows = self.txt_mod(temb).chunk(6, dim=-1)
    normed = norm_modulate(image, scale, shift, eps=self.img_norm1.eps)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.txt_norm1.eps)
    projected = [
        projections(attn, TEXT_LAYERS, text_normed),
        projections(attn, IMAGE_LAYERS, normed),
    ]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = blocks.joint_attention(attn, projected, norms, image_rotary_emb, mask)
    text_attended, attended = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](attended.contiguous())))
    image = blocks.feed_forward(self.img_norm2, self.img_mlp, image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_attended.contiguous()))
    text = blocks.feed_forward(self.txt_norm2, self.txt_mlp, text, *text_rows)
    return _in_range(text), _in_range(image)


def _in_range(x: Tensor) -> Tensor:
    """Clip to float16's range, as diffusers does with Qwen-Image's activations."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def check_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    for suffix in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2"):
        blocks.check_layer_norm(f"{name}.{suffix}", getattr(block, suffix))
    attn = block.attn
    if type(attn) is not Attention or not isinstance(attn.processor, MaskedAttention):
        raise blocks.unknown_module(f"{name}.attn", attn)
    blocks.check_head_norms(f"{name}.attn", attn, RMSNorm)


FUSED = {
    QwenImageTransformerBlock: FusedForward(check_block, joint_block),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
