"""Z-Image's blocks by fused kernels, see policies/blocks.py.

Queries and keys are normalised and turned in one pass, and a gate and its residual are one. Norms
over a token are RMSNorms with a weight, which PyTorch has one kernel for; it rounds once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import (
    FeedForward,
    FinalLayer,
    ZImageTransformerBlock,
)
from torch import Tensor, nn

from flowgrpo.policies import blocks
from flowgrpo.policies.attention import IMAGE_LAYERS, attend, projections
from flowgrpo.policies.blocks import FusedForward
from flowgrpo.policies.rotary import RowTables
from flowgrpo.policies.zimage.attention import SingleStreamAttention
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate


def single_block(
    self: nn.Module,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: RowTables,
    adaln_input: Tensor | None = None,
) -> Tensor:
    """Forward of a ZImageTransformerBlock on tokens [B, S, C], modulated or not. Mask and tables
    are those of forward.py."""
    if not self.modulation:
        attended = _attention(self.attention, _norm(self.attention_norm1, x), attn_mask, freqs_cis)
        x = x + _norm(self.attention_norm2, attended)
        return x + _norm(self.ffn_norm2, self.feed_forward(_norm(self.ffn_norm1, x)))
    scale, gate, ff_scale, ff_gate = self.adaLN_modulation(adaln_input).chunk(4, dim=1)
    normed = _norm(self.attention_norm1, x) * (1 + scale)[:, None]
    attended = _attention(self.attention, normed, attn_mask, freqs_cis)
    x = gated_residual(x, gate.tanh(), _norm(self.attention_norm2, attended))
    normed = _norm(self.ffn_norm1, x) * (1 + ff_scale)[:, None]
    return gated_residual(x, ff_gate.tanh(), _norm(self.ffn_norm2, self.feed_forward(normed)))


def final_layer(self: nn.Module, x: Tensor, c: Tensor) -> Tensor:
    """Forward of a FinalLayer: tokens [B, S, C] -> patches [B, S, 4 C'], for c [B, D] of the
    time."""
    scale = self.adaLN_modulation(c)
    shift = torch.zeros_like(scale)
    return self.linear(norm_modulate(x, scale, shift, eps=self.norm_final.eps))


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], norm.weight, norm.eps)


def _attention(attn: nn.Module, x: Tensor, mask: Tensor | None, tables: RowTables) -> Tensor:
    """Attention of tokens x [B, S, C], with its output layer."""
    *turned, value = projections(attn, IMAGE_LAYERS, x)
    # Tables of rows that differ: for the kernel all rows are one, of B S tokens.
    rotary = tuple(table.flatten(0, 1) for table in tables)
    heads = [
        joint_heads(
            [y.flatten(0, 1)[None]],
            [None if norm is None else norm.weight],
            heads=attn.heads,
            eps=1e-6 if norm is None else norm.eps,
            rotary=rotary,
        ).view(*x.shape[:2], attn.heads, -1)
        for y, norm in zip(turned, (attn.norm_q, attn.norm_k), strict=True)
    ]
    value = value.unflatten(-1, (attn.heads, -1))
    out = attend(*heads, value, attn.processor._attention_backend, mask).flatten(2)
    return attn.to_out[1](attn.to_out[0](out))


def check_block(name: str, block: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    for suffix in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        norm = getattr(block, suffix)
        if type(norm) is not RMSNorm or norm.weight is None or norm.bias is not None:
            raise blocks.unknown_module(f"{name}.{suffix}", norm)
    attn = block.attention
    if type(attn) is not Attention or not isinstance(attn.processor, SingleStreamAttention):
        raise blocks.unknown_module(f"{name}.attention", attn)
    blocks.check_head_norms(f"{name}.attention", attn, RMSNorm)
    if type(block.feed_forward) is not FeedForward:
        raise blocks.unknown_module(f"{name}.feed_forward", block.feed_forward)


def check_final(name: str, layer: nn.Module) -> None:
    """Raise unless its norm is a LayerNorm without weights."""
    blocks.check_layer_norm(f"{name}.norm_final", layer.norm_final)


FUSED = {
    ZImageTransformerBlock: FusedForward(check_block, single_block),
    FinalLayer: FusedForward(check_final, final_layer),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
