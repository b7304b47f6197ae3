"""Sizes of SD3 models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes
from flowgrpo.policies.shared_sizes import (
    CLIP_G,
    CLIP_G_PACKED,
    CLIP_L,
    CLIP_L_PACKED,
    CLIP_TOKENS,
    T5_XXL,
    T5_XXL_PACKED,
    VAE,
    decoder_width,
    latent_pixels,
)

# Bytes a token, counted on blocks of diffusers' class in bfloat16 (tests/flowgrpo/test_plan.py).
JOINT = BlockKind(stored=(38.25, 8.0), stored_fused=(30.1, 8.0))
"""A block: image and text in two streams, with one attention over both."""
DUAL = BlockKind(stored=(20.2, 0.0), stored_fused=(12.1, 0.0), image_attention=True)
"""The second attention of SD3.5-medium's first blocks."""
PASSING = 25.0


def architecture(
    parameters: int, encoders: int, vae: int, width: int, joint: int, dual: int = 0
) -> Architecture:
    """Sizes of a transformer of `joint` blocks, of which `dual` have a second attention."""
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((JOINT, joint), (DUAL, dual)),
        passing=PASSING,
        # Query, key, value and output of both streams; the last block has no output for the text.
        adapted=((width, width),) * max(8 * joint - 1, 0),
        # These, the feed-forward layers of both streams, but the last one's of the text, and attn2.
        packed=(max(24 * joint - 9, 0) + 4 * dual) * width**2,
        # Six rows for each norm of a stream, three more for attn2; two for the last one's text.
        modulating=(max(12 * joint - 4, 0) + 3 * dual) * width**2,
        packed_largest=4 * width**2,
        fixed_tokens=CLIP_TOKENS,
    )


def read(
    config: Json, vae_config: Json, parameters: int, encoders: int, vae: int
) -> Architecture | None:
    """Sizes of the model of these config.json; None without a VAE."""
    if not vae:
        return None
    factor = latent_pixels(vae_config)
    sizes = architecture(
        parameters,
        encoders,
        vae,
        width=config["num_attention_heads"] * config["attention_head_dim"],
        joint=config["num_layers"],
        dual=len(config.get("dual_attention_layers", ())),
    )
    return replace(
        sizes,
        pixels=config["patch_size"] * factor,
        channels=config["in_channels"],
        latent_pixels=factor,
        resolution=config["sample_size"] * factor,
        decoder_width=decoder_width(vae_config),
    )


ENCODERS = CLIP_L + CLIP_G + T5_XXL
PACKED = CLIP_L_PACKED + CLIP_G_PACKED + T5_XXL_PACKED
KNOWN = {
    name: replace(sizes, tables=side**2 * sizes.width, encoders_packed=PACKED)
    for name, side, sizes in (
        (
            "stabilityai/stable-diffusion-3.5-medium",
            384,
            architecture(2_243_171_520, ENCODERS, VAE, 1536, joint=24, dual=13),
        ),
        (
            "stabilityai/stable-diffusion-3.5-large",
            192,
            architecture(8_056_627_520, ENCODERS, VAE, 2432, joint=38),
        ),
    )
}
"""Each with the side of its table of positions."""
SIZES = Sizes(read, KNOWN)
