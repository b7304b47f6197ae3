"""Recipes: found by name, and with the numbers of the papers."""

from __future__ import annotations

import pytest

from flowgrpo.config import Config, ConfigError
from flowgrpo.recipes import recipe


def custom() -> Config:
    """A recipe of the tests' own."""
    return Config(recipe="custom")


def broken() -> str:
    return "no config"


def test_recipes_are_found_by_name():
    assert recipe("nano").recipe == "nano"
    assert recipe("test_recipes:custom") == custom()
    for name, words in (
        ("nanno", "did you mean 'nano'?"),
        ("no_such_module:f", "cannot be loaded"),
        ("test_recipes:absent", "cannot be loaded"),
        ("test_recipes:broken", "returned str"),
    ):
        with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
            recipe(name)
