"""Flux2KleinPolicy against diffusers' own pipeline: schedule, embeddings, velocity, latents,
images; its base with guidance, and the distilled model without."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise

import pytest
import torch
from diffusers import Flux2KleinPipeline
from torch import nn

from flowgrpo import train
from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy, tokens
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import pipelines, setups

TEXTS = ["a red circle", "two blue square triangle", "the"]
LENGTH = 24
COMMON = {"resolution": 16, "max_sequence_length": LENGTH, "text_cache": ""}


def load(folder, dtype="float32", **changes):
    config = PolicyConfig(**{**COMMON, **changes})
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


@pytest.fixture(scope="module")
def klein(flux2_model):
    return load(flux2_model)


@pytest.fixture(scope="module")
def fused(flux2_model):
    return load(flux2_model, fused=True)


@pytest.fixture(scope="module")
def untouched(flux2_model):
    """The pipeline as diffusers loads it."""
    return Flux2KleinPipeline.from_pretrained(flux2_model)


def call(policy, pipeline, packed, steps=8, **arguments):
    """The pipeline's own sampling of TEXTS from packed latents: (packed latents of the last step,
    images in [0, 1])."""
    kept = {}

    def keep(pipeline, i, t, values):
        kept["latents"] = values["latents"]
        return values

    rows, columns = policy.height // 4, policy.width // 4
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        prompt=TEXTS,
        latents=packed.transpose(1, 2).unflatten(2, (rows, columns)),
        num_inference_steps=steps,
        height=policy.height,
        width=policy.width,
        max_sequence_length=LENGTH,
        output_type="pt",
        callback_on_step_end=keep,
        **arguments,
    ).images
    return kept["latents"], images


def sample(policy, scale=1.0, steps=8):
    """Our ODE sampler: (latents, the noise that they began as)."""
    seeds = torch.tensor([5, 6, 7])
    latents = rollout.rollout(
        policy,
        policy.encode(TEXTS),
        ode_schedule(policy, steps),
        torch.arange(steps)[:, None].expand(steps, 3),
        groups=torch.arange(3),
        seeds=seeds,
        batch_size=3,
        uncond=policy.encode_empty(scale),
        guidance_scale=scale,
    ).latents[-1]
    return latents, initial_noise(seeds, policy.latent_shape)


@pytest.fixture(scope="module")
def sizes(flux2_model):
    """Policies of 16, 1024, 4096 and 16384 tokens, and of 1536 for 768 x 512 pixels' worth."""
    pipeline = load(flux2_model).pipeline
    sides = ((16, 16), (128, 128), (256, 256), (512, 512), (192, 128))
    configs = [PolicyConfig(height=h, width=w, text_cache="") for h, w in sides]
    return [Policy.load(pipeline, device="cpu", config=config) for config in configs]


