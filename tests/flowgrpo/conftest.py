"""Folders of tiny pipelines, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny


@pytest.fixture(scope="session")
def pixel_model(tmp_path_factory) -> Path:
    """A pipeline over 8 x 8 RGB pixels with one text encoder."""
    return tiny.save_pixel_pipeline(tmp_path_factory.mktemp("pixel"))


@pytest.fixture(scope="session")
def latent_model(tmp_path_factory) -> Path:
    """A pipeline with a VAE and three text encoders."""
    return tiny.save_latent_pipeline(tmp_path_factory.mktemp("latent"))
