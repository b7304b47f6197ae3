"""WanPolicy against diffusers' own pipeline: schedule, embeddings, latents, frames; its sizes."""

from __future__ import annotations

import re

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.wan.scheduler import euler
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import setups

TEXTS = ["a red circle", "two blue square triangle", "the"]
LENGTH = 8
SIZE = {"height": 16, "width": 32, "frames": 5}
SMALL = {**SIZE, "max_sequence_length": LENGTH, "text_cache": ""}


def load(folder, dtype="float32", **changes):
    config = PolicyConfig(**{**SMALL, **changes})
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


@pytest.fixture(scope="module")
def wan(wan_model):
    return load(wan_model)


@pytest.fixture(scope="module")
def untouched(wan_model):
    """The pipeline as it is on disk, with the Euler scheduler and the shift of its own."""
    pipeline = WanPipeline.from_pretrained(wan_model)
    assert type(pipeline.scheduler) is UniPCMultistepScheduler and pipeline.config.expand_timesteps
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=pipeline.scheduler.config.flow_shift)
    return pipeline


@pytest.mark.parametrize("steps", [6, 10, 28, 50])
def test_sigmas_are_what_the_pipeline_sets_up(wan, untouched, steps, monkeypatch):
    noise = torch.zeros(1, *wan.latent_shape)
    with monkeypatch.context() as patch:
        patch.setattr(type(untouched.transformer), "forward", lambda self, **k: (noise,))
        untouched(
            "a",
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=1.0,
            num_frames=5,
            height=16,
            width=32,
            max_sequence_length=LENGTH,
            output_type="latent",
        )
    found = wan.sigmas(steps)
    assert found.dtype == torch.float64 and found.shape == (steps + 1,)
    assert torch.equal(found.float(), untouched.scheduler.sigmas)
    # sigma = s t / (1 + (s - 1) t) of even times t, from 1.
    t = torch.linspace(1, float(found[-2] / (5 - 4 * found[-2])), steps, dtype=torch.float64)
    torch.testing.assert_close(found[:-1], 5 * t / (1 + 4 * t), rtol=0, atol=1e-6)


def test_schedulers_that_are_replaced_and_refused():
    unipc = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
    found = euler(UniPCMultistepScheduler(num_train_timesteps=500, **unipc), "m")
    assert (found.config.shift, found.config.num_train_timesteps) == (3.0, 500)
    assert euler(found, "m") is found
    for scheduler, message in (
        (UniPCMultistepScheduler(**{**unipc, "use_flow_sigmas": False}), "use_flow_sigmas False"),
        (UniPCMultistepScheduler(use_flow_sigmas=True), "prediction_type 'epsilon', but 'flow_pr"),
        (FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), "but a fixed shift is exp"),
        (None, "has a NoneType as its scheduler, but a UniPCMultistepScheduler or"),
    ):
        with pytest.raises(ConfigError, match=message):
            euler(scheduler, "m")


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_latents_and_frames_are_diffusers_own(wan, untouched, scale):
    """Our ODE sampler and the pipeline's __call__ from the same noise, which hands the transformer
    a time for each token, where ours has one for each row."""
    seeds = torch.tensor([5, 6, 7])
    ours = rollout.rollout(
        wan,
        wan.encode(TEXTS),
        ode_schedule(wan, 6),
        torch.arange(6)[:, None].expand(6, 3),
        groups=torch.arange(3),
        seeds=seeds,
        batch_size=3,
        uncond=wan.encode([""]) if scale != 1 else None,
        guidance_scale=scale,
    ).latents[-1]
    assert ours.shape == (3, 4, 2, 2, 4) and ours.std() > 0.5
    arguments = {
        "prompt": TEXTS,
        "latents": initial_noise(seeds, wan.latent_shape),
        "num_inference_steps": 6,
        "height": 16,
        "width": 32,
        "num_frames": 5,
        "guidance_scale": scale,
        "max_sequence_length": LENGTH,
    }
    theirs = untouched(**arguments, output_type="latent").frames
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    frames = untouched(**arguments, output_type="pt").frames
    found = wan.decode(ours)
    assert found.shape == (3, 5, 3, 16, 32) and found.is_contiguous() and found.float().std() > 1
    assert ((frames * 255).round().int() - found.int()).abs().amax() <= 1
    # The frames of a clip are decoded one after the other, and differ.
    assert (found[:, 1:] != found[:, :-1]).flatten(2).any(dim=2).all()


