"""SD3's blocks by fused kernels, see policies/blocks.py."""

from __future__ import annotations

from functools import partial

from diffusers.models.attention import JointTransformerBlock
from diffusers.models.normalization import AdaLayerNormContinuous

from flowgrpo.policies import blocks
from flowgrpo.policies.blocks import FusedForward
from flowgrpo.policies.sd3.attention import JointAttention
from flowgrpo_kernels.layers import sd3

joint_block = partial(sd3.joint_block, calls=blocks.CALLS)
check_block = partial(sd3.check_joint_block, processors=(JointAttention.__name__,))

FUSED = {
    JointTransformerBlock: FusedForward(check_block, joint_block),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
