"""Tiny pipelines of each family: train, resume, evaluate, sample, and back to diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from rich.console import Console

from flowgrpo import train
from flowgrpo.cli import targets
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions, SampleOptions
from flowgrpo.cli.sample import sample_pictures
from flowgrpo.config import Config, replace
from flowgrpo.evaluation import evaluate
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.load import load_policy
from flowgrpo.runs import directory
from flowgrpo.runs.export import load_trained
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import setups

# One of images, by two frames of each video, and one of videos.
VIDEO_REWARDS = {
    "reward.weights": {"support.setups:bright": 1.0, "motion_smoothness": 0.5},
    "reward.frames": 2,
}
# FLUX is told its guidance value instead of a second forward.
FAMILIES = {
    "sd3": ("latent_model", {"sample.guidance_scale": 3.0}),
    "flux": ("flux_model", {"policy.embedded_guidance": 2.5}),
    "flux2": ("flux2_model", {"policy.max_sequence_length": 20, "sample.guidance_scale": 4.0}),
    "qwen": ("qwen_model", {"sample.guidance_scale": 4.0}),
    "wan": (
        "wan_model",
        {"policy.frames": 5, "policy.width": 32, "sample.guidance_scale": 5.0, **VIDEO_REWARDS},
    ),
    "zimage": ("zimage_model", {"sample.guidance_scale": 4.0, "policy.cfg_normalization": 1.0}),
}
COMMON = {
    "policy.lora_targets": None,
    "policy.resolution": 16,
    "policy.max_sequence_length": 8,
    "sample.group_size": 3,
    "sample.steps": 4,
    "sample.eval_steps": 3,
    "optim.lr": 1e-2,
    "optim.ema_every": 1,
    "optim.beta": 0.04,
    "run.steps": 2,
    "run.eval_every": 0,
    "run.checkpoint_every": 1,
    "run.eval_prompts": 2,
    "run.eval_samples": 2,
}
LAYERS = {
    "sd3": 2 * 8 - 1,
    "flux": 8 + 4 + 3,
    "flux2": 8 + 4 + 2,
    "qwen": 2 * 12,
    "wan": 2 * 8,
    "zimage": 4 * 7,
}
"""Linear layers with a matrix: the last SD3 block has no to_add_out; FLUX: one double, one single
block; FLUX.2: one double block and two single ones, without their output layers."""


POOLED = ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Trained:
    """A finished run of two iterations."""

    family: str
    model: Path
    config: Config
    summary: dict
    folder: Path


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, tmp_path_factory) -> Trained:
    model, changes = FAMILIES[request.param]
    model, folder = request.getfixturevalue(model), tmp_path_factory.mktemp(request.param)
    config = setups.config(model, folder, **{**COMMON, **changes})
    return Trained(request.param, model, config, train.run(config), folder / "run")


def metrics(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k != "seconds"} for x in lines if x["kind"] == kind]


def latents(policy, config: Config, steps: int = 4) -> torch.Tensor:
    """Our deterministic sampler, from the noise of three seeds."""
    scale = config.sample.guidance_scale
    return rollout.rollout(
        policy,
        policy.encode(setups.TEXTS[:3]),
        ode_schedule(policy, steps),
        torch.arange(steps)[:, None].expand(steps, 3),
        groups=torch.arange(3),
        seeds=torch.tensor([3, 4, 5]),
        batch_size=3,
        uncond=policy.encode([""]) if scale != 1 else None,
        guidance_scale=scale,
    ).latents[-1]


def test_two_iterations_with_ratio_one(trained):
    lines = metrics(trained.folder, "train")
    assert len(lines) == 2 and trained.summary["max_ratio_error"] == 0.0
    assert all(line["kl"] > 0 and min(line["grad_norm"]) > 0 for line in lines)
    assert lines[0]["reward"] != lines[1]["reward"]
    files = {path.name for path in (trained.folder / "samples").iterdir()}
    pictures = {"before-after.png", "step-000000.png", "step-000002.png"}
    if trained.family == "wan":
        # Two prompts, each with its first video.
        pictures |= {f"step-00000{step}-{n}.webp" for step in (0, 2) for n in (1, 2)}
        scores = lines[0]["rewards"]
        assert lines[0]["reward"] == pytest.approx(
            scores["support.setups:bright"] + 0.5 * scores["motion_smoothness"]
        )
    assert files == pictures


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained, tmp_path):
    config = replace(trained.config, **{"run.out": str(tmp_path / "run"), "run.steps": 1})
    train.run(config)
    # The text cache and the encoders' place may change, as they change no number.
    changes = {"run.steps": 2, "policy.text_cache": "", "policy.offload_text_encoders": True}
    train.run(replace(directory.resume_config(tmp_path / "run"), **changes))
    for kind in ("train", "eval"):
        assert metrics(tmp_path / "run", kind) == metrics(trained.folder, kind)


@pytest.mark.slow
def test_evaluate_and_sample(trained, tmp_path):
    quiet = Console(quiet=True)
    found = evaluate_run(
        EvaluateOptions(str(trained.folder), out=str(tmp_path / "out"), device="cpu"), quiet
    )
    # The final evaluation of the run, by another process's path: the same figures.
    accuracy = found["reports"]["iteration 2"]["accuracy"]
    assert accuracy == trained.summary["after"]["accuracy"]
    assert found["reports"]["base"]["accuracy"] != accuracy
    videos = sorted(path.name for path in (tmp_path / "out").glob("*.webp"))
    rows = [f"{label}-{number}.webp" for label in ("base", "iteration-2") for number in (1, 2)]
    assert videos == (rows if trained.family == "wan" else [])
    options = SampleOptions(
        ("a red circle",), run=str(trained.folder), out=str(tmp_path / "a.png"), steps=2, count=2
    )
    assert sample_pictures(options, quiet).stat().st_size > 0
    videos = sorted(path.name for path in tmp_path.glob("*.webp"))
    rows = [f"a-{label}-{number}.webp" for label in ("base", "trained") for number in (1, 2)]
    assert videos == (rows if trained.family == "wan" else [])


def own(trained: Trained):
    """Our policy with the averaged weights of the last checkpoint."""
    policy = targets.load_base(trained.config)
    add_adapter(policy.transformer, trained.config.policy)
    load_trained(
        policy.transformer, trained.config.optim, trained.folder / "checkpoints" / "step-000002"
    )
    return policy


def embedded(family: str, text, uncond, scale: float) -> dict:
    """Arguments of a family's pipeline for these embeddings and guidance."""
    if family == "zimage":
        names = {"prompt_embeds": text, "negative_prompt_embeds": uncond}
        lists = {
            name: [e[: int(n)] for e, n in zip(x.embeds, x.pooled.sum(1), strict=True)]
            for name, x in names.items()
        }
        return {**lists, "guidance_scale": scale - 1, "cfg_normalization": 1.0}
    # Qwen-Image's second tensor is a mask, FLUX.2 and Wan have none.
    pooled, negative, guidance = {
        "sd3": (*POOLED, {"guidance_scale": scale}),
        "flux": (*POOLED, {"guidance_scale": 2.5, "true_cfg_scale": scale}),
        "flux2": (None, None, {"guidance_scale": scale}),
        "wan": (None, None, {"guidance_scale": scale, "num_frames": 5}),
        "qwen": ("prompt_embeds_mask", "negative_prompt_embeds_mask", {"true_cfg_scale": scale}),
    }[family]
    second = {pooled: text.pooled, negative: uncond.pooled}
    return {
        "prompt_embeds": text.embeds,
        "negative_prompt_embeds": uncond.embeds,
        **{name: tensor for name, tensor in second.items() if name},
        **guidance,
    }


