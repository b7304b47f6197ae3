"""The family of FLUX.2-klein."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family, Modulation
from flowgrpo.policies.flux2 import sizes

MAX_SEQUENCE_LENGTH = 512
"""Tokens of a text with its template, as in the pipeline. Its padding is attended to, so that
another length is another input."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: guidance, which it would turn on by itself, and tokens."""
    return {
        "guidance_scale": config.sample.guidance_scale,
        "max_sequence_length": config.policy.max_sequence_length or MAX_SEQUENCE_LENGTH,
    }


FLUX2 = Family(
    pipeline="Flux2KleinPipeline",
    transformer="Flux2Transformer2DModel",
    policy="flowgrpo.policies.flux2.policy:Flux2KleinPolicy",
    # Flow-Factory's list (models/flux/flux2_klein.py): all layers of the blocks of two streams, and
    # of those of one the layer that makes query, key, value and the feed-forward's input. Their
    # output layer, attn.to_out, is not in it.
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out"),
        "attn.to_qkv_mlp_proj",
    ),
    # Those of two streams, then those of one.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    modulation=Modulation(
        blocks=("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
        # One of each for all blocks of a kind, beside the blocks and not in them.
        norms=("Flux2Modulation", "AdaLayerNormContinuous"),
        time="time_guidance_embed",
        pooled=False,
    ),
    fused_blocks="flowgrpo.policies.flux2.blocks:FUSED",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
)
