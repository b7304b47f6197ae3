"""FLUX.1-Kontext: images that prompts come with, from the prompt file to the saved adapter."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FluxKontextPipeline
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from flowgrpo import cuda_graphs, plan, train
from flowgrpo.cli import targets
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions, SampleOptions
from flowgrpo.cli.sample import sample_pictures
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.distributed.world import World
from flowgrpo.evaluation import kl
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.policies import Policy
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.policies.families import family_of
from flowgrpo.prompts.batches import prompt_batch
from flowgrpo.prompts.load import fingerprint, load_prompts
from flowgrpo.records import Conditioning
from flowgrpo.runs import directory
from flowgrpo.runs.export import load_trained
from flowgrpo.sampling.rollout import rollout
from flowgrpo.sampling.schedule import ode_schedule
from flowgrpo_kernels import initial_noise
from support import cpu_graphs, pipelines, setups

QUIET = Console(quiet=True)
SEEN: list[str] = []
CHANGES = {
    "policy.lora_targets": None,
    "policy.resolution": 16,
    "policy.max_sequence_length": 8,
    "policy.embedded_guidance": 2.5,
    "sample.group_size": 3,
    "sample.steps": 4,
    "sample.eval_steps": 3,
    "optim.lr": 1e-2,
    "optim.ema_every": 1,
    "optim.beta": 0.04,
    "reward.weights": {"test_kontext:like": 1.0},
    "run.steps": 2,
    "run.eval_every": 0,
    "run.checkpoint_every": 1,
    "run.eval_prompts": 2,
    "run.eval_samples": 2,
}


def like(images, prompts, metadata):
    """Images near their originals, whose paths the metadata have, are better."""
    scores = []
    for image, entry in zip(images, metadata, strict=True):
        SEEN.append(entry["image"])
        with Image.open(entry["image"]) as file:
            original = torch.from_numpy(np.array(file.convert("RGB").resize(image.shape[:0:-1])))
        scores.append(-(image.permute(1, 2, 0).float() - original).abs().mean() / 255)
    return torch.stack(scores)


def picture(path: Path, seed: int) -> Path:
    """Write a picture of some colours, as large and of the mode as the seed has it."""
    random = np.random.default_rng(seed)
    mode = ("RGB", "RGBA", "L")[seed % 3]
    pixels = random.integers(0, 256, (5, 6 + seed, len(mode)), dtype=np.uint8)
    image = Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels)
    image.resize((20 + seed, 24)).save(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return pipelines.save_flux_pipeline(tmp_path_factory.mktemp("kontext"), kontext=True)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """A file of prompts with an image each, in a folder beside it."""
    folder = tmp_path_factory.mktemp("edits")
    (folder / "originals").mkdir()
    lines = []
    for number, text in enumerate(setups.TEXTS):
        path = picture(folder / "originals" / f"{number}.png", number)
        lines.append({"prompt": text, "image": str(path.relative_to(folder))})
    (folder / "edits.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "edits.jsonl"


def config_of(model: Path, prompts: Path, folder: Path, **changes) -> Config:
    values = {**CHANGES, "sample.prompts": str(prompts), **changes}
    return setups.config(model, folder, **values)


@pytest.fixture(scope="module")
def trained(model, prompts, tmp_path_factory) -> tuple[Config, dict, Path]:
    """A finished run of two iterations: its configuration, summary and folder."""
    folder = tmp_path_factory.mktemp("trained")
    config = config_of(model, prompts, folder)
    return config, train.run(config), folder / "run"


@pytest.fixture(scope="module")
def policy(model, prompts, tmp_path_factory) -> Policy:
    return targets.load_base(config_of(model, prompts, tmp_path_factory.mktemp("policy")))


def metrics(folder: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in x.items() if k != "seconds"} for x in lines if x["kind"] == kind]


def latents(policy, text: Conditioning, scale: float = 1.0, steps: int = 4) -> torch.Tensor:
    """Our deterministic sampler, from the noise of one seed a prompt."""
    count = len(text)
    return rollout(
        policy,
        text,
        ode_schedule(policy, steps),
        torch.arange(steps)[:, None].expand(steps, count),
        groups=torch.arange(count),
        seeds=torch.arange(3, 3 + count),
        batch_size=count,
        uncond=policy.encode_empty(scale),
        guidance_scale=scale,
    ).latents[-1]


def theirs(pipe, policy, text, paths, scale: float = 1.0, steps: int = 4) -> torch.Tensor:
    """The pipeline's latents from the same noise, one prompt after the other with its image."""
    empty, results = policy.encode_texts([""]), []
    noise = initial_noise(torch.arange(3, 3 + len(paths)), policy.latent_shape)
    for number, path in enumerate(paths):
        with Image.open(path) as file:
            image = file.convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)
        results += pipe(
            image=image,
            prompt_embeds=text.embeds[number : number + 1],
            pooled_prompt_embeds=text.pooled[number : number + 1],
            negative_prompt_embeds=empty.embeds,
            negative_pooled_prompt_embeds=empty.pooled,
            true_cfg_scale=scale,
            guidance_scale=2.5,
            latents=noise[number : number + 1],
            num_inference_steps=steps,
            height=16,
            width=16,
            max_area=256,
            _auto_resize=False,
            output_type="latent",
        ).images
    return torch.stack(results)