@pytest.mark.slow
def test_adapter_and_latents_are_the_pipelines(trained):
    """The saved adapter in diffusers' own pipeline, from disk: its latents are ours, with and
    without classifier-free guidance."""
    policy = own(trained)
    pipe = type(policy.pipeline).from_pretrained(trained.model)
    text, uncond = policy.encode(setups.TEXTS[:3]), policy.encode([""])
    noise = initial_noise(torch.tensor([3, 4, 5]), policy.latent_shape)
    if trained.family == "flux2":
        noise = noise.transpose(1, 2).unflatten(2, (4, 4))
    if trained.family == "wan":
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)

    def theirs(scale: float) -> torch.Tensor:
        return pipe(
            **embedded(trained.family, text, uncond.expand(3), scale),
            latents=noise,
            num_inference_steps=4,
            height=policy.height,
            width=policy.width,
            output_type="latent",
        )[0]

    base = {scale: theirs(scale) for scale in (1.0, 3.0)}
    pipe.load_lora_weights(trained.folder / "adapter")
    for scale, before in base.items():
        ours = latents(policy, replace(trained.config, **{"sample.guidance_scale": scale}))
        if trained.family == "flux2":
            # Which the pipeline returns as its VAE takes them.
            ours = policy.unpack(ours)
        # float32 in two orders: PEFT adds x A^T B^T to x W^T, policies/lora.py has one product.
        torch.testing.assert_close(ours, theirs(scale), rtol=0, atol=5e-6)
        assert (ours - before).abs().max() > 1e-3, "the adapter matters"
    lora = pipe.transformer.peft_config["default_0"]
    assert (lora.r, lora.lora_alpha) == (4, 8)
    adapted = {k for k in pipe.transformer.state_dict() if "lora_A" in k}
    assert len(adapted) == LAYERS[trained.family]


