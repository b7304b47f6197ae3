"""FLUX.2's blocks by fused kernels, see policies/blocks.py.

Shift, scale and gate come from outside, one set for all blocks of a kind: they are arguments of the
forward, and no block has a modulation to check. The gated activation of the feed-forward layers is
in no kernel; its two halves are one split here, so that their gradients are joined once and not
added as two tensors that are half zeros.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux2 import (
    Flux2Attention,
    Flux2AttnProcessor,
    Flux2FeedForward,
    Flux2ParallelSelfAttention,
    Flux2ParallelSelfAttnProcessor,
    Flux2SingleTransformerBlock,
    Flux2SwiGLU,
    Flux2TransformerBlock,
)
from torch import Tensor, nn

from flowgrpo.policies import blocks
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS, projections
from flowgrpo.policies.blocks import FusedForward
from flowgrpo_kernels.blocks import gated_residual, norm_modulate


def double_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod_img: Tensor,
    temb_mod_txt: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward of a Flux2TransformerBlock: (text, image). Both modulations are [B, 6 C]."""
    blocks.check_arguments(joint_attention_kwargs)
    image, text, attn = hidden_states, encoder_hidden_states, self.attn
    shift, scale, gate, *rows = temb_mod_img.chunk(6, dim=1)
    text_shift, text_scale, text_gate, *text_rows = temb_mod_txt.chunk(6, dim=1)
    normed = norm_modulate(image, scale, shift, eps=self.norm1.eps)
    text_normed = norm_modulate(text, text_scale, text_shift, eps=self.norm1_context.eps)
    projected = [
        projections(attn, TEXT_LAYERS, text_normed),
        projections(attn, IMAGE_LAYERS, normed),
    ]
    norms = [[attn.norm_added_q, attn.norm_q], [attn.norm_added_k, attn.norm_k], [None, None]]
    out = blocks.joint_attention(attn, projected, norms, image_rotary_emb)
    text_attended, attended = out.split([text.shape[1], image.shape[1]], dim=1)
    image = gated_residual(image, gate, attn.to_out[1](attn.to_out[0](attended.contiguous())))
    image = blocks.feed_forward(self.norm2, partial(_feed_forward, self.ff), image, *rows)
    text = gated_residual(text, text_gate, attn.to_add_out(text_attended.contiguous()))
    feed_forward = partial(_feed_forward, self.ff_context)
    text = blocks.feed_forward(self.norm2_context, feed_forward, text, *text_rows)
    return _in_range(text), image


def single_block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    temb_mod: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    """Forward of a Flux2SingleTransformerBlock over the tokens of text and image, which come
    together; the modulation is [B, 3 C]."""
    blocks.check_arguments(joint_attention_kwargs)
    if encoder_hidden_states is not None:
        raise ValueError("encoder_hidden_states: fused blocks take text and image in one tensor")
    attn, tokens = self.attn, hidden_states
    shift, scale, gate = temb_mod.chunk(3, dim=1)
    normed = norm_modulate(tokens, scale, shift, eps=self.norm.eps)
    sizes = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim] * 2
    query, key, value, active, wide = attn.to_qkv_mlp_proj(normed).split(sizes, dim=-1)
    norms = [[attn.norm_q], [attn.norm_k], [None]]
    attended = blocks.joint_attention(attn, [[query, key, value]], norms, image_rotary_emb)
    out = attn.to_out(torch.cat([attended, F.silu(active) * wide], dim=2))
    return _in_range(gated_residual(tokens, gate, out))


def _feed_forward(ff: nn.Module, x: Tensor) -> Tensor:
    """A Flux2FeedForward of tokens x [B, N, C]."""
    active, wide = ff.linear_in(x).chunk(2, dim=-1)
    return ff.linear_out(F.silu(active) * wide)


def _in_range(x: Tensor) -> Tensor:
    """Clip to float16's range, as diffusers does with FLUX.2's activations."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def check_double_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    for suffix in ("norm1", "norm1_context", "norm2", "norm2_context"):
        blocks.check_layer_norm(f"{name}.{suffix}", getattr(block, suffix))
    attn = block.attn
    plain = type(attn.processor) is Flux2AttnProcessor and not attn.fused_projections
    if type(attn) is not Flux2Attention or not plain:
        raise blocks.unknown_module(f"{name}.attn", attn)
    blocks.check_head_norms(f"{name}.attn", attn, nn.RMSNorm)
    for suffix in ("ff", "ff_context"):
        ff = getattr(block, suffix)
        if type(ff) is not Flux2FeedForward or type(ff.act_fn) is not Flux2SwiGLU:
            raise blocks.unknown_module(f"{name}.{suffix}", ff)


def check_single_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    blocks.check_layer_norm(f"{name}.norm", block.norm)
    attn = block.attn
    plain = type(attn.processor) is Flux2ParallelSelfAttnProcessor
    gated = type(attn.mlp_act_fn) is Flux2SwiGLU and attn.mlp_mult_factor == 2
    if type(attn) is not Flux2ParallelSelfAttention or not plain or not gated:
        raise blocks.unknown_module(f"{name}.attn", attn)
    blocks.check_head_norms(f"{name}.attn", attn, nn.RMSNorm)


FUSED = {
    Flux2TransformerBlock: FusedForward(check_double_block, double_block, joint_projection="attn"),
    Flux2SingleTransformerBlock: FusedForward(check_single_block, single_block),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
