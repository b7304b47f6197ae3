"""Wan's blocks by fused kernels, see policies/blocks.py.

Queries and keys are normalised over all heads at once, by PyTorch, before the kernel turns them.
"""

from __future__ import annotations

from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import (
    WanAttention,
    WanAttnProcessor,
    WanTransformerBlock,
)
from torch import Tensor, nn

from flowgrpo.policies import blocks
from flowgrpo.policies.attention import IMAGE_LAYERS, projections
from flowgrpo.policies.blocks import FusedForward
from flowgrpo_kernels.blocks import gated_residual, norm_modulate


def block(
    self: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    """Forward of a WanTransformerBlock for one time a row, temb [B, 6, D]: tokens [B, N, D]."""
    if temb.ndim != 3:
        raise ValueError("temb: fused blocks take one time a row, not one a token")
    x, attn = hidden_states, self.attn1
    rows = (self.scale_shift_table + temb.float()).unbind(dim=1)
    shift, scale, gate, ff_shift, ff_scale, ff_gate = rows
    query, key, value = projections(
        attn, IMAGE_LAYERS, norm_modulate(x, scale, shift, eps=self.norm1.eps)
    )
    heads = [[attn.norm_q(query), attn.norm_k(key), value]]
    # Tables [1, N, 1, d], of all heads.
    rotary = tuple(table.flatten(0, 2) for table in rotary_emb)
    attended = blocks.joint_attention(attn, heads, [[None], [None], [None]], rotary)
    x = gated_residual(x, gate, attn.to_out[1](attn.to_out[0](attended)))
    x = x + self.attn2(_norm(self.norm2, x), encoder_hidden_states, None, None)
    return blocks.feed_forward(self.norm3, self.ffn, x, ff_shift, ff_scale, ff_gate)


def _norm(norm: nn.Module, x: Tensor) -> Tensor:
    """LayerNorm with weight and bias: LN(x) w + b = LN(x) (1 + (w - 1)) + b."""
    if isinstance(norm, nn.Identity):
        return x
    scale, shift = (row.expand(len(x), -1) for row in (norm.weight.float() - 1, norm.bias.float()))
    return norm_modulate(x, scale, shift, eps=norm.eps)


def check_block(name: str, module: nn.Module) -> None:
    """Raise unless all modules of the block are those that its fused forward computes."""
    for suffix in ("norm1", "norm3"):
        check_norm(f"{name}.{suffix}", getattr(module, suffix))
    if type(module.norm2) is not nn.Identity:
        check_norm(f"{name}.norm2", module.norm2, affine=True)
    for suffix in ("attn1", "attn2"):
        attn = getattr(module, suffix)
        plain = type(getattr(attn, "processor", None)) is WanAttnProcessor
        if type(attn) is not WanAttention or not plain or getattr(attn, "fused_projections", False):
            raise blocks.unknown_module(f"{name}.{suffix}", attn)


def check_norm(name: str, norm: nn.Module, affine: bool = False) -> None:
    """Raise unless it is an FP32LayerNorm over one dimension, with weight and bias or without."""
    known = type(norm) is FP32LayerNorm and len(norm.normalized_shape) == 1
    parts = () if not known else (norm.weight, norm.bias)
    if not known or any((part is not None) != affine for part in parts):
        raise blocks.unknown_module(name, norm)


def last_norm(self: nn.Module, inputs: Tensor) -> Tensor:
    """The norm behind the last block, which the transformer itself scales and shifts: as it is."""
    return FP32LayerNorm.forward(self, inputs)


def widths(transformer: nn.Module) -> tuple[int, int]:
    """Numbers of a token, and of a head."""
    config = transformer.config
    return config.num_attention_heads * config.attention_head_dim, config.attention_head_dim


FUSED = {
    WanTransformerBlock: FusedForward(check_block, block, joint_projection="attn1"),
    FP32LayerNorm: FusedForward(check_norm, last_norm),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
