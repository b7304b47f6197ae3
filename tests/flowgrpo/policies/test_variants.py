"""Folders whose weights are stored in a variant, as `save_pretrained(variant="fp16")` writes."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import FluxPipeline, StableDiffusion3Pipeline

from flowgrpo import plan
from flowgrpo.cli import main
from flowgrpo.config import ConfigError, PolicyConfig, replace
from flowgrpo.policies import Policy
from flowgrpo.recipes import recipe
from flowgrpo.runs import model_card

SMALL = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")
FP16 = replace(SMALL, variant="fp16")
KINDS = {"latent_model": StableDiffusion3Pipeline, "flux_model": FluxPipeline}


def load(folder, config=SMALL) -> Policy:
    return Policy.load(str(folder), device="cpu", dtype="float32", config=config)


def save(model, folder, kind="latent_model", **options):
    """The model with weights rounded to float16, in files of the variant fp16."""
    pipeline = KINDS[kind].from_pretrained(model, torch_dtype=torch.float16)
    pipeline.save_pretrained(folder, variant="fp16", **options)
    return folder


@pytest.fixture(scope="module")
def fp16(latent_model, tmp_path_factory):
    return save(latent_model, tmp_path_factory.mktemp("variant") / "fp16")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"max_shard_size": "20KB"}], ids=["whole", "shards"])
def test_it_is_read(request, tmp_path, kind, options):
    model = request.getfixturevalue(kind)
    policy = load(save(model, tmp_path / "fp16", kind, **options), FP16)
    weights, exact = policy.transformer.state_dict(), load(model).transformer.state_dict()
    assert all(torch.equal(weights[name], exact[name].half().float()) for name in exact)


def test_without_policy_variant_it_is_one_sentence(fp16):
    expected = (
        r"weights of \w+ in the variant fp16 alone, but policy.variant is empty; set policy.variant"
    )
    with pytest.raises(ConfigError, match=expected) as error:
        load(fp16)
    assert "\n" not in str(error.value)


def test_another_variant_is_one_sentence(fp16, latent_model):
    with pytest.raises(ConfigError, match=r"is 'bf16', but .* in the variants fp16; choose"):
        load(fp16, replace(SMALL, variant="bf16"))
    with pytest.raises(ConfigError, match=r"no weights in variants; leave policy\.variant empty"):
        load(latent_model, FP16)
    with pytest.raises(ConfigError, match=r"no weights in variants; leave policy\.variant empty"):
        load("nano", FP16)


@pytest.mark.slow
def test_a_folder_of_both(fp16, latent_model, tmp_path):
    """Each is chosen; embeddings of one are not taken for the other's; parameters count once."""
    folder = shutil.copytree(latent_model, tmp_path / "both")
    shutil.copytree(fp16, folder, dirs_exist_ok=True)
    cached = {"text_cache": str(tmp_path / "text")}
    plain, half = (replace(config, **cached) for config in (SMALL, FP16))
    expected = {
        name: load(latent_model if name == "plain" else fp16, c)
        for name, c in (("plain", SMALL), ("half", FP16))
    }
    for name, config in (("plain", plain), ("half", half)):
        found = load(folder, config).encode(["a red circle"]).embeds
        assert torch.equal(found, expected[name].encode(["a red circle"]).embeds)
    assert not torch.equal(*(p.encode(["a red circle"]).embeds for p in expected.values()))
    sizes = plan.sizes_of(str(latent_model))
    assert sizes is not None
    assert plan.sizes_of(str(folder)) == plan.sizes_of(str(folder), "fp16") == sizes
    assert plan.sizes_of(str(fp16), "fp16") == sizes


def test_shards_of_a_variant_count_once(latent_model, tmp_path):
    folder = shutil.copytree(latent_model, tmp_path / "both")
    shutil.copytree(
        save(latent_model, tmp_path / "fp16", max_shard_size="20KB"), folder, dirs_exist_ok=True
    )
    assert plan.sizes_of(str(folder)) == plan.sizes_of(str(latent_model))
    assert plan.sizes_of(str(folder), "fp16") == plan.sizes_of(str(latent_model))


@pytest.mark.slow
def test_sample_takes_it_and_says_what_is_missing(fp16, tmp_path, capsys):
    line = ["sample", "a red circle", "--model", str(fp16), "--resolution", "16", "--count", "1"]
    line += ["--steps", "2", "--device", "cpu", "--out", str(tmp_path / "x.png")]
    assert main.main(line) == 2
    assert "--variant" in capsys.readouterr().err
    assert main.main([*line, "--variant", "fp16"]) == 0


def test_the_card_loads_it(fp16):
    config = replace(recipe("nano"), **{"policy.model": str(fp16), "policy.variant": "fp16"})
    lines = model_card.load_lines(config, load(fp16, FP16).transformer)
    assert ', variant="fp16")' in lines
