"""A pipeline that somebody has loaded, in place of the name of one."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from flowgrpo import train
from flowgrpo.config import ConfigError, PolicyConfig, replace
from flowgrpo.policies import Conditioning, Policy
from support import setups

KINDS = {"pixel_model": 0, "latent_model": 0, "flux_model": 16}
TEXTS = ["a red circle", "two square"]


def loaded(folder, **changes):
    """By diffusers, which asks for a word about components that model_index.json has as null."""
    index = DiffusionPipeline.load_config(folder)
    absent = [name for name, value in index.items() if value == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **{**dict.fromkeys(absent), **changes})


def config_of(kind, cache="") -> PolicyConfig:
    return PolicyConfig(resolution=KINDS[kind], max_sequence_length=4, text_cache=str(cache))


def results(policy):
    """Embeddings, a velocity and an image, by the policy's own functions."""
    conditioning = policy.encode(TEXTS)
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        velocity = policy.velocity(x, torch.tensor([0.9, 0.2]), conditioning)
    return conditioning.embeds, conditioning.pooled, velocity, policy.decode(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_policy_of_its_folder(request, kind, tmp_path):
    """The same bits, on the pipeline's own modules; and no embeddings on disk, since two pipelines
    in memory cannot be told apart."""
    folder, config = request.getfixturevalue(kind), config_of(kind, tmp_path / "text")
    given = loaded(folder)
    policy = Policy.load(given, device="cpu", config=config)
    assert policy.dtype == torch.float32 and policy.transformer is given.transformer
    assert not any(p.requires_grad for p in given.transformer.parameters())
    assert policy.name == str(folder)
    found = results(policy)
    assert not list((tmp_path / "text").rglob("*.safetensors"))
    other = Policy.load(str(folder), device="cpu", dtype="float32", config=config)
    assert all(map(torch.equal, found, results(other)))


def test_a_folder_is_a_path_or_in_the_home_directory(pixel_model, monkeypatch):
    monkeypatch.setenv("HOME", str(pixel_model.parent))
    expected = results(Policy.load(str(pixel_model), device="cpu"))
    for model in (pixel_model, f"~/{pixel_model.name}"):
        policy = Policy.load(model, device="cpu")
        assert policy.name == str(pixel_model)
        assert all(map(torch.equal, results(policy), expected))


@pytest.mark.slow
def test_dtypes(latent_model):
    """auto is the transformer's; another is cast to, and float16 spares the VAE."""
    config = config_of("latent_model")
    for dtype, expected in (
        ("auto", (torch.bfloat16,) * 3),
        ("float32", (torch.float32,) * 3),
        ("float16", (torch.float16, torch.float16, torch.float32)),
    ):
        given = loaded(latent_model, torch_dtype=torch.bfloat16)
        policy = Policy.load(given, device="cpu", dtype=dtype, config=config)
        parts = (given.transformer, given.text_encoder, given.vae)
        assert tuple(part.dtype for part in parts) == expected and policy.dtype == expected[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_training_with_embeddings_of_ones_own(request, kind, tmp_path):
    """Without text encoders; prompts reach the function, and what it returns the transformer."""
    folder = request.getfixturevalue(kind)
    changes = {"policy.lora_targets": None, "policy.max_sequence_length": 4}
    changes |= {"policy.resolution": KINDS[kind], "sample.guidance_scale": 2.0}
    changes |= {"sample.group_size": 3, "sample.steps": 4}
    config = setups.config("mine", tmp_path, **changes)
    donor = Policy.load(str(folder), device="cpu", dtype="float32", config=config.policy)
    names = [name for name in donor.pipeline.components if name.startswith(("text", "tok"))]
    bare = loaded(folder, **dict.fromkeys(names))
    asked = []

    def encode(texts) -> Conditioning:
        asked.append(list(texts))
        return donor.encode(texts)

    mine = train.setup(config, pipeline=bare, encode=encode)
    theirs = train.setup(setups.config(folder, tmp_path, **changes))
    assert mine.policy.transformer is bare.transformer
    found = [
        setups.update(parts, setups.experience(parts, config), config) for parts in (mine, theirs)
    ]
    assert found[0] == found[1] and found[0]["max_ratio_error"] == 0.0
    assert [""] in asked and len(asked) == 2


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda found: None, "encode= returned a NoneType, but a Conditioning"),
        (lambda found: found.rows(torch.tensor([0])), "encode= returned 1 rows for 2 texts"),
        (
            lambda found: Conditioning(found.embeds[..., :5], found.pooled),
            r"embeds \[2, 8, 5\] of torch.float32, but rows of 16 numbers of torch.float32",
        ),
        (
            lambda found: Conditioning(found.embeds, found.pooled[:, :5]),
            r"pooled \[2, 5\] of torch.float32, but rows of 16 numbers",
        ),
        (
            lambda found: Conditioning(found.embeds.half(), found.pooled),
            r"embeds \[2, 8, 16\] of torch.float16, but rows of 16 numbers of torch.float32",
        ),
    ],
)
def test_embeddings_that_are_none(pixel_model, made, message):
    given = loaded(pixel_model)
    donor = Policy.load(loaded(pixel_model), device="cpu")
    policy = Policy.load(given, device="cpu", encode=lambda texts: made(donor.encode(texts)))
    with pytest.raises(ConfigError, match=message):
        policy.encode(TEXTS)


def test_embeddings_of_another_length(flux_model):
    """FLUX's positions are made once, for one number of tokens."""
    config = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")
    encode = Policy.load(loaded(flux_model), device="cpu", config=config).encode
    longer = replace(config, max_sequence_length=8)
    policy = Policy.load(loaded(flux_model), device="cpu", config=longer, encode=encode)
    with pytest.raises(ConfigError, match="embeds of 4 tokens, but 8 are expected"):
        policy.encode(TEXTS)


@pytest.mark.parametrize("kind", ["pixel_model", "latent_model", "flux_model"])
def test_texts_that_are_none(request, kind):
    config = PolicyConfig(resolution=0 if kind == "pixel_model" else 16, text_cache="")
    policy = Policy.load(loaded(request.getfixturevalue(kind)), device="cpu", config=config)
    with pytest.raises(ValueError, match="texts is empty, but one text or more are expected"):
        policy.encode([])
    for texts in (3, None):
        with pytest.raises(TypeError, match="but a list of texts is expected"):
            policy.encode(texts)


def test_a_class_of_ones_own(pixel_model):
    class Mine(StableDiffusion3Pipeline):
        pass

    given = Mine(**loaded(pixel_model).components)
    policy = Policy.load(given, device="cpu")
    assert policy.name == "StableDiffusion3Pipeline" and policy.encode(TEXTS).embeds.shape[0] == 2


def test_what_is_no_pipeline(flux_model):
    with pytest.raises(ConfigError, match="model is a Linear, but a name or one of Stable"):
        Policy.load(torch.nn.Linear(2, 2), device="cpu")
    bare = loaded(flux_model, vae=None)
    with pytest.raises(ConfigError, match="lacks vae, but all of a"):
        Policy.load(bare, device="cpu", encode=lambda texts: None)