@pytest.mark.parametrize("steps", [4, 6, 10, 28, 50])
def test_sigmas_are_what_the_pipeline_sets_up(sizes, steps, monkeypatch):
    """By the model's own shift, of tokens and steps, which is another above 4300 tokens."""
    pipeline, rows = sizes[0].pipeline, []

    def stop(pipeline, i, t, values):
        pipeline._interrupt = True
        return values

    monkeypatch.setattr(pipeline, "encode_prompt", lambda **k: (torch.zeros(1, 2, 48),) * 2)
    # What comes behind the steps is no matter here.
    monkeypatch.setattr(pipeline, "_unpack_latents_with_ids", lambda *x: torch.zeros(1, 16, 1, 1))
    for policy in sizes:
        found, grid = policy.sigmas(steps), (policy.height // 4, policy.width // 4)
        noise = torch.zeros(1, *policy.latent_shape)
        with monkeypatch.context() as patch:
            patch.setattr(type(policy.transformer), "forward", lambda self, x=noise, **k: (x,))
            pipeline(
                prompt="a",
                latents=noise.transpose(1, 2).unflatten(2, grid),
                num_inference_steps=steps,
                height=policy.height,
                width=policy.width,
                guidance_scale=1.0,
                output_type="latent",
                callback_on_step_end=stop,
            )
        own = pipeline.scheduler
        assert found.dtype == torch.float64 and found.shape == (steps + 1,)
        assert torch.equal(found.float(), own.sigmas) and found[0] == 1 and found[-1] == 0
        rows.append(found)
    # More tokens stay noisy for longer.
    ordered = [rows[number] for number in (0, 1, 4, 2)]
    assert all((a < b)[1:-1].all() for a, b in pairwise(ordered))


@pytest.mark.slow
def test_embeddings_are_the_pipelines(klein, flux2_model):
    found = klein.encode(TEXTS)
    assert found.embeds.shape == (3, LENGTH, 3 * 16) and not found.embeds.requires_grad
    assert found.pooled.shape == (3, 1) and not found.pooled.any()
    for row, text in enumerate(TEXTS):
        embeds, _ = klein.pipeline.encode_prompt(text, max_sequence_length=LENGTH)
        assert torch.equal(found.embeds[row], embeds[0])
    # One at a time, whatever stands beside it; 512 tokens by default.
    assert torch.equal(klein.encode(TEXTS[:1]).embeds, found.embeds[:1])
    assert load(flux2_model, max_sequence_length=0).encode([""]).embeds.shape == (1, 512, 48)


def test_a_text_is_cut_behind_the_templates_beginning(flux2_model):
    policy = load(flux2_model, max_sequence_length=8)
    words = policy.pipeline.tokenizer
    assert len(words("<|im_start|>user\n").input_ids) == 3
    whole = "a red green blue yellow"
    cut, longer = f"{whole} circle", f"{whole} square"
    assert len(words(whole).input_ids) == 5
    assert tokens.count_cut(policy, [whole, cut, longer]) == {5: 2}
    found = policy.encode([whole, cut, longer]).embeds
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0, -1], found[0, -2])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale", "blocks", "height"),
    [(1.0, "diffusers'", 24), (4.0, "diffusers'", 16), (4.0, "fused", 16)],
)
def test_latents_and_images_are_diffusers_own(
    request, flux2_model, untouched, scale, blocks, height
):
    """From the same noise, with the base model's guidance and without; of two sizes."""
    if height == 16:
        policy = request.getfixturevalue("fused" if blocks == "fused" else "klein")
    else:
        policy = load(flux2_model, height=height)
    assert f"blocks {blocks}, modulation once" in policy.describe()
    ours, noise = sample(policy, scale)
    assert ours.shape == (3, height, 16) and ours.std() > 0.5
    # Fused blocks are not the pipeline's to call.
    for pipeline in (untouched,) if blocks == "fused" else (untouched, policy.pipeline):
        theirs, images = call(policy, pipeline, noise, guidance_scale=scale)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if blocks == "fused" else 1e-6)
    found = policy.decode(ours)
    assert found.shape == (3, 3, height, 16) and found.is_contiguous()
    assert found.float().std() > 1
    assert (found.int() - (images * 255).round().int()).abs().amax() <= 1
    # Without the other scale's guidance.
    other, _ = sample(policy, 5.0 - scale)
    assert (other - ours).abs().max() > 1e-4


