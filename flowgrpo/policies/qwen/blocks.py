"""Qwen-Image's blocks by fused kernels, see policies/blocks.py.

The mask is that of attention.additive_mask, in `joint_attention_kwargs`; the rotary tables are the
real ones.
"""

from __future__ import annotations

from functools import partial

from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformerBlock

from flowgrpo.policies import blocks
from flowgrpo.policies.blocks import FusedForward
from flowgrpo.policies.qwen.attention import MaskedAttention
from flowgrpo_kernels.layers import qwen

joint_block = partial(qwen.joint_block, calls=blocks.CALLS)
check_block = partial(qwen.check_joint_block, processors=(MaskedAttention.__name__,))

FUSED = {
    QwenImageTransformerBlock: FusedForward(check_block, joint_block),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