def test_two_iterations_with_ratio_one(trained):
    config, summary, folder = trained
    lines = metrics(folder, "train")
    assert len(lines) == 2 and summary["max_ratio_error"] == 0.0
    assert all(line["kl"] > 0 and min(line["grad_norm"]) > 0 for line in lines)
    # The rewards have read the originals, by absolute paths.
    prompts = load_prompts(config.sample.prompts)
    drawn = [prompt_batch(prompts, config, iteration).images for iteration in range(2)]
    evaluated = load_evaluation_set(config).prompts.images
    assert set(SEEN) == {*drawn[0], *drawn[1], *evaluated} and len(set(SEEN)) > 3
    assert all(Path(path).is_absolute() for path in SEEN)


@pytest.mark.slow
def test_resumed_equals_uninterrupted(trained, tmp_path):
    config, _, folder = trained
    train.run(replace(config, **{"run.out": str(tmp_path / "run"), "run.steps": 1}))
    train.run(replace(directory.resume_config(tmp_path / "run"), **{"run.steps": 2}))
    for kind in ("train", "eval"):
        assert metrics(tmp_path / "run", kind) == metrics(folder, kind)


@pytest.mark.slow
def test_evaluate_and_sample(trained, tmp_path):
    config, summary, folder = trained
    found = evaluate_run(EvaluateOptions(str(folder), out=str(tmp_path / "e"), device="cpu"), QUIET)
    accuracy = found["reports"]["iteration 2"]["accuracy"]
    assert accuracy == summary["after"]["accuracy"] != found["reports"]["base"]["accuracy"]
    pictures = []
    for image in load_prompts(config.sample.prompts).images[:2]:
        out = str(tmp_path / f"{len(pictures)}.png")
        options = {"run": str(folder), "out": out, "steps": 2, "count": 2, "image": image}
        pictures.append(sample_pictures(SampleOptions(("a red circle",), **options), QUIET))
    assert pictures[0].read_bytes() != pictures[1].read_bytes()
    for options, message in (
        ({}, "edits images, but prompt 1 comes without one; .* flowgrpo sample an --image"),
        ({"image": str(folder)}, "--image is .* cannot be read as a picture"),
    ):
        with pytest.raises(ConfigError, match=message):
            sample_pictures(SampleOptions(("a",), run=str(folder), **options), QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_latents_and_adapter_are_the_pipelines(trained, scale):
    """Without the adapter, and with the saved one in diffusers' own pipeline, with and without
    classifier-free guidance."""
    config, _, folder = trained
    policy, paths = targets.load_base(config), load_prompts(config.sample.prompts).images[:3]
    pipe = FluxKontextPipeline.from_pretrained(config.policy.model)
    text = policy.encode(setups.TEXTS[:3], images=paths)
    base = theirs(pipe, policy, text, paths, scale)
    # One row a forward here too: the kernels of a product depend on the number of rows.
    ours = latents(policy, text.rows(torch.tensor([0])), scale)
    torch.testing.assert_close(ours, base[:1], rtol=1e-6, atol=1e-6)
    add_adapter(policy.transformer, config.policy)
    load_trained(policy.transformer, config.optim, folder / "checkpoints" / "step-000002")
    pipe.load_lora_weights(folder / "adapter")
    found = latents(policy, text, scale)
    # PEFT adds x A^T B^T to x W^T, policies/lora.py has one product.
    torch.testing.assert_close(found, theirs(pipe, policy, text, paths, scale), rtol=0, atol=5e-6)
    assert (found - base).abs().max() > 1e-3, "the adapter matters"
    swapped = policy.encode(setups.TEXTS[:3], images=paths[::-1])
    assert (latents(policy, swapped, scale) - found).abs().max() > 1e-3, "the image matters"


def test_reference_latents_are_the_pipelines(policy, prompts):
    """By its own preprocessing and its VAE's mean; equal images are encoded once."""
    pipe, paths = policy.pipeline, load_prompts(prompts).images
    calls, own = [], type(policy)._reference_latents
    policy._reference_latents = lambda path: calls.append(path) or own(policy, path)
    try:
        found = policy.encode(["a", "b", "c"], images=[paths[1], paths[2], paths[1]]).reference
    finally:
        del policy._reference_latents
    assert found.shape == (3, 16, 16) and calls == [paths[1], paths[2]]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    with Image.open(paths[1]) as file:
        image = pipe.image_processor.resize(file.convert("RGB"), 16, 16)
    pixels = pipe.image_processor.preprocess(image, 16, 16)
    noise = torch.zeros(1, *policy.latent_shape)
    _, packed, _, ids = pipe.prepare_latents(
        pixels, 1, 4, 16, 16, torch.float32, policy.device, None, noise
    )
    assert torch.equal(found[:1], packed)
    assert torch.equal(policy._image_ids[16:], ids)
    assert (
        torch.equal(policy._image_ids[:16, 1:], ids[:, 1:]) and not policy._image_ids[:16, 0].any()
    )


def test_a_conditioning_carries_its_references():
    tensor = torch.arange(24.0).view(4, 3, 2)
    whole = Conditioning(tensor, tensor[:, 0], reference=tensor)
    index = torch.tensor([3, 1])
    for rows in (
        whole.rows(index),
        whole.rows_at(index, index),
        whole.to(torch.device("cpu")).rows(index),
    ):
        assert torch.equal(rows.reference, tensor[index])
    table = Conditioning(tensor, tensor[:, 0], tensor.new_ones(5, 4, 7), reference=tensor)
    assert torch.equal(table.at(2).reference, tensor) and table.at(2).modulation.shape == (4, 7)
    rows = table.rows_at(index, torch.tensor([0, 4]))
    assert torch.equal(rows.reference, tensor[index]) and rows.table is None
    assert torch.equal(whole.rows(index).then(whole).reference[:2], tensor[index])
    assert whole.rows(index[:1]).expand(3).reference.shape == (3, 3, 2)
    without = Conditioning(tensor, tensor[:, 0])
    assert torch.equal(without.with_reference_of(whole).then(whole).reference[:4], tensor)
    with pytest.raises(ValueError, match="reference is there in one of both alone"):
        without.then(whole)


@pytest.mark.parametrize("size", [2, 5])
def test_each_process_encodes_a_share(size, policy, prompts, monkeypatch):
    """Of the images as of the texts, to the bits of one process."""
    entries = load_prompts(prompts).take([0, 1, 2, 4])
    whole = policy.encode(entries.texts, images=entries.images)
    monkeypatch.setattr(World, "all_rows", lambda world, rows: [rows])
    shares = [
        policy.encode_shares(entries.texts, World(rank, size), entries.images)
        for rank in range(size)
    ]
    assert max(map(len, shares)) == -(-4 // size)
    for name in ("embeds", "pooled", "reference"):
        parts = torch.cat([getattr(share, name) for share in shares])
        assert torch.equal(parts, getattr(whole, name))


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_image_is_an_input_of_a_captured_rollout(model, prompts, tmp_path, guidance):
    """One graph serves prompts with other images, with the bits of a rollout without it."""
    config = config_of(model, prompts, tmp_path, **{"sample.guidance_scale": guidance})
    parts = setups.parts(config)
    policy, found = parts.policy, []
    policy.graphs = cuda_graphs.Graphs(policy, cpu_graphs.Recorder())
    for start in (0, 2):
        entries = parts.prompts.take([start, start + 1])
        text = policy.encode(setups.TEXTS[:2], images=entries.images)
        found.append(train.collect(parts, text, config))
        collect = partial(train.collect, parts, text, config)
        cpu_graphs.assert_equal(found[-1], cpu_graphs.eager(policy, collect))
    assert policy.graphs.recorder.captures == 1
    assert not torch.equal(found[0].latents[-1], found[1].latents[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"policy.dtype": "bfloat16", "policy.fused": True},
        {"sample.guidance_scale": 3.0, "optim.guard": True, "optim.beta": 0.0},
        {"sample.shared_noise": True, "sample.share_prefix": True},
        {"optim.objective": "nft", "run.eval_resolution": 32, "run.eval_kl": 0.7},
    ],
    ids=[
        "bfloat16, fused",
        "guidance and guard",
        "shared prefix",
        "nft, larger evaluations, path KL",
    ],
)
def test_other_kinds_of_runs(model, prompts, tmp_path, changes):
    changes = {"run.steps": 1, "run.eval_prompts": 1, **changes}
    summary = train.run(config_of(model, prompts, tmp_path, **changes))
    assert summary["iterations"] == 1 and summary.get("max_ratio_error", 0.0) == 0.0


def test_path_kl_of_an_untrained_model_is_zero(policy, prompts, tmp_path):
    config = config_of("unused", prompts, tmp_path)
    held = load_evaluation_set(config)
    policy.keep_reference()
    assert kl.path_kl(policy, held, 0.7, 2) == 0.0


def test_model_card(trained):
    """Lines that edit an image with the adapter, as they stand."""
    config, _, folder = trained
    card = ModelCard.load(folder / "adapter" / "README.md")
    assert card.data.to_dict()["pipeline_tag"] == "image-to-image"
    code = card.text.split("```python\n")[1].split("```")[0]
    assert "FluxKontextPipeline" in code and "FluxPipeline" not in code
    code = code.replace('.to("cuda")', "").replace("bfloat16", "float32")
    code = code.replace("IMAGE", load_prompts(config.sample.prompts).images[0])
    names: dict = {}
    exec(code.replace("THIS_FOLDER", str(folder / "adapter")), names)
    assert names["image"].size == (16, 16)
    assert names["pipe"].transformer.peft_config["default_0"].r == 4


def test_families_that_share_a_transformer(policy, flux_model):
    assert family_of(policy.transformer).pipeline == "FluxKontextPipeline"
    config = policy.pipeline.transformer.config
    assert family_of(type(policy.transformer)(**config)).pipeline == "FluxPipeline"
    other = Policy.load(
        str(flux_model), device="cpu", config=replace(Config(), **{"policy.resolution": 16}).policy
    )
    assert family_of(other.transformer).pipeline == "FluxPipeline"
    assert other.encode(["a red circle"]).reference is None


def test_memory_plan_counts_the_images_tokens(model):
    names = ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Kontext-dev")
    plain, edits = map(plan.sizes_of, names)
    assert (plain.references, edits.references) == (0, 1)
    base = {"policy.max_sequence_length": 128, "run.eval_resolution": 512}
    at = {
        side: plan.expected_memory(replace(Config(), **{**base, "policy.resolution": side}), arch)
        for side, arch in ((512, edits), (1024, plain))
    }
    # 1024 tokens of the sample and 1024 of the image, beside 128 of the text.
    memory = plan.expected_memory(replace(Config(), **{**base, "policy.resolution": 512}), plain)
    assert at[512]["trajectory"] == memory["trajectory"]
    low, high = memory["update"], at[1024]["update"]
    third = (high - low) / 3
    assert at[512]["update"] == pytest.approx(low + third, rel=1e-6)
    assert at[512]["evaluation"] >= memory["evaluation"]
    assert plan.sizes_of(str(model)).references == 1


def test_lines_that_are_refused(tmp_path, policy, flux_model):
    path = tmp_path / "a.jsonl"
    (tmp_path / "text.png").write_text("no picture")
    for image, message in (
        ("gone.png", rf"the image of line 1 of {path} is '{tmp_path}/gone.png', .*No such file"),
        ("text.png", rf"the image of line 1 of {path} is '{tmp_path}/text.png', .*cannot identify"),
        (7, rf"line 1 of {path} has 7 as its image, but the path of a picture"),
        (" ", rf"line 1 of {path} has ' ' as its image, but the path of a picture"),
    ):
        path.write_text(json.dumps({"prompt": "a red circle", "image": image}))
        with pytest.raises(ConfigError, match=message):
            load_prompts(path)
    picture(tmp_path / "here.png", 0)
    lines = [{"prompt": "a", "image": "here.png"}, {"prompt": "b", "image": None}]
    path.write_text("\n".join(map(json.dumps, lines)))
    entries = load_prompts(path)
    assert entries.images == (str(tmp_path / "here.png"), None)
    with pytest.raises(ConfigError, match="edits images, but prompt 2 comes without one"):
        policy.encode(entries.texts, images=entries.images)
    with pytest.raises(ConfigError, match="edits images, but prompt 1 comes without one"):
        policy.encode(entries.texts)
    # A picture that broke since: its beginning is there.
    whole = (tmp_path / "here.png").read_bytes()
    (tmp_path / "here.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match=r"the image .*here\.png' cannot be read as a picture"):
        policy.encode(["a"], images=entries.images[:1])


@pytest.mark.slow
def test_models_and_sets_that_do_not_fit(flux_model, model, prompts, tmp_path):
    message = "a prompt comes with the image .* makes images of texts alone"
    with pytest.raises(ConfigError, match=message):
        train.setup(config_of(flux_model, prompts, tmp_path))
    texts = setups.config(model, tmp_path).sample.prompts
    with pytest.raises(ConfigError, match="edits images, but prompt 1 comes without one"):
        train.setup(config_of(model, texts, tmp_path))


def test_a_fingerprint_is_of_the_pictures_content(tmp_path):
    found = []
    for folder, seed in (("one", 0), ("two", 0), ("three", 3)):
        (tmp_path / folder).mkdir()
        picture(tmp_path / folder / "a.png", seed)
        path = tmp_path / folder / "prompts.jsonl"
        path.write_text(json.dumps({"prompt": "a", "image": "a.png"}))
        found.append(fingerprint(load_prompts(path)))
    assert found[0] == found[1] != found[2]
