"""Folders of tiny pipelines, made once a session."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(tmp_path_factory):
    """Text embeddings of the tests stay out of the user's cache, those of child processes too."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory) -> Path:
    """A pipeline over 8 x 8 RGB pixels with one text encoder."""
    return tiny.save_pixel_pipeline(tmp_path_factory.mktemp("pixel"))


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory) -> Path:
    """A pipeline with a VAE and three text encoders."""
    return tiny.save_latent_pipeline(tmp_path_factory.mktemp("latent"))


@pytest.fixture(scope="session")
def flux_model(tmp_path_factory) -> Path:
    """A pipeline of FLUX.1-dev's parts; its default resolution is 256."""
    return tiny.save_flux_pipeline(tmp_path_factory.mktemp("flux"))
