"""Sizes of Wan models for the memory plan, see flowgrpo/plan.py."""

from __future__ import annotations

from dataclasses import replace

from flowgrpo.policies.family import Architecture, BlockKind, Json, Sizes

# Bytes a token, counted on blocks of diffusers' class in bfloat16 (tests/flowgrpo/test_plan.py).
TEXT = BlockKind(stored=(8.0, 4.0), stored_fused=(8.0, 4.0), text_attention=True)
"""Keys and values of the text in a block."""
FRAMES, HEIGHT, WIDTH = 81, 480, 832
"""The pipeline's defaults."""
PASSING = 40.0
ENCODER = 5_680_910_336
"""UMT5-XXL."""
VAE = 704_688_668
"""AutoencoderKLWan of 48 channels, factor 16 in space and 4 in time."""

RESIDUAL, PLAIN = 21.0, 13.2
"""Maps of the decoder that are alive at a time, counted on the VAEs of Wan 2.2 TI2V-5B and Wan2.1:
most of them are what its causal convolutions keep of the frames before."""


def block(feed_forward: float) -> BlockKind:
    """A block, whose feed-forward layer is `feed_forward` times as wide as a token: attention among
    the video's tokens, then over the text's, and the layer. It keeps the input of the activation
    beside what does not depend on that.

    Fused, norms keep their input in 16 bits, but turning queries and keys keeps these, and they lie
    in one piece with the values. Counted on a CPU, where the norms of queries and keys are made in
    float32; on a GPU a block keeps 6 bytes less."""
    plain, fused = (other + 2 * feed_forward for other in (40.16, 42.16))
    return BlockKind(stored=(plain, 12.0), stored_fused=(fused, 12.0), only="image")


def architecture(
    parameters: int, encoders: int, vae: int, width: int, feed_forward: int, layers: int
) -> Architecture:
    """Sizes of a transformer of `layers` blocks."""
    return Architecture(
        parameters,
        encoders,
        vae,
        width,
        blocks=((block(feed_forward / width), layers), (TEXT, layers)),
        passing=PASSING,
        adapted=((width, width),) * 8 * layers,
        pixels=32,
        channels=48,
        latent_pixels=16,
        text_tokens=512,
        size=(HEIGHT, WIDTH),
        frames=FRAMES,
        decoder_width=256,
        decoder_maps=RESIDUAL,
    )


def read(
    config: Json, vae_config: Json, parameters: int, encoders: int, vae: int
) -> Architecture | None:
    """Sizes of the model of these config.json; None without a VAE."""
    if not vae:
        return None
    factor = 2 ** len(vae_config["temperal_downsample"]) * (vae_config.get("patch_size") or 1)
    sizes = architecture(
        parameters,
        encoders,
        vae,
        width=config["num_attention_heads"] * config["attention_head_dim"],
        feed_forward=config["ffn_dim"],
        layers=config["num_layers"],
    )
    # Four frames come out of a convolution at a time, of the VAE's patches.
    channels = vae_config.get("decoder_base_dim") or vae_config["base_dim"]
    return replace(
        sizes,
        decoder_width=4 * channels // (vae_config.get("patch_size") or 1) ** 2,
        decoder_maps=RESIDUAL if vae_config.get("is_residual") else PLAIN,
        pixels=factor * config["patch_size"][1],
        channels=config["in_channels"],
        latent_pixels=factor,
        frame_step=2 ** sum(vae_config["temperal_downsample"]),
    )


KNOWN = {
    "Wan-AI/Wan2.2-TI2V-5B-Diffusers": architecture(
        4_999_787_712, ENCODER, VAE, width=3072, feed_forward=14336, layers=30
    )
}
SIZES = Sizes(read, KNOWN)
