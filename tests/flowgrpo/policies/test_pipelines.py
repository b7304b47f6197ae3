"""Models that are gated, incomplete or of another kind: one sentence that says what to do."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from huggingface_hub import constants

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy
from flowgrpo.policies.families import FAMILIES
from support import pipelines

SMALL = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")


def load(folder, config=SMALL):
    return Policy.load(str(folder), device="cpu", dtype="float32", config=config)


@pytest.mark.usefixtures("gated_hub")
def test_a_gated_repository():
    with pytest.raises(
        ConfigError,
        match=r"'acme/gated-model' is gated on the Hugging Face Hub, .* accept its terms at "
        "https://huggingface.co/acme/gated-model and log in by",
    ):
        load("acme/gated-model")


@pytest.mark.slow
def test_a_hub_repository_is_loaded_from_its_snapshot(flux_model, tmp_path, monkeypatch):
    """Offline, from a cache folder laid out as the Hub's client does."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for path in flux_model.rglob("*"):
        if path.is_file():
            blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            shutil.copy(path, blob)
            link = repository / "snapshots" / commit / path.relative_to(flux_model)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    config = replace(SMALL, text_cache=str(tmp_path / "text"))
    for _ in range(2):
        policy = load("acme/tiny", config)
        assert policy.name == "acme/tiny" and policy.encode(["a red circle"]).embeds.shape[1] == 4
    assert len(list((tmp_path / "text").rglob("*.safetensors"))) == 1
    with pytest.raises(ConfigError, match="'acme/other', which is no folder and could not be"):
        load("acme/other")


def without(*names):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        index.update({name: [None, None] for name in names})
        (folder / "model_index.json").write_text(json.dumps(index))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), "no readable model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), "no readable model_index.json"),
        (
            lambda f: (f / "model_index.json").write_text(
                json.dumps({"_class_name": "SanaPipeline"})
            ),
            f"is a SanaPipeline, but one of {', '.join(FAMILIES)} is expected",
        ),
        (
            lambda f: next((f / "transformer").glob("*.safetensors")).write_bytes(b"\x08" * 64),
            "could not be loaded as a StableDiffusion3Pipeline",
        ),
        (lambda f: shutil.rmtree(f / "transformer"), "could not be loaded"),
    ],
)
def test_bad_model_folders(pixel_model, tmp_path, damage, message):
    folder = shutil.copytree(pixel_model, tmp_path / "model")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: shutil.rmtree(f / "transformer"), "could not be loaded as a FluxPipeline"),
        (lambda f: (f / "model_index.json").write_text("[]"), "no readable model_index.json"),
        (
            lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"\x08" * 64),
            r"could not be loaded as a FluxPipeline .*; restore its files\.$",
        ),
        (
            without("text_encoder_2", "tokenizer_2"),
            "lacks text_encoder_2, tokenizer_2, but all of a FluxPipeline's parts are expected",
        ),
        (without("vae"), "lacks vae, but"),
    ],
)
def test_bad_flux_folders(flux_model, tmp_path, damage, message):
    folder = shutil.copytree(flux_model, tmp_path / "model")
    damage(folder)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_part_instead_of_the_pipeline(flux_model):
    with pytest.raises(ConfigError, match=r"transformer' has no readable model_index.json"):
        load(flux_model / "transformer")


def test_sd3_without_t5_has_zeros_in_its_place(tmp_path):
    """What the pipeline itself does when text_encoder_3 is None."""
    folder = pipelines.save_latent_pipeline(tmp_path, without=("text_encoder_3", "tokenizer_3"))
    policy = load(folder)
    found = policy.encode(["a red circle"])
    embeds, _, pooled, _ = policy.pipeline.encode_prompt(
        "a red circle", None, None, do_classifier_free_guidance=False, max_sequence_length=4
    )
    assert torch.equal(found.embeds, embeds) and torch.equal(found.pooled, pooled)
    assert found.embeds.shape == (1, 8 + 4, 32) and not found.embeds[:, 8:].any()
    sample = torch.zeros(1, *policy.latent_shape)
    assert policy.velocity(sample, torch.ones(1), found).isfinite().all()


@pytest.mark.parametrize(
    ("absent", "there"),
    [
        (("text_encoder_2", "tokenizer_2"), "text_encoder, text_encoder_3"),
        (("text_encoder", "tokenizer"), "text_encoder_2, text_encoder_3"),
        (("text_encoder", "text_encoder_2", "text_encoder_3"), "none"),
    ],
)
def test_sd3_with_other_encoders_absent_is_refused(tmp_path, absent, there):
    folder = pipelines.save_latent_pipeline(tmp_path, without=absent)
    with pytest.raises(ConfigError, match=f"has the text encoders {there}, but text_encoder and"):
        load(folder)
