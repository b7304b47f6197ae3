"""Folders of tiny pipelines, made once a session, and a Hub that gives nothing away."""

from __future__ import annotations

import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from flowgrpo.evaluation import pictures
from support import pipelines, processes


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Text embeddings of the tests stay out of the user's cache, those of child processes too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def _disks_are_not_waited_for():
    """Files of a test need not outlive a power cut: each run waited for a disk forty times."""
    with mock.patch.object(os, "fsync", lambda descriptor: None):
        yield


@pytest.fixture(scope="module", autouse=True)
def _pictures_where_they_are_looked_at(request):
    """Drawing a run's curve takes half of a run of two iterations, and making its other pictures
    small a tenth; both are left out in files of tests that never draw a curve themselves (the
    curve in the processes that they fork, too)."""
    with pytest.MonkeyPatch.context() as patch:
        if "curve(" not in request.path.read_text(encoding="utf-8"):
            patch.setattr(pictures, "curve", processes.no_curve)
            patch.setitem(pictures.FORMATS, ".png", ("PNG", {"compress_level": 1}))
        yield


@pytest.fixture(scope="session")
def _read_once():
    """Folders of pipelines are read once and copied then, from the first of the models below on:
    a copy takes a third of the time."""
    # Which tests of other parts need not wait for.
    from support import setups

    with setups.read_once():
        yield


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline over 8 x 8 RGB pixels with one text encoder."""
    return pipelines.save_pixel_pipeline(tmp_path_factory.mktemp("pixel"))


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline with a VAE and three text encoders."""
    return pipelines.save_latent_pipeline(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="session")
def flux_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline of FLUX.1-dev's parts; its default resolution is 256."""
    return pipelines.save_flux_pipeline(tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="session")
def flux2_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline of FLUX.2-klein-base's parts; its default resolution is 256."""
    return pipelines.save_flux2_pipeline(tmp_path_factory.mktemp("flux2"))


@pytest.fixture(scope="session")
def qwen_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline of Qwen-Image's parts; its default resolution is 256."""
    return pipelines.save_qwen_pipeline(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="session")
def wan_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline of Wan 2.2 TI2V-5B's parts; its default size is 81 frames of 480 x 832."""
    return pipelines.save_wan_pipeline(tmp_path_factory.mktemp("wan"))


@pytest.fixture(scope="session")
def zimage_model(tmp_path_factory, _read_once) -> Path:
    """A pipeline of Z-Image's parts; its default resolution is 1024."""
    return pipelines.save_zimage_pipeline(tmp_path_factory.mktemp("zimage"))


@pytest.fixture(scope="session")
def kinds(tmp_path_factory, flux_model, flux2_model, zimage_model) -> dict[str, tuple[Path, dict]]:
    """Blocks of every kind -> (folder, changes of a test's configuration): dual, plain and last
    blocks with norms of queries and keys; without them; double and single blocks, of FLUX.1 and of
    FLUX.2; Z-Image's, with rotary tables for each row."""
    folder = tmp_path_factory.mktemp("kinds")
    small = {"policy.resolution": 16, "policy.max_sequence_length": 8, "policy.text_cache": ""}
    medium = pipelines.save_pixel_pipeline(folder / "sd3.5-medium", layers=3, dual=(0,))
    return {
        "sd3.5-medium": (medium, {}),
        "sd3": (pipelines.save_pixel_pipeline(folder / "sd3", qk_norm=None), {}),
        "flux": (flux_model, small),
        "flux2": (
            flux2_model,
            {**small, "policy.max_sequence_length": 24, "policy.lora_targets": None},
        ),
        "zimage": (
            zimage_model,
            {**small, "policy.max_sequence_length": 64, "policy.lora_targets": None},
        ),
    }


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
def gated_hub(tmp_path, monkeypatch):
    """Inside the test huggingface_hub asks such a Hub, with an empty cache."""
    from huggingface_hub import constants, file_download

    server = ThreadingHTTPServer(("127.0.0.1", 0), Gated)
    threading.Thread(target=server.serve_forever, args=(0.005,), daemon=True).start()
    hub = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", hub)
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
    # Versions before 1.0 read it from the second place.
    for module in (constants, file_download):
        monkeypatch.setattr(
            module, "HUGGINGFACE_CO_URL_TEMPLATE", hub + "".join(template[1:]), raising=False
        )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield
    server.shutdown()
    server.server_close()
