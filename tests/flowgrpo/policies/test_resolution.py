"""Pixels, latents and tokens: the VAE's factor and the model's patch decide what fits."""

from __future__ import annotations

import pytest
import torch

from flowgrpo.config import Config, ConfigError, PolicyConfig, replace
from flowgrpo.policies import Policy
from support import pipelines


def load(folder, resolution, dtype="float32", **fields):
    config = PolicyConfig(resolution=resolution, max_sequence_length=4, text_cache="", **fields)
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


@pytest.fixture(scope="module")
def real_sizes(tmp_path_factory):
    """SD3 and FLUX with the real models' VAE factor 8 and default resolution 1024."""
    folder = tmp_path_factory.mktemp("sizes")
    sd3 = pipelines.save_latent_pipeline(folder / "sd3", size=128, blocks=4)
    return {"sd3": sd3, "flux": pipelines.save_flux_pipeline(folder / "flux", blocks=4)}


SHAPES = {
    ("sd3", 512): (4, 64, 64),
    ("sd3", 0): (4, 128, 128),
    ("flux", 512): (1024, 16),
    ("flux", 0): (4096, 16),
}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "resolution"), SHAPES)
def test_512_and_the_default_of_1024(real_sizes, family, resolution):
    policy = load(real_sizes[family], resolution)
    assert policy.latent_shape == SHAPES[family, resolution]
    assert policy.resolution == (resolution or 1024)
    if resolution == 0:
        return  # Seconds on a CPU.
    sample = torch.randn(1, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = policy.velocity(sample, torch.ones(1), policy.encode(["a red circle"]))
    assert velocity.shape == sample.shape and velocity.isfinite().all()
    assert policy.decode(sample).shape == (1, 3, policy.resolution, policy.resolution)


@pytest.mark.parametrize(
    ("family", "resolution", "message"),
    [
        ("sd3", 500, "resolution is 500, but .* multiples of 16; choose one, for example 496"),
        ("flux", 1000, "resolution is 1000, but .* multiples of 16; choose one, for example 992"),
        ("sd3", 1040, "resolution is 1040, but .* positions for at most 1024 pixels"),
    ],
)
def test_what_does_not_fit_is_refused(real_sizes, family, resolution, message):
    with pytest.raises(ConfigError, match=message):
        load(real_sizes[family], resolution)


def test_pixels_are_latents_without_a_vae(pixel_model):
    assert load(pixel_model, 4).latent_shape == (3, 4, 4)
    assert load(pixel_model, 0).latent_shape == (3, 8, 8)
    with pytest.raises(ConfigError, match="multiples of 2"):
        load(pixel_model, 5)


@pytest.mark.slow
def test_slices_are_the_same_images(latent_model):
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, sliced = load(latent_model, 0), load(latent_model, 0, vae_slicing=True)
    assert sliced.pipeline.vae.use_slicing and not whole.pipeline.vae.use_slicing
    difference = whole.decode(latents).int() - sliced.decode(latents).int()
    assert difference.abs().amax() <= 1


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", "float32"), ("bfloat16", "bfloat16"), ("float32",) * 2]
)
@pytest.mark.parametrize("model", ["latent_model", "flux_model"])
def test_dtype_of_the_vae(model, dtype, expected, request):
    """float16 would overflow in the decoder; the rest of the model is in the dtype asked for."""
    policy = load(request.getfixturevalue(model), 16, dtype)
    assert policy.pipeline.vae.dtype == getattr(torch, expected)
    assert policy.transformer.dtype == policy.pipeline.text_encoder.dtype == policy.dtype
    assert policy.decode(torch.randn(2, *policy.latent_shape)).dtype == torch.uint8


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["latent_model", "flux_model"])
def test_images_of_the_gpu_are_those_of_the_cpu(model, request, monkeypatch):
    # Convolutions, unlike matrix products, are in TF32 by default.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    folder, config = request.getfixturevalue(model), PolicyConfig(resolution=16, text_cache="")
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        policy = Policy.load(str(folder), device=device, dtype="float32", config=config)
        found.append(policy.decode(latents.view(3, *policy.latent_shape).to(device)).cpu().int())
    weight = policy.pipeline.vae.decoder.conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert (found[0] - found[1]).abs().amax() <= 1


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("resolution", -1, "at least 0"),
        ("max_sequence_length", 513, "is 513, but diffusers takes 512 tokens at most"),
        ("embedded_guidance", float("nan"), "at least 0"),
    ],
)
def test_fields_are_checked(field, value, message):
    with pytest.raises(ConfigError, match=message):
        replace(Config(), **{f"policy.{field}": value})
