"""Models that are gated, incomplete or of another kind: one sentence that says what to do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny
import torch

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy

SMALL = PolicyConfig(resolution=16, max_sequence_length=4, text_cache="")


def load(folder, config=SMALL):
    return Policy.load(str(folder), device="cpu", dtype="float32", config=config)


class Gated(BaseHTTPRequestHandler):
    """A Hub on which every file is gated."""

    def do_GET(self):
        self.send_response(403)
        self.send_header("X-Error-Code", "GatedRepo")
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


# In a process of its own, because huggingface_hub reads its address when it is imported.
def test_a_gated_repository(hub, tmp_path):
    code = "from flowgrpo.policies import Policy; Policy.load('acme/gated-model', device='cpu')"
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    last = done.stderr.strip().splitlines()[-1]
    assert "ConfigError: policy.model 'acme/gated-model' is gated on the Hugging Face Hub" in last
    assert "accept its terms at https://huggingface.co/acme/gated-model and log in" in last


def without(*names):
    def change(folder):
        index = json.loads((folder / "model_index.json").read_text())
        index.update({name: [None, None] for name in names})
        (folder / "model_index.json").write_text(json.dumps(index))

    return change


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
    folder = tiny.save_latent_pipeline(tmp_path, without=("text_encoder_3", "tokenizer_3"))
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
    folder = tiny.save_latent_pipeline(tmp_path, without=absent)
    with pytest.raises(ConfigError, match=f"has the text encoders {there}, but text_encoder and"):
        load(folder)
