"""Parameters of the text encoders and of the VAE that several families share."""

from __future__ import annotations

T5_XXL = 4_762_310_656
CLIP_L, CLIP_G = 123_650_304, 694_659_840
CLIP_L_PROJECTION = 768 * 768
CLIP_TOKENS = 77
VAE = 83_819_683
"""AutoencoderKL of 16 channels and factor 8."""
