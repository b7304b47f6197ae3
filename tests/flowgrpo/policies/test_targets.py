"""Default LoRA targets on the real architectures, without their weights."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

from flowgrpo.config import PolicyConfig
from flowgrpo.policies.adapters import add_adapter, trained_parameters

SD35_MEDIUM = dict(
    num_layers=24,
    num_attention_heads=24,
    attention_head_dim=64,
    caption_projection_dim=1536,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    sample_size=128,
    pos_embed_max_size=384,
    qk_norm="rms_norm",
    dual_attention_layers=tuple(range(13)),
)
SD35_LARGE = dict(
    num_layers=38,
    num_attention_heads=38,
    attention_head_dim=64,
    caption_projection_dim=2432,
    joint_attention_dim=4096,
    pooled_projection_dim=2048,
    sample_size=128,
    pos_embed_max_size=192,
    qk_norm="rms_norm",
)


def trained(cls, config, **fields):
    """(number of layers with a matrix, trained parameters) of an architecture on no device."""
    with torch.device("meta"):
        model = cls(**config)
        parameters = add_adapter(model, PolicyConfig(**fields))
    names = trained_parameters(model)
    assert not any("attn2" in name for name in names), "as in flow_grpo, dual attention is left out"
    return len(parameters) // 2, sum(p.numel() for p in parameters)


@pytest.mark.slow
def test_sd35_medium():
    """8 layers a block; the last block has no output for the text. A and B: 2 x 1536 x rank."""
    assert trained(SD3Transformer2DModel, SD35_MEDIUM) == (24 * 8 - 1, 191 * 2 * 1536 * 32)


@pytest.mark.slow
def test_sd35_large():
    assert trained(SD3Transformer2DModel, SD35_LARGE) == (38 * 8 - 1, 303 * 2 * 2432 * 32)


@pytest.mark.slow
def test_flux_dev():
    """Attention and both MLPs of 19 double blocks; q, k, v of 38 single blocks; rank 64."""
    config = dict(guidance_embeds=True)
    layers, count = trained(FluxTransformer2DModel, config, lora_rank=64, lora_alpha=128)
    assert layers == 19 * (8 + 4) + 38 * 3
    square, mlp = 19 * 8 + 38 * 3, 19 * 4
    assert count == 64 * 3072 * (square * 2 + mlp * 5)
