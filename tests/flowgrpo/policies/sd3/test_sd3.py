"""SD3Policy against diffusers' own pipeline: schedule, embeddings, velocity, images."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.device import choose_dtype
from flowgrpo.sampling import rollout
from flowgrpo_kernels import initial_noise

TEXTS = ["a red circle", "two blue square", "the dark triangle"]


@pytest.fixture(scope="module")
def pixel(pixel_model):
    return Policy.load(str(pixel_model), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def latent(latent_model):
    return Policy.load(str(latent_model), device="cpu", dtype="float32")


@pytest.mark.parametrize("steps", [6, 10, 28, 40])
@pytest.mark.parametrize("shift", [1.0, 2.0, 3.0])
def test_sigmas_are_the_schedulers_own(pixel, steps, shift, monkeypatch):
    monkeypatch.setattr(pixel, "scheduler", FlowMatchEulerDiscreteScheduler(shift=shift))
    own = FlowMatchEulerDiscreteScheduler(shift=shift)
    own.set_timesteps(steps)
    found = pixel.sigmas(steps)
    assert found.dtype == torch.float64 and found.shape == (steps + 1,)
    assert torch.equal(found.float(), own.sigmas) and torch.equal(found, found.float().double())
    assert found[0] == 1 and found[-1] == 0
    # What the model is told: sigma in float32 times 1000, as the scheduler's timesteps.
    assert torch.equal(found.float()[:-1] * 1000, own.timesteps)


def test_sigmas_leave_the_scheduler_alone(pixel):
    before = pixel.scheduler.sigmas.clone()
    pixel.sigmas(7)
    assert torch.equal(pixel.scheduler.sigmas, before)


@pytest.mark.parametrize("steps", [6, 10, 28, 40])
@pytest.mark.parametrize("dynamic", [False, True])
def test_sigmas_are_what_the_pipeline_sets_up(latent, dynamic, steps, monkeypatch):
    """As the pipeline's own __call__ leaves its scheduler; dynamic: mu from the tokens."""
    own = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
    monkeypatch.setattr(latent.pipeline, "scheduler", own)
    monkeypatch.setattr(latent, "scheduler", own)
    found, text = latent.sigmas(steps), latent.encode(TEXTS[:1])

    def stop(pipeline, i, t, values):
        pipeline._interrupt = True
        return values

    latent.pipeline(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        guidance_scale=1.0,
        num_inference_steps=steps,
        output_type="latent",
        callback_on_step_end=stop,
    )
    assert torch.equal(found.float(), own.sigmas)
    assert torch.equal(found.float()[:-1] * 1000, own.timesteps)


def test_embeddings_with_one_encoder(pixel):
    found = pixel.encode(TEXTS)
    ids = pixel.pipeline.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    out = pixel.pipeline.text_encoder(ids)
    assert torch.equal(found.embeds, out.last_hidden_state) and found.embeds.shape == (3, 8, 16)
    assert torch.equal(found.pooled, out.text_embeds) and not found.embeds.requires_grad
    assert not torch.equal(found.embeds[0], found.embeds[1])


def test_embeddings_with_three_encoders(latent):
    found = latent.encode(TEXTS)
    assert found.embeds.shape == (3, 8 + 128, 32)
    for row, text in enumerate(TEXTS):
        embeds, _, pooled, _ = latent.pipeline.encode_prompt(
            text, text, text, do_classifier_free_guidance=False, max_sequence_length=128
        )
        assert torch.equal(found.embeds[row], embeds[0])
        assert torch.equal(found.pooled[row], pooled[0])


