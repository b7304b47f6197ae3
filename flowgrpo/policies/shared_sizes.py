"""Sizes of the text encoders and of the VAE that several families share."""

from __future__ import annotations

from typing import Any

T5_XXL = 4_762_310_656
CLIP_L, CLIP_G = 123_650_304, 694_659_840
CLIP_L_PROJECTION = 768 * 768
CLIP_TOKENS = 77
# Of their linear layers alone: CLIP's with the projection of its pooled vector.
QWEN3_4B_PACKED = 36 * (2 * 2560 * 4096 + 2 * 2560 * 1024 + 3 * 2560 * 9728)
T5_XXL_PACKED = 24 * (4 * 4096 * 4096 + 3 * 4096 * 10240)
CLIP_L_PACKED = 12 * 12 * 768 * 768 + CLIP_L_PROJECTION
CLIP_G_PACKED = 32 * 12 * 1280 * 1280 + 1280 * 1280
VAE = 83_819_683
"""AutoencoderKL of 16 channels and factor 8."""


def latent_pixels(vae: dict[str, Any]) -> int:
    """Pixels on a side of the square that a latent vector of an AutoencoderKL stands for, by its
    config.json: each level but the last halves the picture."""
    return 2 ** (len(vae["block_out_channels"]) - 1)


def decoder_width(vae: dict[str, Any]) -> int:
    """Channels that an AutoencoderKL's decoder works on at full resolution, by its config.json: its
    last level takes over those of the one before."""
    return vae["block_out_channels"][:2][-1]
