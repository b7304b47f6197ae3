"""Recipes: functions that return a Config, and the one that finds them by name."""

from __future__ import annotations

import importlib

from flowgrpo.config import Config, ConfigError
from flowgrpo.validation import require, similar

RECIPES = {"nano": "flowgrpo.nano:recipe"}
"""Recipe name -> "module:function"; the function takes keyword overrides and returns a Config."""


def recipe(name: str) -> Config:
    """The Config of the recipe `name`: a key of RECIPES, or "package.module:function"."""
    target = RECIPES.get(name, name)
    module, _, function = target.partition(":")
    require(
        bool(module and function),
        f"recipe {name!r} is unknown, but one of {', '.join(sorted(RECIPES))} or "
        f"package.module:function is expected{similar(name, RECIPES)}; name one of these.",
    )
    try:
        made = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"recipe {name!r} cannot be loaded from {target} ({error}), but a function that "
            "returns a flowgrpo.config.Config is expected there; check the name and the install."
        ) from error
    require(
        isinstance(made, Config),
        f"recipe {name!r} returned {type(made).__name__}, but a flowgrpo.config.Config is "
        "expected; return one.",
    )
    return made
