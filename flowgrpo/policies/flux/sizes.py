"""Sizes of FLUX.1 models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes
from flowgrpo.policies.shared_sizes import (
    CLIP_L,
    CLIP_L_PROJECTION,
    T5_XXL,
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


KNOWN = {
    "black-forest-labs/FLUX.1-dev": architecture(
        11_901_408_320,
        # Its CLIP-L comes without the projection.
        CLIP_L - CLIP_L_PROJECTION + T5_XXL,
        VAE,
        3072,
        double=19,
        single=38,
    )
}
SIZES = Sizes(read, KNOWN)
