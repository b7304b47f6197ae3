"""Sizes of FLUX.1 models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes
from flowgrpo.policies.shared_sizes import (
    CLIP_L,
    CLIP_L_PACKED,
    CLIP_L_PROJECTION,
    T5_XXL,
    T5_XXL_PACKED,
    VAE,
    decoder_width,
    latent_pixels,
)

# Bytes a token, counted on blocks of diffusers' classes in bfloat16 (tests/flowgrpo/test_plan.py).
DOUBLE = BlockKind(stored=(42.1, 12.0), stored_fused=(40.05, 12.0))
"""A block of two streams."""
SINGLE = BlockKind(stored=(28.1, 6.0), stored_fused=(24.05, 6.0))
"""A block of one stream."""
PASSING = 40.0


def architecture(
    parameters: int, encoders: int, vae: int, width: int, double: int, single: int
) -> Architecture:
    """Sizes of a transformer of `double` blocks of two streams, then `single` of one."""
    square, up, down = (width, width), (width, 4 * width), (4 * width, width)
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((DOUBLE, double), (SINGLE, single)),
        passing=PASSING,
        adapted=((square,) * 8 + (up, down) * 2) * double + (square,) * 3 * single,
        packed=(24 * double + 12 * single) * width**2,
        modulating=(12 * double + 3 * single) * width**2,
        packed_largest=(5 if single else 4) * width**2,
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
        double=config["num_layers"],
        single=config["num_single_layers"],
    )
    # A token is a square of 2 x 2 latent vectors; FluxPipeline's default is 128 x 128 of these.
    return replace(
        sizes,
        pixels=2 * factor,
        channels=config["in_channels"] // 4,
        latent_pixels=factor,
        resolution=128 * factor,
        decoder_width=decoder_width(vae_config),
    )


DEV = architecture(
    11_901_408_320,
    # Its CLIP-L comes without the projection.
    CLIP_L - CLIP_L_PROJECTION + T5_XXL,
    VAE,
    3072,
    double=19,
    single=38,
)
KNOWN = {
    "black-forest-labs/FLUX.1-dev": replace(
        DEV, encoders_packed=CLIP_L_PACKED - CLIP_L_PROJECTION + T5_XXL_PACKED
    )
}
SIZES = Sizes(read, KNOWN)