def test_embeddings_are_the_pipelines(wan):
    found = wan.encode(TEXTS)
    assert found.embeds.shape == (3, LENGTH, 32) and not found.embeds.requires_grad
    for row, text in enumerate(TEXTS):
        expected, _ = wan.pipeline.encode_prompt(text, max_sequence_length=LENGTH)
        assert torch.equal(found.embeds[row : row + 1], expected)
        # Zeros fill it up.
        words = len(text.split()) + 1
        assert found.embeds[row, :words].any(dim=1).all() and not found.embeds[row, words:].any()
    assert wan.token_limits() == [(wan.pipeline.tokenizer, LENGTH)]
    assert load(wan.name, max_sequence_length=0).encode([""]).embeds.shape == (1, 512, 32)


def test_the_vae_is_undone(wan):
    """Latents of videos are those that the pipeline would decode: mean and deviation taken off."""
    videos = torch.randint(0, 256, (2, 5, 3, 16, 32), dtype=torch.uint8)
    found, vae = wan.encode_images(videos), wan.pipeline.vae
    clips = videos.transpose(1, 2).float() / 127.5 - 1
    frames = vae.encode(clips).latent_dist.mode().detach()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (
        vae.config.latents_mean, vae.config.latents_std
    ))  # fmt: skip
    assert found.shape == (2, *wan.latent_shape) and found.is_contiguous()
    torch.testing.assert_close(found, (frames - mean) / std, rtol=0, atol=1e-5)


def test_weights_that_stay_in_float32(wan_model):
    """From files and from memory, as diffusers keeps them; and rows do not depend on gradients."""
    policy = load(wan_model, dtype="bfloat16")
    kinds = {name: p.dtype for name, p in policy.transformer.named_parameters()}
    kept = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    for name, dtype in kinds.items():
        assert (dtype == torch.float32) == bool(set(kept) & set(name.split("."))), name
    sample = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.tensor([1.0, 0.5, 0.1]), policy.encode(TEXTS)
    with torch.no_grad():
        expected = policy.velocity(sample, sigma, text)
    whole = WanPipeline.from_pretrained(wan_model)
    taken = Policy.load(whole, device="cpu", dtype="bfloat16", config=PolicyConfig(**SMALL))
    assert {n: p.dtype for n, p in taken.transformer.named_parameters()} == kinds
    taken.transformer.requires_grad_(True)
    again = taken.velocity(sample, sigma, text)
    assert torch.equal(again, expected) and again.requires_grad
    assert expected.shape == sample.shape and expected.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_fused_blocks_are_diffusers_own(wan_model, dtype):
    """Velocities, and gradients of adapters and of the norms' and tables' own weights."""
    sample = torch.randn(3, 4, 2, 2, 4, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 4, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for fused in (False, True):
        policy = load(wan_model, dtype=dtype, fused=fused)
        policy.transformer.requires_grad_(True)
        text = policy.encode(TEXTS)
        velocity = policy.velocity(sample, torch.tensor([1.0, 0.5, 0.125]), text)
        with torch.no_grad():
            again = policy.velocity(sample, torch.tensor([1.0, 0.5, 0.125]), text)
        assert torch.equal(again, velocity)
        (velocity.float() * weight).sum().backward()
        grads = {n: p.grad.float() for n, p in policy.transformer.named_parameters()}
        found.append((velocity.detach().float(), grads))
    (expected, own), (velocity, grads) = found
    exact = dtype == "float32"
    atol = 2e-6 if exact else 2e-2
    torch.testing.assert_close(velocity, expected, rtol=0, atol=atol)
    for name, grad in own.items():
        # Those of a key's bias are zero but for rounding: softmax does not see it.
        scale = max(float(grad.abs().max()), 1e-2 if exact else 1.0)
        atol = scale * (2e-5 if exact else 4e-2)
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=atol)
    with pytest.raises(ValueError, match="fused blocks take one time a row, not one a token"):
        policy.transformer.blocks[0](velocity, velocity, torch.zeros(1, 2, 6, 32), None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16", "policy.gradient_checkpointing": True, "policy.fused": True},
        {"optim.guard": True, "optim.beta": 0.0, "sample.transition": "dance_sde"},
        {"optim.steps_per_forward": 2, "optim.split_forward": True},
    ],
    ids=["bfloat16, recomputed, fused", "guard, dance", "split forward"],
)
def test_ratios_are_exactly_one(wan_model, tmp_path, changes):
    common = {
        **{f"policy.{name}": value for name, value in SMALL.items()},
        "policy.lora_targets": None,
        "sample.group_size": 3,
        "sample.steps": 4,
        "sample.guidance_scale": 5.0,
        "optim.beta": 0.04,
    }
    config = setups.config(wan_model, tmp_path, **{**common, **changes})
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and measured["grad_norm"][0] > 0


