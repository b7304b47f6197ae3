"""Floating-point operations of one forward by closed form: 2 for each multiply-add of a matrix.

`sd3`, `flux`, `flux2`, `qwen`, `zimage` and `wan` count what the model must compute for one sample:
linear layers, the patch convolution and attention (4 S^2 D a layer: scores and weighted sum).
Element-wise work, adapters, recomputation and padding count nothing. The tests hold them against
torch's FlopCounterMode on the full configurations.

`Forward.backward` is what an adapter's gradient needs of the frozen model: the gradient of every
input (as much as the forward) and of both factors in attention (twice the forward); the scores that
flash kernels compute a second time are not counted.
"""

from __future__ import annotations

from typing import Any, NamedTuple

TIME_CHANNELS = 256


class Forward(NamedTuple):
    """Operations of one forward of one sample."""

    linear: int
    attention: int

    @property
    def total(self) -> int:
        return self.linear + self.attention

    @property
    def backward(self) -> int:
        """Operations of the backward pass for adapters of a frozen model."""
        return self.linear + 2 * self.attention


def sd3(config: dict[str, Any], height: int, width: int, text: int) -> Forward:
    """SD3Transformer2DModel on latents of height x width with `text` tokens."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    layers, dual = config["num_layers"], len(config["dual_attention_layers"])
    patch = config["patch_size"]
    n, m = (height // patch) * (width // patch), text
    image = layers * 24 * n * d * d
    words = layers * 6 * m * d * d + (layers - 1) * 18 * m * d * d
    second = dual * 8 * n * d * d
    modulation = 2 * d * d * (9 * dual + 6 * (layers - dual) + 6 * (layers - 1) + 2 + 2)
    embeds = 2 * n * d * config["in_channels"] * patch**2
    embeds += 2 * n * d * config["out_channels"] * patch**2
    embeds += 2 * m * d * config["joint_attention_dim"]
    embeds += 2 * d * (TIME_CHANNELS + d + config["pooled_projection_dim"] + d)
    attention = layers * 4 * (n + m) ** 2 * d + dual * 4 * n**2 * d
    return Forward(image + words + second + modulation + embeds, attention)


def flux(config: dict[str, Any], height: int, width: int, text: int) -> Forward:
    """FluxTransformer2DModel on latents of height x width (packed two by two)."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    n, m = (height // 2) * (width // 2), text
    blocks = (double + single) * 24 * (n + m) * d * d
    modulation = 2 * d * d * (12 * double + 3 * single + 2)
    embeds = 4 * n * d * config["in_channels"] + 2 * m * d * config["joint_attention_dim"]
    clocks = 2 if config["guidance_embeds"] else 1
    embeds += 2 * d * (clocks * (TIME_CHANNELS + d) + config["pooled_projection_dim"] + d)
    return Forward(blocks + modulation + embeds, (double + single) * 4 * (n + m) ** 2 * d)


def flux2(config: dict[str, Any], height: int, width: int, text: int) -> Forward:
    """Flux2Transformer2DModel on latents of height x width (packed two by two), whose feed-forward
    layers have a gate: three matrices of 3 D in place of two of 4 D."""
    d = config["num_attention_heads"] * config["attention_head_dim"]
    double, single = config["num_layers"], config["num_single_layers"]
    n, m = (height // 2) * (width // 2), text
    blocks = (double + single) * 26 * (n + m) * d * d
    # One modulation for all blocks of a kind, and the norm behind the last.
    modulation = 2 * d * d * (6 + 6 + 3 + 2)
    embeds = 4 * n * d * config["in_channels"] + 2 * m * d * config["joint_attention_dim"]
    embeds += 2 * d * (TIME_CHANNELS + d)
    return Forward(blocks + modulation + embeds, (double + single) * 4 * (n + m) ** 2 * d)


def qwen(config: dict[str, Any], height: int, width: int, text: int) -> Forward:
    """QwenImageTransformer2DModel on latents of height x width (packed two by two)."""
    d, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    n, m = (height // 2) * (width // 2), text
    blocks = layers * 24 * (n + m) * d * d
    modulation = 2 * d * d * (12 * layers + 2)
    embeds = 4 * n * d * config["in_channels"] + 2 * m * d * config["joint_attention_dim"]
    embeds += 2 * d * (TIME_CHANNELS + d)
    return Forward(blocks + modulation + embeds, layers * 4 * (n + m) ** 2 * d)


def wan(config: dict[str, Any], frames: int, height: int, width: int, text: int) -> Forward:
    """WanTransformer3DModel on `frames` latents of height x width (two by two are a token)."""
    d, layers = config["num_attention_heads"] * config["attention_head_dim"], config["num_layers"]
    n, m = frames * (height // 2) * (width // 2), text
    # Attention among the video's tokens, over the text's, and the feed-forward layer.
    blocks = layers * (12 * n * d * d + 4 * m * d * d + 4 * n * d * config["ffn_dim"])
    embeds = 8 * n * d * (config["in_channels"] + config["out_channels"])
    embeds += 2 * m * d * (config["text_dim"] + d)
    embeds += 2 * d * (config["freq_dim"] + d + 6 * d)
    return Forward(blocks + embeds, layers * 4 * (n * n + n * m) * d)


def zimage(config: dict[str, Any], height: int, width: int, text: int) -> Forward:
    """ZImageTransformer2DModel on latents of height x width, of whose patches, as of the text's
    tokens, there is a multiple of 32."""
    d, hidden = config["dim"], int(config["dim"] / 3 * 8)
    n, m = (height // 2) * (width // 2), text
    layers, refiners = config["n_layers"], config["n_refiner_layers"]
    block = 8 * d * d + 6 * d * hidden
    blocks = block * (layers * (n + m) + refiners * (n + m))
    modulation = 2 * TIME_CHANNELS * (4 * d * (layers + refiners) + d)
    patch = 4 * config["in_channels"]
    embeds = 2 * n * d * patch + 2 * (n + m) * d * patch + 2 * m * d * config["cap_feat_dim"]
    embeds += 4 * TIME_CHANNELS * 1024
    attention = 4 * d * (layers * (n + m) ** 2 + refiners * (n**2 + m**2))
    return Forward(blocks + modulation + embeds, attention)
