"""The family of Wan's text-to-video models with one transformer."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import Config
from flowgrpo.policies.family import Family
from flowgrpo.policies.wan import sizes

MAX_SEQUENCE_LENGTH = 512
"""Tokens of a text, as in the pipeline. The model attends to the zeros that fill it up, so another
length is another video."""


def call_arguments(config: Config) -> dict[str, Any]:
    """Arguments of the pipeline's call: frames, guidance and tokens of a text."""
    arguments: dict[str, Any] = {"num_frames": config.policy.frames or sizes.FRAMES}
    # Its own default is 5.
    arguments["guidance_scale"] = config.sample.guidance_scale
    arguments["max_sequence_length"] = config.policy.max_sequence_length or MAX_SEQUENCE_LENGTH
    return arguments


WAN = Family(
    pipeline="WanPipeline",
    transformer="WanTransformer3DModel",
    policy="flowgrpo.policies.wan.policy:WanPolicy",
    # flow_grpo's list for Wan2.1: attention among the video's tokens, and over those of the text.
    lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
    blocks=("blocks",),
    fused_blocks="flowgrpo.policies.wan.blocks:FUSED",
    widths="flowgrpo.policies.wan.blocks:widths",
    sizes=sizes.SIZES,
    call_arguments=call_arguments,
    scheduler="flowgrpo.policies.wan.scheduler:euler",
    frame_rate=24,
    card_lines=(
        "from diffusers import FlowMatchEulerDiscreteScheduler",
        "shift = pipe.scheduler.config.get('flow_shift') or pipe.scheduler.config.shift",
        "pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)",
    ),
)
