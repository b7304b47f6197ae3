"""FluxPolicy against diffusers' own pipeline: schedule, embeddings, velocity, latents, images."""

from __future__ import annotations

import pytest
import torch

from flowgrpo.config import PolicyConfig
from flowgrpo.policies import Policy
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import pipelines

TEXTS = ["a red circle", "two blue square", "the dark triangle"]
SMALL = PolicyConfig(resolution=16, max_sequence_length=8, text_cache="")


def load(folder, config=SMALL, dtype="float32"):
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


@pytest.fixture(scope="module")
def flux(flux_model):
    return load(flux_model)


def call(policy, latents, guidance=3.5, **arguments):
    """The pipeline's own sampling from packed `latents` with the embeddings of TEXTS."""
    text = policy.encode(TEXTS)
    return policy.pipeline(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        latents=latents,
        guidance_scale=guidance,
        height=policy.resolution,
        width=policy.resolution,
        output_type="latent",
        **arguments,
    ).images


@pytest.mark.parametrize("steps", [6, 10, 28, 40])
@pytest.mark.parametrize("resolution", [16, 128, 256])
def test_sigmas_are_what_the_pipeline_sets_up(flux_model, resolution, steps, monkeypatch):
    """For 16, 1024 and 4096 tokens; the latter two are FLUX.1's at 512 and 1024 pixels."""
    policy = load(flux_model, PolicyConfig(resolution=resolution, text_cache=""))

    def stop(pipeline, i, t, values):
        pipeline._interrupt = True
        return values

    found = policy.sigmas(steps)
    noise = torch.zeros(3, *policy.latent_shape)
    monkeypatch.setattr(type(policy.transformer), "forward", lambda self, **k: (noise,))
    call(policy, noise, num_inference_steps=steps, callback_on_step_end=stop)
    own = policy.pipeline.scheduler
    assert found.dtype == torch.float64 and found.shape == (steps + 1,)
    assert torch.equal(found.float(), own.sigmas) and found[0] == 1 and found[-1] == 0
    assert torch.equal(found.float()[:-1] * 1000, own.timesteps)
    # The shift depends on the resolution: more tokens stay noisy for longer.
    if resolution == 256:
        small = load(flux_model).sigmas(steps)
        assert (found[1:-1] > small[1:-1]).all()


def test_embeddings_are_the_pipelines(flux):
    found = flux.encode([TEXTS[0], TEXTS[1], TEXTS[0]])
    for row, text in enumerate([TEXTS[0], TEXTS[1], TEXTS[0]]):
        embeds, pooled, _ = flux.pipeline.encode_prompt(text, text, max_sequence_length=8)
        assert torch.equal(found.embeds[row], embeds[0]) and found.embeds.shape == (3, 8, 32)
        assert torch.equal(found.pooled[row], pooled[0]) and not found.embeds.requires_grad
    assert not torch.equal(found.embeds[0], found.embeds[1])


def test_length_of_the_text(flux_model):
    assert load(flux_model, PolicyConfig(resolution=16)).encode([""]).embeds.shape == (1, 128, 32)
    longer = PolicyConfig(resolution=16, max_sequence_length=512, text_cache="")
    policy = load(flux_model, longer)
    embeds, _, _ = policy.pipeline.encode_prompt(TEXTS[0], None)  # 512 is the pipeline's default
    assert torch.equal(policy.encode(TEXTS[:1]).embeds, embeds)


@pytest.mark.parametrize("true_cfg", [1.0, 4.0])
@pytest.mark.parametrize("embedded", [3.5, 1.0])
def test_latents_and_images_are_diffusers_own(flux_model, embedded, true_cfg):
    """Our ODE sampler and the pipeline's __call__ from the same noise."""
    config = PolicyConfig(
        resolution=16, max_sequence_length=8, text_cache="", embedded_guidance=embedded
    )
    policy = load(flux_model, config)
    seeds = torch.tensor([5, 6, 7])
    uncond = policy.encode([""])
    ours = rollout.rollout(
        policy,
        policy.encode(TEXTS),
        ode_schedule(policy, 8),
        torch.arange(8)[:, None].expand(8, 3),
        groups=torch.arange(3),
        seeds=seeds,
        batch_size=3,
        uncond=uncond if true_cfg != 1 else None,
        guidance_scale=true_cfg,
    ).latents[-1]
    guided = {
        "true_cfg_scale": true_cfg,
        "negative_prompt_embeds": uncond.embeds.expand(3, -1, -1),
        "negative_pooled_prompt_embeds": uncond.pooled.expand(3, -1),
    }
    noise = initial_noise(seeds, policy.latent_shape)
    theirs = call(policy, noise, embedded, num_inference_steps=8, **guided)
    assert ours.shape == (3, 16, 16) and ours.std() > 0.5
    # Both step in float32; theirs rounds x + dt v and u + w (c - u) after each operation.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=5e-6)
    unpacked = policy.pipeline._unpack_latents(theirs, 16, 16, 2)
    vae = policy.pipeline.vae
    pixels = vae.decode(unpacked / vae.config.scaling_factor + vae.config.shift_factor).sample
    image = policy.pipeline.image_processor.postprocess(pixels.detach(), output_type="np")
    image = torch.from_numpy((image * 255).round()).permute(0, 3, 1, 2).int()
    found = policy.decode(ours)
    assert found.shape == (3, 3, 16, 16) and found.is_contiguous() and found.float().std() > 1
    assert (found.int() - image).abs().amax() <= 1


@pytest.mark.slow
def test_embedded_guidance_is_told(flux_model, tmp_path):
    sample = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.5, 0.1])
    found = []
    for value in (3.5, 1.0):
        policy = load(flux_model, PolicyConfig(resolution=16, embedded_guidance=value))
        found.append(policy.velocity(sample, sigma, policy.encode(TEXTS)))
    assert not torch.equal(*found)
    policy = load(pipelines.save_flux_pipeline(tmp_path / "schnell", guidance=False))
    text = policy.encode(TEXTS)
    expected = policy.transformer(
        hidden_states=sample,
        timestep=sigma,
        encoder_hidden_states=text.embeds,
        pooled_projections=text.pooled,
        txt_ids=torch.zeros(8, 3),
        img_ids=policy.pipeline._prepare_latent_image_ids(3, 4, 4, "cpu", torch.float32),
    ).sample
    torch.testing.assert_close(policy.velocity(sample, sigma, text), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_velocity_does_not_depend_on_gradients(flux_model, dtype):
    policy = load(flux_model, dtype=dtype)
    sample = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    arguments = (sample, torch.tensor([1.0, 0.5, 0.1]), policy.encode(TEXTS))
    with torch.no_grad():
        expected = policy.velocity(*arguments)
    policy.transformer.requires_grad_(True)
    again = policy.velocity(*arguments)
    assert torch.equal(again, expected) and again.requires_grad
    assert expected.shape == sample.shape and expected.dtype == policy.dtype


@pytest.mark.slow
def test_rotary_tables_are_made_once_and_lent(flux_model, monkeypatch):
    """No forward makes them anew; the pipeline keeps its own module, for images of other sizes."""
    policy = Policy.load(str(flux_model), device="cpu", dtype="float32")
    own = policy.transformer.pos_embed
    monkeypatch.setattr(own, "forward", lambda ids: pytest.fail("made anew"))
    x = torch.randn(1, *policy.latent_shape)
    policy.velocity(x, torch.tensor([0.5]), policy.encode(["a circle"]))
    assert policy.transformer.pos_embed is own
