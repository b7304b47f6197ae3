"""The family of Z-Image and Z-Image-Turbo."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family, Modulation
from flowgrpo.policies.zimage import sizes

MAX_SEQUENCE_LENGTH = 128
"""Tokens of a text with the template around it; the pipeline cuts at 512. What is not the text's
is masked, so that its length decides nothing else."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: guidance and its limits, tokens of a text."""
    policy = config.policy
    # The pipeline's scale is that of c - u beyond c; 0 is none.
    arguments: dict[str, Any] = {"guidance_scale": round(config.sample.guidance_scale - 1, 6)}
    if policy.cfg_normalization:
        arguments["cfg_normalization"] = policy.cfg_normalization
    if policy.cfg_truncation < 1:
        arguments["cfg_truncation"] = policy.cfg_truncation
    arguments["max_sequence_length"] = policy.max_sequence_length or MAX_SEQUENCE_LENGTH
    return arguments


ZIMAGE = Family(
    pipeline="ZImagePipeline",
    transformer="ZImageTransformer2DModel",
    policy="flowgrpo.policies.zimage.policy:ZImagePolicy",
    # Attention and feed-forward layers of all blocks, the refiners' too, as Flow-Factory adapts
    # Z-Image (models/z_image/z_image.py); UniRL adapts the attention alone.
    lora_targets=(
        *("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0"),
        *("feed_forward.w1", "feed_forward.w2", "feed_forward.w3"),
    ),
    blocks=("noise_refiner", "context_refiner", "layers"),
    last_norm="all_final_layer.2-1",
    widths="flowgrpo.policies.zimage.attention:widths",
    attention_processors="flowgrpo.policies.zimage.attention:set_processors",
    masked_attention=True,
    modulation=Modulation(
        blocks=("ZImageTransformerBlock",),
        norms=(),
        ends=("FinalLayer",),
        layers=("adaLN_modulation",),
        time="t_embedder",
        text="cap_embedder",
        pooled=False,
    ),
    fused_blocks="flowgrpo.policies.zimage.blocks:FUSED",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
    limited_guidance=True,
)
