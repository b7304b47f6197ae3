"""ZImagePolicy against diffusers' own pipeline: schedule, embeddings, velocity, latents, images,
guidance and its limits; and texts of different lengths beside each other."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import kernel_scale, velocities
from flowgrpo.policies.zimage.guidance import guide
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import setups

LONG = "two blue square triangle " * 9
"""With the template 45 tokens, which are filled up to 64; the other texts to 32."""
TEXTS = ["a red circle", LONG, "the"]
LENGTH = 64
SMALL = {"resolution": 16, "max_sequence_length": LENGTH, "text_cache": ""}
SIGMA = torch.tensor([1.0, 0.5, 0.1])


def load(folder, dtype="float32", **changes):
    config = PolicyConfig(**{**SMALL, **changes})
    with setups.read_once():
        return Policy.load(str(folder), device="cpu", dtype=dtype, config=config)


@pytest.fixture(scope="module")
def zimage(zimage_model):
    return load(zimage_model)


@pytest.fixture(scope="module")
def untouched(zimage_model, zimage):
    """The pipeline as diffusers loads it."""
    return type(zimage.pipeline).from_pretrained(zimage_model)


def noise(policy, rows=3):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, *policy.latent_shape, generator=generator)


def on_lists(transformer, policy, sample, sigma, text):
    """Velocity by diffusers' forward on lists, as its pipeline calls it."""
    with torch.no_grad():
        output = transformer(
            list(sample[:, :, None].to(policy.dtype)),
            (1000 - sigma * 1000) / 1000,
            [row[: int(n)] for row, n in zip(text.embeds, text.pooled.float().sum(1), strict=True)],
            return_dict=False,
        )[0]
    return -torch.stack(output)[:, :, 0]


