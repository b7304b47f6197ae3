"""The family of Qwen-Image."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family, Modulation
from flowgrpo.policies.qwen import sizes

MAX_SEQUENCE_LENGTH = 128
"""Tokens of a text, with the five that close the template; the pipeline cuts at 512. A shorter text
has the same embedding at any length, and what is padded is masked."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: guidance and tokens of a text."""
    arguments: dict[str, Any] = {}
    if config.sample.guidance_scale != 1:
        arguments |= {"negative_prompt": "", "true_cfg_scale": config.sample.guidance_scale}
    arguments["max_sequence_length"] = config.policy.max_sequence_length or MAX_SEQUENCE_LENGTH
    return arguments


QWEN = Family(
    pipeline="QwenImagePipeline",
    transformer="QwenImageTransformer2DModel",
    policy="flowgrpo.policies.qwen.policy:QwenImagePolicy",
    # Attention and feed-forward layers of both streams, as flow_grpo adapts FLUX.1 and Qwen-Image.
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2"),
    ),
    attention_processors="flowgrpo.policies.qwen.attention:set_processors",
    masked_attention=True,
    modulation=Modulation(
        blocks=("QwenImageTransformerBlock",),
        norms=("AdaLayerNormContinuous",),
        layers=("img_mod", "txt_mod"),
        text="txt_in",
        text_norm="txt_norm",
        pooled=False,
    ),
    fused_blocks="flowgrpo.policies.qwen.blocks:FUSED",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
    guide="flowgrpo.policies.qwen.guidance:guide",
)
