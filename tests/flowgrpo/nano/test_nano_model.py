"""The embedded model: an ordinary diffusers folder, small, whose parts do what they are for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo.nano import MODEL_DIR, prompts, verify
from flowgrpo.nano.draw import draw
from flowgrpo.nano.pretrain import encode_images
from flowgrpo.policies import Policy
from flowgrpo.sampling.rollout import sample_images


@pytest.fixture(scope="module")
def policy():
    return Policy.load("nano", device="cpu", dtype="float32")


def test_folder_is_small_and_has_no_pickle():
    files = [f for f in MODEL_DIR.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 6e6
    assert {f.suffix for f in files} == {".json", ".safetensors"}


@pytest.mark.slow
def test_ode_sampling_draws_mostly_known_objects(policy):
    records = prompts.balanced("train", 12)
    images = sample_images(
        policy,
        policy.encode([m["prompt"] for m in records]),
        steps=20,
        groups=torch.arange(12),
        seeds=torch.arange(12),
        batch_size=12,
    )
    quality = verify.quality(images, records)
    assert quality["junk"] < 0.1 and quality["palette"] < 0.08 and quality["background"] < 0.01


@pytest.mark.slow
def test_the_autoencoder_keeps_what_a_picture_shows(policy):
    records = prompts.balanced("heldout", 48)
    images = draw(records, np.random.default_rng(0))
    pixels = policy.decode(encode_images(policy.pipeline.vae, images))
    assert verify.score(pixels, records)["strict"].mean() >= 0.98
    quality = verify.quality(pixels, records)
    assert quality["palette"] < 0.03 and quality["background"] < 0.01 and quality["junk"] < 0.01


def test_latents_have_about_unit_variance(policy):
    records = prompts.balanced("heldout", 96)
    latents = encode_images(policy.pipeline.vae, draw(records, np.random.default_rng(1)))
    assert latents.shape[1:] == policy.latent_shape == (4, 4, 4)
    assert abs(float(latents.mean())) < 0.1 and 0.9 < float(latents.std()) < 1.1


def test_loads_as_a_diffusers_pipeline():
    from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection

    absent = ("text_encoder_2", "tokenizer_2", "text_encoder_3", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        MODEL_DIR, **dict.fromkeys((*absent, "image_encoder", "feature_extractor"))
    )
    assert isinstance(pipeline.transformer, SD3Transformer2DModel)
    assert isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
    assert isinstance(pipeline.vae, AutoencoderKL)
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.vae):
        assert all(p.isfinite().all() for p in module.parameters())


def test_every_prompt_is_in_the_vocabulary(policy):
    texts = [m["prompt"] for name in prompts.SPLITS for m in prompts.records(name)]
    policy.check_texts([*texts, "", "three red circles"])
    with pytest.raises(ValueError, match="dog"):
        policy.check_texts(["a red dog"])


def test_embeddings_tell_prompts_apart(policy):
    a = policy.encode(["a red circle and a blue square", "a blue circle and a red square"])
    assert (a.embeds[0] - a.embeds[1]).abs().max() > 0.1
    assert (a.pooled[0] - a.pooled[1]).abs().max() > 1e-3
