"""Hugging Face's package `kernels`, for tests that need the real one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


def install(target: Path) -> None:
    """Install it beside the environment, which has what it requires; skips without a network."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--target", str(target), "kernels"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"Hugging Face's kernels could not be installed: {done.stderr.strip()[-300:]}")
