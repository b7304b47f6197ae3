"""The family of Stable Diffusion 3 and 3.5."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family, Modulation
from flowgrpo.policies.sd3 import sizes

MAX_SEQUENCE_LENGTH = 128
"""T5 tokens in flow_grpo's train_sd3.py; the pipeline's own default is 256."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: classifier-free guidance and tokens of T5."""
    return {
        "guidance_scale": config.sample.guidance_scale,
        "max_sequence_length": config.policy.max_sequence_length or MAX_SEQUENCE_LENGTH,
    }


SD3 = Family(
    pipeline="StableDiffusion3Pipeline",
    transformer="SD3Transformer2DModel",
    policy="flowgrpo.policies.sd3.policy:SD3Policy",
    # flow_grpo's list for SD3.5; `attn` is not `attn2`, the second attention of dual blocks.
    lora_targets=(
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    positions="flowgrpo.policies.sd3.positions:crop_once",
    attention_processors="flowgrpo.policies.sd3.attention:set_processors",
    modulation=Modulation(
        blocks=("JointTransformerBlock",),
        norms=("AdaLayerNormZero", "SD35AdaLayerNormZeroX", "AdaLayerNormContinuous"),
    ),
    fused_blocks="flowgrpo.policies.sd3.blocks:FUSED",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
)
