"""QwenImagePolicy against diffusers' own pipeline: schedule, embeddings, velocity, latents, images;
and texts of different lengths beside each other."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import kernel_scale, velocities
from flowgrpo.policies.qwen.guidance import guide
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import pipelines, setups

TEXTS = ["a red circle", "two blue square triangle", "the"]
LENGTH = 12
SMALL = PolicyConfig(resolution=16, max_sequence_length=LENGTH, text_cache="")


def load(folder, dtype="float32", **changes):
    config = {"resolution": 16, "max_sequence_length": LENGTH, "text_cache": "", **changes}
    return Policy.load(str(folder), device="cpu", dtype=dtype, config=PolicyConfig(**config))


@pytest.fixture(scope="module")
def qwen(qwen_model):
    return load(qwen_model)


def call(policy, latents, **arguments):
    """The pipeline's own sampling from packed `latents` of TEXTS."""
    return policy.pipeline(
        prompt=TEXTS,
        latents=latents,
        height=policy.height,
        width=policy.width,
        max_sequence_length=LENGTH,
        output_type="latent",
        **arguments,
    ).images


@pytest.fixture(scope="module")
def sizes(qwen_model):
    """Policies of 16, 1024 and 4096 tokens; the latter two are Qwen-Image's at 512 and 1024 pixels;
    and one of 1536, 768 x 512 pixels there."""
    pipeline = load(qwen_model).pipeline
    sides = ({"resolution": r} for r in (16, 128, 256))
    return [
        Policy.load(pipeline, device="cpu", config=PolicyConfig(max_sequence_length=LENGTH, **s))
        for s in (*sides, {"height": 192, "width": 128})
    ]


@pytest.mark.parametrize("steps", [6, 10, 28, 50])
def test_sigmas_are_what_the_pipeline_sets_up(sizes, steps, monkeypatch):
    def stop(pipeline, i, t, values):
        pipeline._interrupt = True
        return values

    rows = []
    for policy in sizes:
        found, noise = policy.sigmas(steps), torch.zeros(3, *policy.latent_shape)
        with monkeypatch.context() as patch:
            patch.setattr(type(policy.transformer), "forward", lambda self, x=noise, **k: (x,))
            call(policy, noise, num_inference_steps=steps, callback_on_step_end=stop)
        own = policy.pipeline.scheduler
        assert found.dtype == torch.float64 and found.shape == (steps + 1,)
        assert torch.equal(found.float(), own.sigmas) and found[-1] == 0
        # The terminal shift stretches them to end at 0.02.
        assert found[0] == 1 and found[-2] == pytest.approx(0.02, rel=1e-5)
        rows.append(found)
    # The shift depends on the number of tokens: more stay noisy for longer.
    assert (rows[2] >= rows[1]).all() and (rows[1] >= rows[0]).all()
    assert not torch.equal(rows[2], rows[1]) and sizes[3].latent_shape == (1536, 16)


def test_embeddings_are_the_pipelines_without_the_templates_head(qwen):
    tokens = qwen.pipeline.tokenizer(pipelines.QWEN_TEMPLATE.partition("{}")[0]).input_ids
    assert len(tokens) == qwen.pipeline.prompt_template_encode_start_idx == 34
    assert qwen.pipeline.prompt_template_encode == pipelines.QWEN_TEMPLATE
    found = qwen.encode(TEXTS)
    assert found.embeds.shape == (3, LENGTH, 32) and not found.embeds.requires_grad
    # Words and the five tokens that close the template.
    assert found.pooled.sum(1).tolist() == [3 + 5, 4 + 5, 1 + 5]
    for row, text in enumerate(TEXTS):
        embeds, mask = qwen.pipeline.encode_prompt(text, max_sequence_length=LENGTH)
        count = embeds.shape[1]
        assert mask is None and torch.equal(found.embeds[row, :count], embeds[0])
        assert not found.embeds[row, count:].any() and (found.pooled[row, :count] == 1).all()
    # One at a time, whatever stands beside it; the same to a shorter or longer one's end.
    assert torch.equal(qwen.encode(TEXTS[:1]).embeds, found.embeds[:1])