def test_what_is_refused(wan_model, latent_model):
    policy = load(wan_model)
    pipeline, own = policy.pipeline, dict(policy.pipeline.components)
    transformer, vae = pipeline.transformer, pipeline.vae

    def refused(message, **changes):
        config = PolicyConfig(**{**SMALL, **changes})
        with pytest.raises(ConfigError, match=message) as caught:
            Policy.load(pipeline, device="cpu", config=config)
        assert len(re.findall(r"[.;] [A-Z]", str(caught.value))) == 0

    refused("policy.frames is 80, but the VAE of .* decodes 4n [+] 1 frames.* choose 81", frames=80)
    refused("policy.frames is 3, .* at most 253; choose 1, for example", frames=3)
    refused("policy.frames is 999, .* choose 253, for example", frames=999)
    refused("policy.height is 24, but .* sides are multiples of 16; choose one", height=24)
    refused("policy.width is 1040, but .* has positions for at most 1024 pixels", width=1040)
    known = type(transformer.blocks[0].norm1)
    transformer.blocks[0].norm1 = torch.nn.LayerNorm(32, elementwise_affine=False)
    refused(r"policy.fused is on, but blocks.0.norm1 is a LayerNorm.*; set", fused=True)
    transformer.blocks[0].norm1 = known(32, 1e-6, elementwise_affine=False)
    for name in ("text_encoder", "tokenizer", "vae"):
        setattr(pipeline, name, None)
        refused(f"lacks {name}, but all of a WanPipeline's parts are expected; restore them")
        setattr(pipeline, name, own[name])
    pipeline.register_to_config(boundary_ratio=0.875)
    refused("has two transformers, .* [(]boundary_ratio 0.875[)], but one is expected; choose")
    pipeline.register_to_config(boundary_ratio=None)
    for field, value, message in (
        ("image_dim", 1280, "takes an image beside noise, time and text"),
        ("out_channels", 8, "in_channels 4, out_channels 8"),
        ("text_dim", 64, "with d_model 32, but its transformer is made for 64"),
    ):
        before = transformer.config[field]
        transformer.register_to_config(**{field: value})
        refused(message)
        transformer.register_to_config(**{field: before})
    for field, value, message in (
        ("z_dim", 8, "with z_dim 8, but its transformer is made for 4; put back"),
        ("latents_std", [1.0, 0.0, 1.0, 1.0], "but 4 finite numbers above 0 are expected"),
        ("latents_mean", [0.0], r"with latents_mean \[0.0\], but 4 finite numbers are"),
        ("temperal_downsample", [True, False], "and 2 times in time, .* made for 8 and 4 times"),
    ):
        before = vae.config[field]
        vae.register_to_config(**{field: value})
        refused(message)
        vae.register_to_config(**{field: before})
    bare = Policy.load(
        pipeline,
        device="cpu",
        config=PolicyConfig(**SMALL),
        encode=lambda texts: Conditioning(torch.zeros(len(texts), 4, 32), torch.zeros(1, 1)),
    )
    with pytest.raises(ConfigError, match=r"embeds \[4, 32\] .* but \[8, 32\] are expected"):
        bare.encode(["a"])
    with pytest.raises(ConfigError, match=r"policy\.frames is 5, but .* makes images, not"):
        Policy.load(str(latent_model), device="cpu", config=PolicyConfig(frames=5))