def test_model_card(trained):
    """Valid front matter, the run's numbers, and lines that load the adapter as they stand."""
    card = ModelCard.load(trained.folder / "adapter" / "README.md")
    data = card.data.to_dict()
    video = trained.family == "wan"
    task = "text-to-video" if video else "text-to-image"
    assert data["library_name"] == "diffusers" and data["pipeline_tag"] == task
    assert {"lora", "flow-grpo"} <= set(data["tags"]) and "base_model" not in data
    assert "2 prompts x 3 images = 6 images" in card.text and "support.setups:bright" in card.text
    before, after = (
        trained.summary[k]["scores"]["support.setups:bright"] for k in ("before", "after")
    )
    assert f"| support.setups:bright | {before:.4g} | {after:.4g} |" in card.text
    code = card.text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line]) == (8 if video else 5)
    code = code.replace('.to("cuda")', "").replace("bfloat16", "float32")
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(trained.folder / "adapter")), names)
    if video:
        assert names["video"].shape == (5, 16, 32, 3)
        assert type(names["pipe"].scheduler) is FlowMatchEulerDiscreteScheduler
    else:
        assert names["image"].size == (16, 16)
    assert names["pipe"].transformer.peft_config["default_0"].r == 4
    saved = trained.folder / "checkpoints" / "step-000002" / "README.md"
    assert "for 2 iterations" in saved.read_text() and "Before and after" not in saved.read_text()


@pytest.mark.parametrize("trained", ["sd3"], indirect=True)
def test_base_model_of_the_card_is_a_hub_repository(trained, tmp_path):
    from flowgrpo.runs import model_card

    config = replace(trained.config, **{"policy.model": "acme/model"})
    model_card.write(tmp_path, config, own(trained).transformer, 7)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "acme/model"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16"},
        {"sample.guidance_scale": 3.0, "optim.guard": True, "optim.beta": 0.0},
        {"sample.transition": "cps", "sample.window_size": 0, "sample.batch_size": 1},
    ],
    ids=["bfloat16", "guidance and guard", "cps, all steps, batch 1"],
)
def test_flux_ratios_are_exactly_one(flux_model, tmp_path, changes):
    config = setups.config(flux_model, tmp_path, **{**COMMON, **changes})
    parts = setups.parts(config)
    measured = setups.update(parts, setups.experience(parts, config), config)
    assert measured["max_ratio_error"] == 0.0 and measured["grad_norm"][0] > 0


@pytest.mark.slow
def test_flux_full_fine_tuning(flux_model, tmp_path):
    from diffusers import FluxTransformer2DModel

    changes = {"policy.adapter": "full", "policy.dtype": "auto", "optim.lr": 1e-3, "run.steps": 1}
    config = setups.config(flux_model, tmp_path, **{**COMMON, **changes})
    summary = train.run(config)
    assert summary["max_ratio_error"] == 0.0 and summary["iterations"] == 1
    policy = load_policy(config)
    base = latents(policy, config)
    load_trained(policy.transformer, config.optim, tmp_path / "run" / "checkpoints" / "step-000001")
    ours = latents(policy, config)
    saved = FluxTransformer2DModel.from_pretrained(tmp_path / "run" / "transformer")
    policy.transformer.load_state_dict(saved.state_dict())
    assert torch.equal(latents(policy, config), ours) and not torch.equal(ours, base)
    card = ModelCard.load(tmp_path / "run" / "transformer" / "README.md")
    assert "FluxTransformer2DModel.from_pretrained" in card.text and "lora" not in card.data.tags


def test_pictures_of_flux_are_pictures(flux_model, tmp_path):
    config = setups.config(flux_model, tmp_path, **COMMON)
    policy = targets.load_base(config)
    images = evaluate.generate_images(
        policy, ["a red circle"], torch.arange(4), 4, steps=2, batch_size=3
    )
    assert images.shape == (4, 3, 16, 16) and images.dtype == torch.uint8
    assert len(images.unique(dim=0)) == 4
