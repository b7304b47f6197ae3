"""FLUX's blocks by fused kernels, see policies/blocks.py."""

from __future__ import annotations

from functools import partial

from diffusers.models.normalization import AdaLayerNormContinuous
from diffusers.models.transformers.transformer_flux import (
    FluxSingleTransformerBlock,
    FluxTransformerBlock,
)

from flowgrpo.policies import blocks
from flowgrpo.policies.blocks import FusedForward
from flowgrpo_kernels.layers import flux

double_block = partial(flux.double_block, calls=blocks.CALLS)
single_block = partial(flux.single_block, calls=blocks.CALLS)

FUSED = {
    FluxTransformerBlock: FusedForward(
        flux.check_double_block, double_block, joint_projection="attn"
    ),
    FluxSingleTransformerBlock: FusedForward(
        flux.check_single_block, single_block, joint_projection="attn"
    ),
    AdaLayerNormContinuous: FusedForward(
        partial(blocks.check_norm, kind=AdaLayerNormContinuous), blocks.norm_out
    ),
}
"""Class of a block, or of the norm behind the last one -> its fused forward."""
