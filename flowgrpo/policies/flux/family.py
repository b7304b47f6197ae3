"""The family of FLUX.1."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family, Modulation
from flowgrpo.policies.flux import sizes

MAX_SEQUENCE_LENGTH = 128
"""T5 tokens in flow_grpo's train_flux.py; the pipeline's own default is 512."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: both kinds of guidance and tokens of T5."""
    arguments: dict[str, Any] = {"guidance_scale": config.policy.embedded_guidance}
    if config.sample.guidance_scale != 1:
        arguments |= {"negative_prompt": "", "true_cfg_scale": config.sample.guidance_scale}
    arguments["max_sequence_length"] = config.policy.max_sequence_length or MAX_SEQUENCE_LENGTH
    return arguments


FLUX = Family(
    pipeline="FluxPipeline",
    transformer="FluxTransformer2DModel",
    policy="flowgrpo.policies.flux.policy:FluxPolicy",
    # flow_grpo's list. The q, k, v of the single blocks end like those of the double blocks and are
    # among them; their proj_mlp and proj_out are not.
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    ),
    # Those of two streams, then those of one.
    blocks=("transformer_blocks", "single_transformer_blocks"),
    modulation=Modulation(
        blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
        norms=("AdaLayerNormZero", "AdaLayerNormZeroSingle", "AdaLayerNormContinuous"),
    ),
    fused_blocks="flowgrpo.policies.flux.blocks:FUSED",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
    embedded_guidance=True,
)
