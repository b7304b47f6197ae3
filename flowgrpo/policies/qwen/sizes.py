"""Sizes of Qwen-Image models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes

# Bytes a token, counted on blocks of diffusers' class in bfloat16 (tests/flowgrpo/test_plan.py).
JOINT = BlockKind(stored=(48.15, 12.0), stored_fused=(40.05, 12.0))
"""A block: text and image in two streams, with one attention over both."""
PASSING = 40.0
ENCODER = 8_292_166_656
"""Qwen2.5-VL-7B, with the part for pictures, which no prompt uses."""
VAE = 126_892_531
"""AutoencoderKLQwenImage of 16 channels and factor 8."""


def architecture(parameters: int, encoders: int, vae: int, width: int, joint: int) -> Architecture:
    """Sizes of a transformer of `joint` blocks."""
    square, up, down = (width, width), (width, 4 * width), (4 * width, width)
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((JOINT, joint),),
        passing=PASSING,
        adapted=((square,) * 8 + (up, down) * 2) * joint,
        packed=24 * joint * width**2,
        modulating=12 * joint * width**2,
        packed_largest=4 * width**2,
        decoder_width=144,
    )


def read(
    config: Json, vae_config: Json, parameters: int, encoders: int, vae: int
) -> Architecture | None:
    """Sizes of the model of these config.json; None without a VAE."""
    if not vae:
        return None
    factor = 2 ** len(vae_config["temperal_downsample"])
    sizes = architecture(
        parameters,
        encoders,
        vae,
        width=config["num_attention_heads"] * config["attention_head_dim"],
        joint=config["num_layers"],
    )
    # A token is a square of 2 x 2 latent vectors; the pipeline's default is 128 x 128 of these.
    return replace(
        sizes,
        pixels=2 * factor,
        channels=config["in_channels"] // 4,
        latent_pixels=factor,
        resolution=128 * factor,
        decoder_width=vae_config["base_dim"] * 3 // 2,
    )


PUBLISHED = architecture(20_430_401_088, ENCODER, VAE, 3072, joint=60)
KNOWN = {"Qwen/Qwen-Image": PUBLISHED, "Qwen/Qwen-Image-2512": PUBLISHED}
SIZES = Sizes(read, KNOWN)