def test_the_vae_is_undone(klein):
    """Latents of pictures are the pipeline's: patches, by the statistics of the batch norm."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = klein.encode_images(images)
    pipeline, pixels = klein.pipeline, images.float() / 127.5 - 1
    expected = pipeline._pack_latents(pipeline._encode_vae_image(pixels, None)).detach()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    own = pipeline.vae.encode(pixels).latent_dist.mode().detach()
    torch.testing.assert_close(klein.unpack(found), own, rtol=0, atol=1e-5)
    assert not torch.allclose(own, klein.unpack(found * 1.1), atol=1e-2)


def test_a_decoder_in_16_bits_has_the_pipelines_scale(flux2_model):
    policy = load(flux2_model, dtype="bfloat16")
    bn = policy.pipeline.vae.bn
    assert bn.running_var.dtype == torch.bfloat16
    std = torch.sqrt(bn.running_var + policy.pipeline.vae.config.batch_norm_eps).float()
    latents = torch.randn(1, 16, 16)
    expected = latents * std + bn.running_mean.float()
    found = policy.pipeline._patchify_latents(policy.unpack(latents)).flatten(2).transpose(1, 2)
    assert torch.equal(found, expected) and policy.decode(latents).float().std() > 1


def test_tables_of_other_positions_are_not_given(klein):
    rotary = klein._rotary
    assert torch.equal(rotary(klein._text_ids)[0], klein.transformer.pos_embed(klein._text_ids)[0])
    assert rotary(klein._image_ids)[0].shape == (16, 16) and klein._text_ids[-1].tolist()[3] == 23
    with pytest.raises(ValueError, match="positions: tables are made for one"):
        rotary(klein._text_ids.clone())


@pytest.mark.slow
def test_looked_up_modulations_are_the_computed_ones(flux2_model):
    """One row of the table for all prompts: of three modulations for all blocks, and a norm."""
    policy, sigmas = load(flux2_model), torch.tensor([1.0, 0.6, 0.2, 0.0])
    text = policy.encode(TEXTS)
    table = policy.prepare(text, sigmas)
    assert table.table.shape == (3, 3, (6 + 6 + 3 + 2) * 32) and table.table.stride(1) == 0
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 2, 1])
    expected = policy.velocity(x, sigmas[steps], text)
    with torch.no_grad():
        for name in ("time_guidance_embed", "single_stream_modulation", "context_embedder"):
            for parameter in getattr(policy.transformer, name).parameters():
                parameter.fill_(torch.nan)
    found = policy.velocity(x, sigmas[steps], table.rows_at(torch.arange(3), steps))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_fused_gradients_are_diffusers_own(klein, fused):
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(1))
    sigma, found = torch.tensor([1.0, 0.5, 0.1]), []
    for policy in (klein, fused):
        text = policy.encode(TEXTS)
        with torch.no_grad():
            expected = policy.velocity(x, sigma, text)
        transformer = policy.transformer.requires_grad_(True)
        velocity = policy.velocity(x, sigma, text)
        assert torch.equal(velocity, expected) and velocity.dtype == torch.float32
        parameters = dict(transformer.named_parameters())
        grads = torch.autograd.grad((velocity * weight).sum(), parameters.values())
        transformer.requires_grad_(False)
        found.append((expected, dict(zip(parameters, grads, strict=True))))
    (expected, own), (velocity, grads) = found
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=3e-6)
    for name, grad in own.items():
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(grads[name], grad, rtol=0, atol=2e-5 * grad.abs().max())


@pytest.mark.slow
def test_fused_bfloat16_is_no_worse_and_the_same_with_gradients(flux2_model):
    exact, plain, ours = (
        load(flux2_model, dtype, **changes)
        for dtype, changes in ((torch.float64, {}), ("bfloat16", {}), ("bfloat16", {"fused": True}))
    )
    weights = plain.transformer.state_dict()
    exact.transformer.load_state_dict({name: t.double() for name, t in weights.items()})
    x = torch.randn(9, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.tensor([1.0, 0.5, 0.125]).repeat(3), plain.encode(TEXTS * 3)
    double = Conditioning(text.embeds.double(), text.pooled.double())
    with torch.no_grad():
        expected = exact.velocity(x.bfloat16(), sigma, double)
        theirs, found = (policy.velocity(x, sigma, text) for policy in (plain, ours))
    errors = [(v.double() - expected).square().mean().sqrt() for v in (found, theirs)]
    assert found.dtype == torch.bfloat16 and 1e-5 < errors[0] <= 1.02 * errors[1]
    ours.transformer.requires_grad_(True)
    assert torch.equal(ours.velocity(x, sigma, text), found)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16", "policy.fused": True},
        {
            "policy.gradient_checkpointing": True,
            "optim.steps_per_forward": 2,
            "optim.split_forward": True,
            "optim.guard": True,
            "optim.beta": 0.0,
        },
    ],
    ids=["bfloat16, fused", "guard, recomputed, split forward"],
)
def test_ratios_are_exactly_one(flux2_model, tmp_path, changes):
    common = {f"policy.{name}": value for name, value in COMMON.items()}
    common |= {"policy.lora_targets": None, "sample.guidance_scale": 4.0, "optim.beta": 0.04}
    common |= {"sample.group_size": 3, "sample.steps": 4}
    config = setups.config(flux2_model, tmp_path, **{**common, **changes})
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and measured["grad_norm"][0] > 0


@pytest.mark.slow
def test_a_distilled_model_takes_no_guidance(tmp_path):
    """Where the pipeline leaves it out without a word; without, both make one picture."""
    folder = pipelines.save_flux2_pipeline(tmp_path / "klein", distilled=True)
    policy = load(folder)
    ours, noise = sample(policy, steps=4)
    theirs, _ = call(policy, policy.pipeline, noise, steps=4, guidance_scale=4.0)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    message = r"the guidance scale is 4, but .*klein is distilled .*; set it to 1 \(sample.guidan"
    with pytest.raises(ConfigError, match=message):
        policy.encode_empty(4.0)
    common = {f"policy.{name}": value for name, value in COMMON.items()}
    changes = {"policy.lora_targets": None, "sample.guidance_scale": 4.0}
    config = setups.config(folder, tmp_path, **common, **changes)
    with pytest.raises(ConfigError, match=message):
        train.setup(config)


@pytest.mark.slow
def test_pipelines_that_are_refused(flux2_model, tmp_path):
    pipeline = load(flux2_model).pipeline
    own, transformer, vae = pipeline.components, pipeline.transformer, pipeline.vae

    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message) as caught:
            Policy.load(pipeline, device="cpu", config=PolicyConfig(**{**COMMON, **changes}))
        assert len(re.findall(r"[.;] [A-Z]", str(caught.value))) == 0

    refused("policy.resolution is 18, but .* sides are multiples of 4; choose one", resolution=18)
    refused("the layers of Flux2Transformer2DModel cannot use it; choose", attention="plain")
    for name in ("text_encoder", "tokenizer", "vae"):
        setattr(pipeline, name, None)
        refused(f"lacks {name}, but all of a Flux2KleinPipeline's parts are expected; restore")
        setattr(pipeline, name, own[name])
    for module, values, message in (
        (transformer, {"guidance_embeds": True}, "a guidance value that FLUX.2-klein is not told"),
        (transformer, {"joint_attention_dim": 64}, "3 times which are 48, but .* made for 64; put"),
        (vae, {"latent_channels": 8}, "latent_channels 8, but its transformer is made for 4; put"),
        (vae, {"block_out_channels": (8,) * 3}, "enlarges latents 4 times, but .* made for 2"),
    ):
        before = {name: module.config[name] for name in values}
        module.register_to_config(**values)
        refused(message)
        module.register_to_config(**before)
    for name, value, message in (
        ("running_mean", torch.zeros(4), r"bn.running_mean \[4\], but 16 numbers, which norm"),
        ("running_var", torch.zeros(16), "bn.running_var has numbers that are not finite or"),
        ("running_mean", torch.full([16], torch.nan), "bn.running_mean has numbers that are not"),
    ):
        before = getattr(vae.bn, name)
        setattr(vae.bn, name, value)
        refused(message)
        setattr(vae.bn, name, before)
    pipeline.text_encoder.config.num_hidden_layers = 26
    refused(r"of 26 layers, but layers \(9, 18, 27\) make an embedding; put back")
    pipeline.text_encoder.config.num_hidden_layers = 27
    template, pipeline.tokenizer.chat_template = pipeline.tokenizer.chat_template, None
    refused("has no chat template, which every text is put into; put back")
    pipeline.tokenizer.chat_template = template
    swapped = transformer.single_transformer_blocks[0].attn
    swapped.norm_q = nn.LayerNorm(16)
    refused("policy.fused is on, but single_transformer_blocks.0.attn.norm_q is a", fused=True)
    bare = Policy.load(
        load(flux2_model).pipeline,
        device="cpu",
        config=PolicyConfig(**COMMON),
        encode=lambda texts: Conditioning(torch.zeros(len(texts), 8, 48), torch.zeros(1, 1)),
    )
    with pytest.raises(ConfigError, match="embeds of 8 tokens, but 24 are expected"):
        bare.encode(["a"])
    assert bare.token_limits() == []
    folder = shutil.copytree(flux2_model, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ConfigError, match="could not be loaded as a Flux2KleinPipeline"):
        load(folder)