def test_a_text_is_cut_and_it_is_said(qwen_model, caplog):
    from flowgrpo.policies import tokens

    short, long = load(qwen_model, max_sequence_length=4), load(qwen_model)
    found = short.encode(TEXTS)
    assert found.embeds.shape == (3, 4, 32) and found.pooled.all()
    assert torch.equal(found.embeds, long.encode(TEXTS).embeds[:, :4])
    assert tokens.count_cut(short, [*TEXTS, "a a a a a"]) == {4: 1}
    default = load(qwen_model, max_sequence_length=0)
    assert default.encode([""]).embeds.shape == (1, 128, 32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_latents_and_images_are_diffusers_own(qwen_model, qwen, scale, fused):
    """Our ODE sampler and the pipeline's __call__ from the same noise, with texts of three lengths,
    which the pipeline pads to the longest; with its own attention and blocks too."""
    policy = load(qwen_model, fused=True) if fused else qwen
    seeds = torch.tensor([5, 6, 7])
    ours = rollout.rollout(
        policy,
        policy.encode(TEXTS),
        ode_schedule(policy, 8),
        torch.arange(8)[:, None].expand(8, 3),
        groups=torch.arange(3),
        seeds=seeds,
        batch_size=3,
        uncond=policy.encode([""]) if scale != 1 else None,
        guidance_scale=scale,
    ).latents[-1]
    assert ours.shape == (3, 16, 16) and ours.std() > 0.5
    noise = initial_noise(seeds, policy.latent_shape)
    guided = {"true_cfg_scale": scale}
    if scale != 1:
        guided["negative_prompt"] = [""] * 3
    untouched = type(policy.pipeline).from_pretrained(qwen_model)
    # Fused blocks are not the pipeline's to call.
    for pipeline in (untouched,) if fused else (untouched, policy.pipeline):
        theirs = pipeline(
            prompt=TEXTS,
            latents=noise,
            num_inference_steps=8,
            height=16,
            width=16,
            max_sequence_length=LENGTH,
            output_type="latent",
            **guided,
        ).images
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 if fused else 1e-6)
    image = untouched(
        prompt=TEXTS[0],
        latents=noise[:1],
        num_inference_steps=8,
        height=16,
        width=16,
        true_cfg_scale=scale,
        negative_prompt=guided.get("negative_prompt", [None])[0],
        output_type="np",
    ).images
    image = torch.from_numpy((image * 255).round()).permute(0, 3, 1, 2).int()
    found = policy.decode(ours)
    assert found.shape == (3, 3, 16, 16) and found.is_contiguous() and found.float().std() > 1
    assert (found[:1].int() - image).abs().amax() <= 1


def test_the_vae_is_undone(qwen):
    """Latents of pictures are those that the pipeline would decode: mean and deviation taken off,
    packed."""
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    found = qwen.encode_images(images)
    vae = qwen.pipeline.vae
    frames = vae.encode(images[:, :, None].float() / 127.5 - 1).latent_dist.mode().detach()
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (
        vae.config.latents_mean, vae.config.latents_std
    ))  # fmt: skip
    unpacked = qwen.pipeline._unpack_latents(found, 16, 16, 2)
    torch.testing.assert_close(unpacked, (frames - mean) / std, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("dtype", "fused"), [("float32", False), ("bfloat16", True)])
def test_rows_do_not_depend_on_their_neighbours_padding_or_gradients(qwen_model, dtype, fused):
    policy = load(qwen_model, dtype=dtype, fused=fused)
    sample = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma, text = torch.tensor([1.0, 0.5, 0.1]), policy.encode(TEXTS)
    with torch.no_grad():
        expected = policy.velocity(sample, sigma, text)
        other = policy.encode([TEXTS[0], "the", "one two three dark bright red"])
        assert torch.equal(policy.velocity(sample, sigma, other)[0], expected[0])
        assert not torch.equal(policy.velocity(sample, sigma, other)[1], expected[1])
        dirty = text.embeds.masked_fill(text.pooled[..., None] == 0, 3.0)
        dirty = Conditioning(dirty, text.pooled)
        assert torch.equal(policy.velocity(sample, sigma, dirty), expected)
    policy.transformer.requires_grad_(True)
    again = policy.velocity(sample, sigma, text)
    assert torch.equal(again, expected) and again.requires_grad
    assert expected.shape == sample.shape and expected.dtype == policy.dtype


