"""Images that are not square: policy.height and policy.width, from the latents to the pictures."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image

from flowgrpo import plan, train
from flowgrpo.cli import main
from flowgrpo.config import ConfigError, PolicyConfig, from_json, replace, to_json
from flowgrpo.evaluation import pictures
from flowgrpo.policies import Policy
from flowgrpo.recipes import recipe
from flowgrpo.runs import banner, model_card
from flowgrpo.sampling import rollout
from flowgrpo_kernels import initial_noise
from support import setups

TEXTS = ["a red circle", "two square"]
SIZES = [(16, 8), (8, 16), (12, 16)]
"""(height, width); the first two have as many tokens."""


def load(folder, **fields) -> Policy:
    config = PolicyConfig(max_sequence_length=4, text_cache="", **fields)
    return Policy.load(str(folder), device="cpu", dtype="float32", config=config)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_images_are_diffusers_own(request, kind, size):
    """The same latents as the pipeline's own call, and so its sigmas and positions too."""
    height, width = size
    policy = load(request.getfixturevalue(kind), height=height, width=width)
    assert (policy.height, policy.width, policy.resolution) == (*size, max(size))
    text, seeds = policy.encode(TEXTS), torch.tensor([5, 6])
    groups = torch.arange(2)
    ours = rollout.sample_images(policy, text, groups=groups, seeds=seeds, batch_size=2, steps=6)
    assert ours.shape == (2, 3, height, width)
    options = {"guidance_scale": 1.0} if kind == "latent_model" else {"guidance_scale": 3.5}
    theirs = policy.pipeline(
        prompt_embeds=text.embeds,
        pooled_prompt_embeds=text.pooled,
        latents=initial_noise(seeds, policy.latent_shape),
        num_inference_steps=6,
        height=height,
        width=width,
        output_type="np",
        **options,
    ).images
    theirs = torch.from_numpy(theirs * 255).round().permute(0, 3, 1, 2).int()
    assert ours.float().std() > 1 and (ours.int() - theirs).abs().amax() <= 1


@pytest.mark.slow
def test_a_side_that_is_not_set_is_the_resolution(latent_model):
    assert load(latent_model, height=8, resolution=12).latent_shape == (4, 4, 6)
    assert load(latent_model, width=8).latent_shape == (4, 8, 4)
    both = [load(latent_model, **f) for f in ({"resolution": 12}, {"height": 12, "width": 12})]
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocities = [p.velocity(x, torch.tensor([0.9, 0.2]), p.encode(TEXTS)) for p in both]
    assert torch.equal(*velocities) and torch.equal(both[0].sigmas(7), both[1].sigmas(7))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"height": 10}, r"policy\.height is 10, but .* multiples of 4; choose one, for example 8"),
        ({"width": 20}, r"policy\.width is 20, but .* positions for at most 16 pixels"),
        ({"height": 8, "resolution": 10}, r"policy\.resolution is 10, but .* multiples of 4"),
    ],
)
def test_what_does_not_fit_is_refused(latent_model, fields, message):
    with pytest.raises(ConfigError, match=message):
        load(latent_model, **fields)
    with pytest.raises(ConfigError, match=r"policy\.height is -8, but it must be at least 0"):
        PolicyConfig(height=-8)


def test_nano_has_positions_for_other_sizes_too():
    assert load("nano", height=32).width == load("nano").width
    policy = load("nano", height=32)
    assert policy.decode(torch.zeros(1, *policy.latent_shape)).shape[2:] == (32, policy.width)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_a_run_and_its_pictures(request, kind, tmp_path, capsys):
    """The first ratios are 1; pictures and the card have the size; evaluate can change it."""
    folder = request.getfixturevalue(kind)
    changes = {"policy.height": 8, "policy.width": 16, "policy.max_sequence_length": 4}
    changes |= {"policy.text_cache": "", "policy.lora_targets": None, "run.steps": 1}
    changes |= {"run.eval_prompts": 1, "sample.eval_steps": 2, "optim.ema_decay": 0.0}
    changes |= {"sample.group_size": 3, "sample.steps": 4}
    config = setups.config(folder, tmp_path, **changes)
    assert from_json(to_json(config)) == config
    assert train.run(config)["max_ratio_error"] == 0.0
    run = tmp_path / "run"
    assert "height=8, width=16" in (run / "adapter" / "README.md").read_text()
    assert Image.open(run / "samples" / "before-after.png").size[0] > 100
    line = ["evaluate", str(run), "--samples", "1", "--device", "cpu", "--steps", "2"]
    shapes = []
    real = pictures.evaluation_grid

    def grid(evaluations, evaluation_set):
        shapes.extend(e.shown.shape[2:] for e in evaluations.values())
        return real(evaluations, evaluation_set)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "evaluation_grid", grid)
        for words in ([], ["--resolution", "12"], ["--resolution", "12", "--height", "16"]):
            assert main.main([*line, *words, "--out", str(tmp_path / "e")]) == 0
    assert shapes[::2] == shapes[1::2] == [(8, 16), (12, 12), (16, 12)]
    assert json.loads((run / "config.json").read_text())["policy"]["width"] == 16


def test_sample_has_the_options(latent_model, tmp_path, monkeypatch):
    seen = []
    real = pictures.grid
    monkeypatch.setattr(
        pictures,
        "grid",
        lambda rows, *a, **k: (seen.append(rows["base"].shape), real(rows, *a, **k))[1],
    )
    line = ["sample", "a red circle", "--model", str(latent_model), "--count", "1", "--steps", "2"]
    line += ["--height", "8", "--width", "12", "--device", "cpu"]
    assert main.main([*line, "--out", str(tmp_path / "x.png")]) == 0
    assert seen == [(1, 3, 8, 12)]


def test_the_banner_says_both(latent_model):
    assert banner._size(load(latent_model, height=8)) == "16 pixels wide and 8 high"
    assert banner._size(load(latent_model, resolution=8)) == "8 pixels a side"


def test_the_card_asks_for_both(latent_model):
    config = replace(recipe("nano"), **{"policy.model": str(latent_model), "policy.height": 8})
    transformer = load(latent_model).transformer
    lines = model_card.load_lines(config, transformer)
    assert "height=8" in lines and "width=" not in lines
    lines = model_card.load_lines(replace(config, **{"policy.resolution": 16}), transformer)
    assert "height=8, width=16" in lines


@pytest.mark.parametrize("name", ["sd35m_geneval_1gpu", "flux_pickscore_1gpu"])
def test_memory_follows_the_pixels(name):
    """As many tokens in 512 x 512 as in 256 x 1024; twice the latents in 512 x 1024."""
    config = replace(recipe(name, memory=80.0), **{"policy.resolution": 512})
    arch = plan.sizes_of(config.policy.model)

    def memory(**sides):
        sides = {f"policy.{side}": pixels for side, pixels in sides.items()}
        return plan.expected_memory(replace(config, **sides), arch)

    square = memory()
    assert square == memory(height=512) == memory(height=256, width=1024)
    assert square == memory(height=1024, width=256, resolution=64)
    double = memory(width=1024)
    assert double["trajectory"] == 2 * square["trajectory"]
    assert square["update"] < double["update"] < 2 * square["update"]