@pytest.mark.parametrize("steps", [6, 8, 10, 28, 50])
def test_sigmas_are_what_the_pipeline_sets_up(zimage, untouched, steps, monkeypatch):
    """Of Z-Image, of Turbo, and with a shift that depends on the number of tokens."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    def stop(pipeline, i, t, values):
        pipeline._interrupt = True
        return values

    latents = torch.zeros(1, *zimage.latent_shape)
    for settings in ({"shift": 6.0}, {"shift": 3.0}, {"use_dynamic_shifting": True}):
        scheduler = FlowMatchEulerDiscreteScheduler(**settings)
        with monkeypatch.context() as patch:
            patch.setattr(zimage, "scheduler", scheduler)
            patch.setattr(untouched, "scheduler", FlowMatchEulerDiscreteScheduler(**settings))
            patch.setattr(
                type(untouched.transformer), "forward", lambda self, x, *a, **k: (x,)
            )  # fmt: skip
            found = zimage.sigmas(steps)
            untouched(
                prompt_embeds=[torch.zeros(1, 32)],
                latents=latents,
                height=16,
                width=16,
                guidance_scale=0,
                num_inference_steps=steps,
                output_type="latent",
                callback_on_step_end=stop,
            )
            own = untouched.scheduler.sigmas
        assert found.dtype == torch.float64 and found.shape == (steps + 1,)
        assert torch.equal(found.float(), own) and found[0] == 1 and found[-1] == 0
        if "shift" in settings:
            last = settings["shift"] / (steps + settings["shift"] - 1)
            assert found[-2] == pytest.approx(last, rel=1e-6)


def test_embeddings_are_the_pipelines(zimage, untouched):
    found = zimage.encode(TEXTS)
    assert found.embeds.shape == (3, LENGTH, 32) and not found.embeds.requires_grad
    # Words and the eight tokens of the template around them.
    assert found.pooled.sum(1).tolist() == [3 + 8, 36 + 8 + 1, 1 + 8]
    for row, text in enumerate(TEXTS):
        (embeds,), _ = untouched.encode_prompt([text], max_sequence_length=LENGTH)
        count = len(embeds)
        assert torch.equal(found.embeds[row, :count], embeds)
        assert not found.embeds[row, count:].any() and (found.pooled[row, :count] == 1).all()
    # One at a time, whatever stands beside it.
    assert torch.equal(zimage.encode(TEXTS[:1]).embeds, found.embeds[:1])


def test_a_text_is_cut_and_it_is_said(zimage_model):
    from flowgrpo.policies import tokens

    short = load(zimage_model, max_sequence_length=10)
    # Filled up to the next multiple of 32.
    assert short.encode(TEXTS).embeds.shape == (3, 32, 32)
    assert short.encode(TEXTS).pooled.sum(1).tolist() == [10, 10, 9]
    assert tokens.count_cut(short, [*TEXTS, "a"]) == {2: 2}
    default = load(zimage_model, max_sequence_length=0)
    assert default.encode([""]).embeds.shape == (1, 128, 32)


@pytest.mark.parametrize(("dtype", "fused"), [("float32", False), ("bfloat16", True)])
def test_rows_are_those_on_lists_whatever_stands_beside_them(zimage_model, dtype, fused):
    """Bit for bit as diffusers' forward on the lists of this batch; padding, neighbours and
    gradients change no bit."""
    policy = load(zimage_model, dtype=dtype, fused=fused)
    sample, text = noise(policy), policy.encode(TEXTS)
    with torch.no_grad():
        expected = policy.velocity(sample, SIGMA, text)
        other = policy.encode([TEXTS[0], "the", "one two three dark bright red"])
        assert torch.equal(policy.velocity(sample, SIGMA, other)[0], expected[0])
        assert not torch.equal(policy.velocity(sample, SIGMA, other)[1], expected[1])
        dirty = text.embeds.masked_fill(text.pooled[..., None] == 0, 3.0)
        dirty = Conditioning(dirty, text.pooled)
        assert torch.equal(policy.velocity(sample, SIGMA, dirty), expected)
    policy.transformer.requires_grad_(True)
    again = policy.velocity(sample, SIGMA, text)
    assert torch.equal(again, expected) and again.requires_grad
    assert expected.shape == sample.shape and expected.dtype == policy.dtype
    if not fused:
        cls, folder = type(policy.pipeline), zimage_model
        plain = cls.from_pretrained(folder).transformer
        for transformer in (plain, policy.transformer):
            assert torch.equal(on_lists(transformer, policy, sample, SIGMA, text), expected)
        for row in range(3):
            # By itself a row has other shapes of its products, and so rounding.
            alone = on_lists(plain, policy, *(x[row : row + 1] for x in (sample, SIGMA)), text.rows(
                torch.tensor([row])
            ))  # fmt: skip
            torch.testing.assert_close(alone[0], expected[row], rtol=0, atol=2e-6)


@pytest.mark.parametrize("sides", [{"height": 24, "width": 16}, {"height": 8, "width": 40}])
def test_pictures_that_are_filled_up(zimage_model, zimage, untouched, sides):
    """24 and 20 tokens, up to 32 with the learned vector, which attention sees."""
    policy = load(zimage_model, resolution=0, **sides)
    assert policy.latent_shape == (4, sides["height"] // 2, sides["width"] // 2)
    sample, text = noise(policy), policy.encode(TEXTS)
    found = policy.velocity(sample, SIGMA, text).detach()
    assert torch.equal(found, on_lists(untouched.transformer, policy, sample, SIGMA, text))
    assert policy.decode(sample).shape == (3, 3, sides["height"], sides["width"])


LIMITS = {"cfg_normalization": 1.02, "cfg_truncation": 0.3}


@pytest.mark.parametrize(
    ("scale", "limits", "fused"),
    [(1.0, {}, False), (4.0, {}, False), (4.0, LIMITS, False), (4.0, {}, True)],
    ids=["no guidance", "guidance", "limits", "fused"],
)
def test_latents_and_images_are_diffusers_own(
    zimage_model, zimage, untouched, scale, limits, fused
):
    """Our ODE sampler and the pipeline's __call__ from the same noise, with texts of three lengths;
    with its own attention and blocks too."""
    policy = zimage
    if fused or limits:
        policy = load(zimage_model, fused=fused, **limits)
    seeds = torch.tensor([5, 6, 7])
    ours = rollout.rollout(
        policy,
        policy.encode(TEXTS),
        ode_schedule(policy, 8),
        torch.arange(8)[:, None].expand(8, 3),
        groups=torch.arange(3),
        seeds=seeds,
        batch_size=3,
        uncond=policy.encode_empty(scale),
        guidance_scale=scale,
    ).latents[-1]
    assert ours.shape == (3, 4, 8, 8) and ours.std() > 0.5

    def sample(pipeline, **changes):
        return pipeline(
            prompt=list(TEXTS),
            latents=initial_noise(seeds, policy.latent_shape),
            num_inference_steps=8,
            height=16,
            width=16,
            max_sequence_length=LENGTH,
            output_type="latent",
            **{"guidance_scale": scale - 1, **limits, **changes},
        ).images

    # Guidance by the kernels is u + s (c - u), whose products round otherwise.
    atol = 2e-6 if scale != 1 and not limits else 1e-6
    # Fused blocks are not the pipeline's to call.
    for pipeline in (untouched,) if fused else (untouched, policy.pipeline):
        torch.testing.assert_close(ours, sample(pipeline), rtol=0, atol=atol)
    for name in limits:
        none = {"cfg_normalization": False, "cfg_truncation": 1.0}[name]
        assert (ours - sample(untouched, **{name: none})).abs().max() > 1e-2, name
    image = untouched.vae.decode(
        ours / untouched.vae.config.scaling_factor + untouched.vae.config.shift_factor
    ).sample.detach()
    image = untouched.image_processor.postprocess(image, output_type="pt")
    found = policy.decode(ours)
    assert found.shape == (3, 3, 16, 16) and found.float().std() > 1
    assert (found.int() - (image * 255).round().int()).abs().amax() <= 1


def test_guidance_is_limited_and_has_a_gradient(zimage_model):
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(4, 2, 3, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    u[1] = c[1]  # Nothing to limit.
    times = torch.tensor([0.2, 0.2, 0.2, 0.7])
    limits = {"times": times, "normalization": 1.5, "truncation": 0.5}
    expected = c + 3 * (c - u)
    norms = expected.flatten(1).norm(dim=1) / c.flatten(1).norm(dim=1)
    assert (norms[[0, 2]] > 1.5).all() and norms[1] == 1
    expected *= (1.5 / norms).clamp(max=1).view(-1, 1, 1, 1)
    expected[3] = c[3]
    found = guide(c, u, 4.0, **limits)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    # Against a difference of the formula in float64, along one direction.
    c32, u32 = (x.float().requires_grad_() for x in (c, u))
    weight, along = (torch.randn(c.shape, generator=generator) for _ in range(2))
    (guide(c32, u32, 4.0, **limits) * weight).sum().backward()
    step = 1e-3
    ends = [(guide(c + e * along, u, 4.0, **limits) * weight).double() for e in (step, -step)]
    difference = (ends[0] - ends[1]).sum() / (2 * step)
    assert (c32.grad * along).sum().item() == pytest.approx(difference.item(), rel=1e-3)
    assert not u32.grad[3].any() and u32.grad[0].any()
    # As the pipeline compares: a float32 time that rounding put above the limit is beyond it.
    tenth = {**limits, "times": torch.tensor([0.1] * 4), "truncation": 0.1}
    assert torch.equal(guide(c, u, 4.0, **tenth), c.float())
    # One forward of twice the rows, whose result the kernels take as it is.
    policy = load(zimage_model, **LIMITS)
    sample, text, empty = noise(policy), policy.encode(TEXTS), policy.encode([""])
    guided, rest = velocities(policy, sample, SIGMA, text, empty, 4.0)
    apart = [policy.velocity(sample, SIGMA, x) for x in (text, empty.expand(3))]
    assert rest is None and kernel_scale(rest, 4.0) == 1.0
    limits = {"times": 1 - SIGMA, "normalization": 1.02, "truncation": 0.3}
    torch.testing.assert_close(guided, guide(*apart, 4.0, **limits), rtol=0, atol=1e-5)
    assert torch.equal(guided[1:], velocities(policy, sample, SIGMA, text, empty, 9.0)[0][1:])


def test_looked_up_modulations_are_the_computed_ones(zimage_model):
    """One row of the table for all prompts, since the time alone makes it."""
    policy, sigmas = load(zimage_model), torch.tensor([1.0, 0.6, 0.2, 0.0])
    text = policy.encode(TEXTS)
    table = policy.prepare(text, sigmas)
    # Four for each of three blocks with a modulation, and the last layer's scale.
    assert table.table.shape == (3, 3, 3 * 4 * 32 + 32) and table.table.stride(1) == 0
    assert "once a rollout" in policy.describe()
    sample, steps = noise(policy), torch.tensor([0, 2, 1])
    expected = policy.velocity(sample, sigmas[steps], text)
    with torch.no_grad():
        for name, parameter in policy.transformer.named_parameters():
            if name.startswith(("t_embedder", "cap_embedder")) or "adaLN" in name:
                parameter.fill_(torch.nan)
    found = policy.velocity(sample, sigmas[steps], table.rows_at(torch.arange(3), steps))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16", "policy.fused": True},
        {
            "optim.guard": True,
            "optim.beta": 0.0,
            "policy.gradient_checkpointing": True,
            "policy.cfg_normalization": 1.0,
            "policy.cfg_truncation": 0.3,
        },
        {"optim.steps_per_forward": 2, "optim.split_forward": True},
    ],
    ids=["bfloat16, fused", "guard, recomputed, limits", "split forward"],
)
def test_ratios_are_exactly_one(zimage_model, tmp_path, changes):
    common = {
        "policy.lora_targets": None,
        "policy.text_cache": "",
        "policy.resolution": 16,
        "policy.max_sequence_length": LENGTH,
        "sample.group_size": 3,
        "sample.steps": 4,
        "sample.guidance_scale": 4.0,
        "optim.beta": 0.04,
    }
    config = setups.config(zimage_model, tmp_path, **{**common, **changes})
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and measured["grad_norm"][0] > 0


@pytest.mark.slow
def test_all_weights_are_trained(zimage_model, tmp_path):
    """Without adapters, fused: gradients are those of diffusers' blocks."""
    changes = {
        "policy.adapter": "full",
        "policy.dtype": "auto",
        "policy.text_cache": "",
        "policy.resolution": 24,
        "policy.max_sequence_length": LENGTH,
    }
    found = []
    for fused in (False, True):
        config = setups.config(zimage_model, tmp_path, **changes, **{"policy.fused": fused})
        policy = setups.parts(config).policy
        sample, text = noise(policy), policy.encode(TEXTS)
        (policy.velocity(sample, SIGMA, text) * noise(policy).flip(0)).sum().backward()
        named = policy.transformer.named_parameters()
        found.append({name: parameter.grad for name, parameter in named})
    plain, fused = found
    assert all(gradient is not None and gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        scale = max(gradient.abs().max(), 1e-2)
        torch.testing.assert_close(fused[name], gradient, rtol=0, atol=2e-5 * scale)


def test_turbo_is_known_by_its_name_and_takes_no_guidance(zimage_model, tmp_path, zimage):
    assert not zimage.distilled and zimage.encode_empty(1.0) is None
    assert torch.equal(zimage.encode_empty(5.0).embeds, zimage.encode([""]).embeds)
    for place in ("Z-Image-Turbo", "models--Tongyi-MAI--Z-Image-Turbo/snapshots/0"):
        folder = tmp_path / place
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.symlink_to(zimage_model)
        turbo = load(folder)
        assert turbo.distilled and turbo.encode_empty(1.0) is None
        with pytest.raises(ConfigError, match=r"scale is 4, but .* is distilled .*; set it to 1"):
            turbo.encode_empty(4.0)
    for place in ("Z-Image-De-Turbo", "my-z-image-turbo-2"):
        (tmp_path / place).symlink_to(zimage_model)
        assert not load(tmp_path / place).distilled


def test_pipelines_that_are_refused(zimage_model, qwen_model, tmp_path):
    policy = load(zimage_model)
    pipeline, own = policy.pipeline, policy.pipeline.components
    transformer, vae, tokenizer = pipeline.transformer, pipeline.vae, pipeline.tokenizer

    def refused(message, **changes):
        config = PolicyConfig(**{"resolution": 16, "max_sequence_length": 32} | changes)
        with pytest.raises(ConfigError, match=message) as caught:
            Policy.load(pipeline, device="cpu", config=config)
        assert len(re.findall(r"[.;] [A-Z]", str(caught.value))) == 0

    refused("policy.resolution is 18, but .* sides are multiples of 4; choose one", resolution=18)
    refused("positions for at most 256 pixels on a side; choose a smaller", resolution=260)
    refused("positions for 192 tokens of a text at most; lower it", max_sequence_length=193)
    refused("policy.attention native_flash cannot compute", attention="native_flash")
    for name in ("text_encoder", "tokenizer", "vae"):
        setattr(pipeline, name, None)
        refused(f"lacks {name}, but all of a ZImagePipeline's parts are expected; restore them")
        setattr(pipeline, name, own[name])
    for config, changes, message in (
        (transformer, {"siglip_feat_dim": 8}, "a picture of noise, time and text alone is expec"),
        (transformer, {"all_patch_size": [4]}, "patches of 4 pixels and 1 frames, but 2 pixels"),
        (transformer, {"in_channels": 16}, "with latent_channels 4, but .* is made for 16; put"),
        (transformer, {"cap_feat_dim": 64}, "with hidden_size 32, but .* is made for 64; put back"),
        (vae, {"scaling_factor": None}, "with scaling_factor None, but a number is expected"),
    ):
        before = {name: config.config[name] for name in changes}
        config.register_to_config(**changes)
        refused(message)
        config.register_to_config(**before)
    words, pipeline.text_encoder.config.vocab_size = pipeline.text_encoder.config.vocab_size, 8
    refused("tokens, but its text_encoder knows 8; put back the one that the model was")
    pipeline.text_encoder.config.vocab_size = words
    template, tokenizer.chat_template = tokenizer.chat_template, None
    refused("has no chat template, but one is expected, in which each prompt stands; put back")
    tokenizer.chat_template = template
    bare = Policy.load(
        pipeline,
        device="cpu",
        config=PolicyConfig(**SMALL),
        encode=lambda texts: Conditioning(torch.zeros(len(texts), 32, 32), torch.ones(1, 32)),
    )
    with pytest.raises(ConfigError, match=r"embeds \[32, 32\] and pooled \[32\] .* but \[64, 32\]"):
        bare.encode(["a"])
    with pytest.raises(ConfigError, match=r"cfg_truncation is 0\.5, but the guidance of a Qwe.* 1"):
        load(qwen_model, cfg_truncation=0.5)
    folder = shutil.copytree(zimage_model, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ConfigError, match="could not be loaded as a ZImagePipeline"):
        load(folder)


def test_a_tokenizer_that_pads_on_the_left(zimage_model, zimage):
    """Vectors of a text are those where attention is, wherever its padding stands."""
    policy = load(zimage_model)
    policy.pipeline.tokenizer.padding_side = "left"
    found, expected = policy.encode(TEXTS), zimage.encode(TEXTS)
    assert torch.equal(found.pooled, expected.pooled)
    torch.testing.assert_close(found.embeds, expected.embeds, rtol=0, atol=1e-5)