def test_rows_of_conditioning(pixel):
    found = pixel.encode(TEXTS)
    rows = found.rows(torch.tensor([2, 0, 2]))
    assert torch.equal(rows.embeds, found.embeds[[2, 0, 2]])
    repeated = found.repeat_interleave(2)
    assert len(repeated) == 6 and torch.equal(repeated.pooled[3], found.pooled[1])
    one = found.rows(torch.tensor([1])).expand(2).then(found)
    assert isinstance(one, Conditioning) and len(one) == 5
    assert torch.equal(one.embeds[0], one.embeds[3])


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("which", ["pixel", "latent"])
def test_images_are_diffusers_own(which, guidance, request):
    """Our ODE sampler and the pipeline's __call__ from the same noise: the same images."""
    policy = request.getfixturevalue(which)
    seeds = torch.tensor([5, 6, 7])
    uncond = policy.encode([""])
    text = policy.encode(TEXTS)
    arguments = {"groups": torch.arange(3), "seeds": seeds, "batch_size": 3, "steps": 8}
    ours = rollout.sample_images(
        policy, text, uncond=uncond if guidance != 1 else None, guidance_scale=guidance, **arguments
    )
    latents = policy.pipeline(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        negative_prompt_embeds=uncond.embeds.expand(3, -1, -1),
        negative_pooled_prompt_embeds=uncond.pooled.expand(3, -1),
        latents=initial_noise(seeds, policy.latent_shape),
        num_inference_steps=8,
        guidance_scale=guidance,
        output_type="latent",
        height=policy.latent_shape[1] * policy.pipeline.vae_scale_factor,
        width=policy.latent_shape[2] * policy.pipeline.vae_scale_factor,
    ).images
    theirs = latents
    if policy.pipeline.vae is not None:
        vae = policy.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        theirs = vae.decode(scaled).sample
    theirs = policy.pipeline.image_processor.postprocess(theirs.detach(), output_type="np")
    theirs = torch.from_numpy((theirs * 255).round()).permute(0, 3, 1, 2).to(torch.int)
    assert ours.dtype == torch.uint8 and ours.float().std() > 1
    assert (ours.int() - theirs).abs().amax() <= 1


def test_velocity_does_not_depend_on_gradients(pixel):
    sample = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (sample, torch.tensor([1.0, 0.5, 0.1]), pixel.encode(TEXTS))
    with torch.no_grad():
        expected = pixel.velocity(*arguments)
    assert torch.equal(pixel.velocity(*arguments), expected)
    assert expected.shape == sample.shape and not expected.requires_grad


def test_reference_is_the_model_before_training(pixel_model):
    policy = Policy.load(str(pixel_model), device="cpu", dtype="float32")
    sample = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    arguments = (sample, torch.tensor([1.0, 0.5, 0.1]), policy.encode(TEXTS))
    base = policy.velocity(*arguments)
    with pytest.raises(RuntimeError, match="neither adapters nor a kept"), policy.reference():
        pass
    trained = add_adapter(policy.transformer, PolicyConfig(lora_rank=2, lora_alpha=2))
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.3)
    changed = policy.velocity(*arguments)
    assert not torch.equal(changed, base)
    with policy.reference():
        assert torch.equal(policy.velocity(*arguments), base)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert torch.equal(policy.velocity(*arguments), changed)
    assert all(p.requires_grad for p in trained)
    assert set(map(id, policy.parameters())) == set(map(id, trained))


def test_other_bad_input(pixel, pixel_model, monkeypatch):
    with pytest.raises(ConfigError, match=r"'a purple circle' has a word that .* does not know"):
        pixel.encode(["a red circle", "a purple circle"])
    with pytest.raises(ConfigError, match="does not know"):
        pixel.check_texts(["elephant"])
    with pytest.raises(ConfigError, match="device is 'warp9', which cannot be used"):
        Policy.load(str(pixel_model), device="warp9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match="no folder and could not be got from the Hugging Face Hub"
    ):
        Policy.load("nobody/such model")


def test_dtype(pixel_model, monkeypatch):
    policy = Policy.load(str(pixel_model), device="cpu", dtype="bfloat16")
    assert policy.encode(TEXTS).embeds.dtype == torch.bfloat16 == policy.transformer.dtype
    sample = torch.zeros(3, 3, 8, 8)
    assert policy.velocity(sample, torch.ones(3), policy.encode(TEXTS)).dtype == torch.bfloat16
    for fast, expected in ((True, torch.bfloat16), (False, torch.float32)):
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda fast=fast: fast, raising=False)
        assert choose_dtype("auto", torch.device("cpu")) == expected
    assert choose_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_the_pipeline_class_loads_the_folder_itself(pixel_model):
    """The folder is an ordinary one: diffusers loads it when the absent parts are named."""
    absent = ("vae", "text_encoder_2", "text_encoder_3", "tokenizer_2", "tokenizer_3")
    pipeline = StableDiffusion3Pipeline.from_pretrained(pixel_model, **dict.fromkeys(absent))
    assert pipeline.vae is None and pipeline.text_encoder is not None