def test_length_does_not_move_a_velocity(qwen_model, qwen):
    longer = load(qwen_model, max_sequence_length=40)
    sample = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([1.0, 0.5, 0.1])
    found, expected = (p.velocity(sample, sigma, p.encode(TEXTS)) for p in (longer, qwen))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_looked_up_modulations_are_the_computed_ones(qwen_model):
    """One row of the table for all prompts, since the time alone makes it."""
    policy, sigmas = load(qwen_model), torch.tensor([1.0, 0.6, 0.2, 0.0])
    text = policy.encode(TEXTS)
    table = policy.prepare(text, sigmas)
    assert table.table.shape == (3, 3, 2 * 12 * 32 + 2 * 32) and table.table.stride(1) == 0
    assert "once a rollout" in policy.describe()
    sample = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    steps = torch.tensor([0, 2, 1])
    expected = policy.velocity(sample, sigmas[steps], text)
    with torch.no_grad():
        for name in ("time_text_embed", "txt_norm", "txt_in"):
            for parameter in getattr(policy.transformer, name).parameters():
                parameter.fill_(torch.nan)
    found = policy.velocity(sample, sigmas[steps], table.rows_at(torch.arange(3), steps))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_guidance_keeps_the_conditionals_norm_and_has_a_gradient(qwen):
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    combined = u + 4 * (c - u)
    expected = combined * c.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True)
    found = guide(c, u, 4.0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.norm(dim=-1), c.float().norm(dim=-1))
    # Against a difference of the formula in float64, along one direction.
    c32, u32 = c.float().requires_grad_(), u.float().requires_grad_()
    guide(c32, u32, 4.0).square().sum(-1).prod().backward()
    assert u32.grad.abs().max() < 1e-3 * c32.grad.abs().max(), "the norm is the conditional's"
    # One forward of twice the rows, whose result the kernels take as it is.
    sample = torch.randn(3, 16, 16, generator=generator)
    sigma, text, empty = torch.full([3], 0.5), qwen.encode(TEXTS), qwen.encode([""])
    guided, rest = velocities(qwen, sample, sigma, text, empty, 4.0)
    apart = [qwen.velocity(sample, sigma, x) for x in (text, empty.expand(3))]
    assert rest is None and kernel_scale(rest, 4.0) == 1.0
    torch.testing.assert_close(guided, guide(*apart, 4.0), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"guidance_scale=4\.0 needs uncond"):
        velocities(qwen, sample, sigma, text, None, 4.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16", "policy.fused": True},
        {"optim.guard": True, "optim.beta": 0.0, "policy.gradient_checkpointing": True},
        {"optim.steps_per_forward": 2, "optim.split_forward": True},
    ],
    ids=["bfloat16, fused", "guard, recomputed", "split forward"],
)
def test_ratios_are_exactly_one(qwen_model, tmp_path, changes):
    common = {
        "policy.lora_targets": None,
        "policy.resolution": 16,
        "policy.max_sequence_length": LENGTH,
        "policy.text_cache": "",
        "sample.group_size": 3,
        "sample.steps": 4,
        "sample.guidance_scale": 4.0,
        "optim.beta": 0.04,
    }
    config = setups.config(qwen_model, tmp_path, **{**common, **changes})
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and measured["grad_norm"][0] > 0


def test_pipelines_that_are_refused(qwen_model, tmp_path):
    policy = load(qwen_model)
    pipeline, own = policy.pipeline, policy.pipeline.components
    transformer, vae = pipeline.transformer, pipeline.vae

    def refused(message, **changes):
        with pytest.raises(ConfigError, match=message) as caught:
            Policy.load(pipeline, device="cpu", config=PolicyConfig(**{"resolution": 16} | changes))
        assert len(re.findall(r"[.;] [A-Z]", str(caught.value))) == 0

    refused("policy.resolution is 18, but .* sides are multiples of 4; choose one", resolution=18)
    refused("policy.attention native_flash cannot compute", attention="native_flash")
    for name in ("text_encoder", "tokenizer", "vae"):
        setattr(pipeline, name, None)
        refused(f"lacks {name}, but all of a QwenImagePipeline's parts are expected; restore them")
        setattr(pipeline, name, own[name])
    for flag in ("guidance_embeds", "zero_cond_t"):
        transformer.register_to_config(**{flag: True})
        refused(f"has {flag}, but one that makes a picture of noise, time and text alone is exp")
        transformer.register_to_config(**{flag: False})
    for values, message in (
        ({"z_dim": 8}, "with z_dim 8, but its transformer is made for 4; put back"),
        ({"latents_std": [1.0, 0.0, 1.0, 1.0]}, "but 4 finite numbers above 0 are expected"),
        ({"latents_mean": [0.0]}, r"with latents_mean \[0.0\], but 4 finite numbers are"),
        ({"temperal_downsample": [False, True]}, "enlarges latents 4 times, but .* made for 2"),
    ):
        before = {name: vae.config[name] for name in values}
        vae.register_to_config(**values)
        refused(message)
        vae.register_to_config(**before)
    transformer.register_to_config(joint_attention_dim=64)
    refused("with hidden_size 32, but its transformer is made for 64; put back the one")
    transformer.register_to_config(joint_attention_dim=32)
    bare = Policy.load(
        pipeline,
        device="cpu",
        config=SMALL,
        encode=lambda texts: Conditioning(torch.zeros(len(texts), 8, 32), torch.ones(1, 8)),
    )
    with pytest.raises(ConfigError, match=r"embeds of 8 tokens and pooled \[8\] .* but 12 tokens"):
        bare.encode(["a"])
    folder = shutil.copytree(qwen_model, tmp_path / "model")
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(ConfigError, match="could not be loaded as a QwenImagePipeline"):
        load(folder)
