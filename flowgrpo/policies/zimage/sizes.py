"""Sizes of Z-Image models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes
from flowgrpo.policies.shared_sizes import QWEN3_4B_PACKED, VAE, decoder_width, latent_pixels

# Bytes a token, counted on blocks of diffusers' class in bfloat16 (tests/flowgrpo/test_plan.py).
# Fused, PyTorch's own RMSNorm stands in for a norm; on the CPU, where they are counted, it keeps a
# float32 copy of its input, which the one kernel of a GPU does not, so there it is less.
LAYER = BlockKind(stored=(69.5, 14.0), stored_fused=(53.5, 14.0))
"""A block over the tokens of image and text together."""
IMAGE_REFINER = replace(LAYER, only="image")
TEXT_REFINER = replace(LAYER, only="text")
PASSING = 30.0
ENCODER = 4_022_468_096
"""Qwen3-4B, without the layer that would predict a next token."""


def architecture(
    parameters: int, encoders: int, vae: int, width: int, layers: int, refiners: int
) -> Architecture:
    """Sizes of a transformer of `layers` blocks, with `refiners` for image and text each."""
    square, hidden = (width, width), int(width / 3 * 8)
    block = (square,) * 4 + ((width, hidden), (hidden, width), (width, hidden))
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((LAYER, layers), (IMAGE_REFINER, refiners), (TEXT_REFINER, refiners)),
        passing=PASSING,
        adapted=block * (layers + 2 * refiners),
        packed=sum(i * o for i, o in block) * (layers + 2 * refiners),
        # Four rows of the time's 256 numbers; blocks over the text alone have none.
        modulating=4 * width * min(width, 256) * (layers + refiners),
        packed_largest=width * hidden,
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
        width=config["dim"],
        layers=config["n_layers"],
        refiners=config["n_refiner_layers"],
    )
    return replace(
        sizes,
        pixels=2 * factor,
        channels=config["in_channels"],
        latent_pixels=factor,
        decoder_width=decoder_width(vae_config),
    )


PUBLISHED = architecture(6_154_908_736, ENCODER, VAE, 3840, layers=30, refiners=2)
PUBLISHED = replace(PUBLISHED, encoders_packed=QWEN3_4B_PACKED)
KNOWN = {"Tongyi-MAI/Z-Image": PUBLISHED, "Tongyi-MAI/Z-Image-Turbo": PUBLISHED}
SIZES = Sizes(read, KNOWN)
