"""Components that do not fit, or cannot be trained, are one sentence before the first image."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from torch import nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy, pipelines
from support import pipelines as tiny

CONFIG = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")


def loaded(folder):
    return DiffusionPipeline.from_pretrained(folder)


def policy_of(pipeline, encode=None) -> Policy:
    return Policy.load(pipeline, device="cpu", config=CONFIG, encode=encode)


def vae_with(**changes):
    vae = tiny.vae(8)
    vae.register_to_config(**changes)
    return vae


def tokenizer_with(more: int):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(more)])
    return tokenizer


SD3 = [
    (
        "vae",
        lambda: vae_with(latent_channels=16),
        "AutoencoderKL with latent_channels 16, .* for 4;",
    ),
    (
        "vae",
        lambda: vae_with(shift_factor=None),
        "AutoencoderKL with shift_factor None, but a numb",
    ),
    ("vae", lambda: vae_with(scaling_factor=float("nan")), "with scaling_factor nan"),
    ("vae", lambda: AutoencoderTiny(latent_channels=4), "enlarges latents 8 times, .* for 2 times"),
    ("vae", lambda: nn.Linear(2, 2), "is a Linear with scaling_factor None"),
    ("text_encoder", lambda: tiny.clip(16, 16), "projection_dim 16, but .* is made for 12"),
    ("text_encoder", tiny.t5, "is a T5EncoderModel with projection_dim None"),
    ("text_encoder_3", lambda: tiny.t5(48), "T5EncoderModel with d_model 48, but .* for 32"),
    ("text_encoder_3", lambda: tiny.clip(12, 12), "CLIPTextModelWithProjection with d_model None"),
    ("tokenizer", lambda: None, "has a text_encoder and no tokenizer, but both"),
    ("tokenizer_3", lambda: None, "has a text_encoder_3 and no tokenizer_3"),
    ("tokenizer_2", lambda: tokenizer_with(3), "has 22 tokens, but its text_encoder_2 knows 19"),
    ("tokenizer_2", lambda: tiny.tokenizer(9), "model_max_length 9, .* positions for 8 tokens"),
]


@pytest.mark.parametrize(("role", "make", "message"), SD3)
def test_a_component_that_does_not_fit(latent_model, role, make, message):
    pipeline = loaded(latent_model)
    setattr(pipeline, role, make())
    with pytest.raises(ConfigError, match=message):
        policy_of(pipeline)


@pytest.mark.parametrize(
    ("role", "make", "message"),
    [
        ("vae", lambda: vae_with(latent_channels=16), "latent_channels 16, .* is made for 4"),
        ("text_encoder", lambda: tiny.clip(12, 12), "text_encoder .* hidden_size 12, .* for 16"),
        ("text_encoder_2", lambda: tiny.t5(48), "text_encoder_2 .* d_model 48, .* for 32"),
        ("tokenizer", tiny.t5_tokenizer, "tokenizer .* has model_max_length"),
    ],
)
def test_a_component_that_does_not_fit_flux(flux_model, role, make, message):
    pipeline = loaded(flux_model)
    setattr(pipeline, role, make())
    with pytest.raises(ConfigError, match=message):
        policy_of(pipeline)


@pytest.mark.slow
def test_text_encoders_that_nothing_uses_may_be_any(latent_model, flux_model):
    for folder in (latent_model, flux_model):
        encode = policy_of(loaded(folder)).encode
        pipeline = loaded(folder)
        pipeline.text_encoder, pipeline.tokenizer = tiny.clip(16, 16), None
        assert len(policy_of(pipeline, encode).encode(["a red circle"])) == 1


def test_a_folder_with_a_transformer_of_another_class(latent_model, flux_model, tmp_path):
    pipeline = loaded(latent_model)
    pipeline.transformer = loaded(flux_model).transformer
    pipeline.save_pretrained(tmp_path / "x")
    message = (
        r"has a FluxTransformer2DModel as its transformer, but a SD3Transformer2DModel is expec"
    )
    with pytest.raises(ConfigError, match=message):
        Policy.load(str(tmp_path / "x"), device="cpu", config=CONFIG)


NAME = "transformer_blocks.0.attn.to_q"


def whole_numbers(pipeline):
    layer = pipeline.transformer.get_submodule(NAME)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)


def dynamic(pipeline):
    kinds = {NAME: torch.ao.quantization.default_dynamic_qconfig}
    torch.ao.quantization.quantize_dynamic(pipeline.transformer, kinds, inplace=True)


def on_meta(pipeline):
    pipeline.transformer.to("meta")


def quantizer(pipeline):
    pipeline.text_encoder_3.hf_quantizer = object()


def grouped(pipeline):
    cpu = torch.device("cpu")
    apply_group_offloading(pipeline.text_encoder_3, cpu, cpu, offload_type="leaf_level")


def cast_layers(pipeline):
    kinds = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    pipeline.vae.enable_layerwise_casting(**kinds)


WEIGHTS = [
    (whole_numbers, f"transformer.{NAME}.weight is of torch.int8, but a plain floating-point"),
    (dynamic, f"transformer.{NAME} is a Linear, whose weights are quantized"),
    (on_meta, "transformer.pos_embed.proj.weight is on the device meta, without values"),
    (quantizer, "text_encoder_3 has quantized weights, but floating-point ones"),
    (grouped, "text_encoder_3 has the hooks group_offloading of diffusers"),
    (cast_layers, "vae has the hooks layerwise_casting of diffusers"),
]


@pytest.mark.parametrize(("use", "message"), WEIGHTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_that_are_refused(latent_model, monkeypatch, use, message):
    """In memory, and as a folder with a quantization_config would be loaded."""
    pipeline = loaded(latent_model)
    use(pipeline)
    with pytest.raises(ConfigError, match=re.escape(message)):
        policy_of(pipeline)
    monkeypatch.setattr(pipelines, "_load_files", lambda *arguments: pipeline)
    with pytest.raises(ConfigError, match=re.escape(message)):
        policy_of(str(latent_model))


def test_weights_of_inference_mode(latent_model):
    """No gradient goes through them; torch says so in the first update."""
    with torch.inference_mode():
        pipeline = loaded(latent_model)
    with pytest.raises(ConfigError, match=r"weight is a tensor of inference mode, but a plain"):
        policy_of(pipeline)


def test_weights_of_several_types_become_one(latent_model):
    pipeline = loaded(latent_model)
    pipeline.transformer.transformer_blocks[1].half()
    policy = policy_of(pipeline)
    assert {p.dtype for p in policy.transformer.parameters()} == {torch.float32}
    pipeline = loaded(latent_model).to(torch.float8_e4m3fn)
    with pytest.raises(ConfigError, match=r"dtype is torch\.float8_e4m3fn, but auto, bfloat16"):
        policy_of(pipeline)


def test_a_device_that_is_none(latent_model):
    with pytest.raises(ConfigError, match=r"policy\.device is 'None', which cannot be used"):
        Policy.load(str(latent_model), device=None, config=CONFIG)
