"""Sizes of FLUX.2-klein models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes
from flowgrpo.policies.shared_sizes import QWEN3_4B_PACKED, decoder_width, latent_pixels

# Bytes a token, counted on blocks of diffusers' classes in bfloat16 (tests/flowgrpo/test_plan.py).
DOUBLE = BlockKind(stored=(50.15, 12.0), stored_fused=(48.15, 12.0))
"""A block of two streams."""
SINGLE = BlockKind(stored=(42.1, 2.0), stored_fused=(34.1, 2.0))
"""A block of one stream."""
PASSING = 32.0
QWEN3_4B, QWEN3_8B = 4_022_468_096, 8_190_735_360
"""With the layer behind the last one, which the 4B model shares with its first."""
VAE = 84_046_115
"""AutoencoderKLFlux2 of 32 channels and factor 8."""


def architecture(
    parameters: int, encoders: int, vae: int, width: int, double: int, single: int
) -> Architecture:
    """Sizes of a transformer of `double` blocks of two streams, then `single` of one."""
    square, up, down = (width, width), (width, 6 * width), (3 * width, width)
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((DOUBLE, double), (SINGLE, single)),
        passing=PASSING,
        adapted=((square,) * 8 + (up, down) * 2) * double + ((width, 9 * width),) * single,
        # What modulates by the time stands beside the blocks, and stays as it is.
        packed=(26 * double + 13 * single) * width**2,
        packed_largest=9 * width**2,
        channels=32,
        text_tokens=512,
    )


def read(
    config: Json, vae_config: Json, parameters: int, encoders: int, vae: int
) -> Architecture | None:
    """Sizes of the model of these config.json; None without a VAE, or with feed-forward layers of
    another width."""
    if not vae or config["mlp_ratio"] != 3:
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
    decoder = vae_config.get("decoder_block_out_channels") or vae_config["block_out_channels"]
    # A token is a square of 2 x 2 latent vectors; the pipeline's default is 128 x 128 of these.
    return replace(
        sizes,
        pixels=2 * factor,
        channels=config["in_channels"] // 4,
        latent_pixels=factor,
        resolution=128 * factor,
        decoder_width=decoder_width({"block_out_channels": decoder}),
    )


# Depths and widths are Klein4BParams and Klein9BParams of black-forest-labs/flux2, model.py.
KLEIN_4B = architecture(3_875_544_576, QWEN3_4B, VAE, 3072, double=5, single=20)
KLEIN_4B = replace(KLEIN_4B, encoders_packed=QWEN3_4B_PACKED)
KLEIN_9B = architecture(9_078_581_248, QWEN3_8B, VAE, 4096, double=8, single=24)
KNOWN = {
    "black-forest-labs/FLUX.2-klein-4B": KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-base-4B": KLEIN_4B,
    "black-forest-labs/FLUX.2-klein-9B": KLEIN_9B,
    "black-forest-labs/FLUX.2-klein-base-9B": KLEIN_9B,
}
SIZES = Sizes(read, KNOWN)
