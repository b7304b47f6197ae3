"""Rewards of the user's own, as files."""

from __future__ import annotations

import pytest

from support import grey_pictures


@pytest.fixture(scope="session")
def rewards(tmp_path_factory) -> dict[str, str]:
    """Name -> file.py:function."""
    return grey_pictures.write_rewards(tmp_path_factory.mktemp("rewards"))
