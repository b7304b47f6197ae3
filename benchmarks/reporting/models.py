"""The README's table of models, from the families' records and the recipes."""

from __future__ import annotations

from flowgrpo.policies.families import FAMILIES
from flowgrpo.policies.family import Family
from flowgrpo.recipes import EMBEDDED, ENDINGS, RECIPES, recipe


def models(family: Family) -> str:
    """Names of the models whose sizes are known, with their billions of parameters."""
    known = family.sizes.known if family.sizes else {}
    sizes = {name.partition("/")[2]: known[name].parameters / 1e9 for name in known}
    return ", ".join(f"{name} ({size:.1f})" for name, size in sizes.items())


def recipes_of(family: Family, trained: dict[str, str]) -> str:
    """Recipes of a family's models, and the endings of their other forms.

    Args:
        trained: recipe -> its model, of all recipes.
    """
    known = family.sizes.known if family.sizes else {}
    names = [name for name, model in trained.items() if model in known]
    whole = [name for name in names if not name.endswith(ENDINGS)]
    forms = [ending for ending in ENDINGS if any(name.endswith(ending) for name in names)]
    if not whole:
        return "none"
    return ", ".join(f"`{name}`" for name in whole) + "; " + ", ".join(f"`{f}`" for f in forms)


def table() -> tuple[list[str], list[list[str]]]:
    """Head and lines, one a family."""
    head = ["model (10^9 parameters)", "pipeline of diffusers", "makes", "recipes; other endings"]
    trained = {
        name: recipe(name, memory=80.0).policy.model for name in RECIPES if name not in EMBEDDED
    }
    lines = [
        [
            models(family),
            f"`{family.pipeline}`",
            "videos" if family.frame_rate else "edited images" if family.edits else "images",
            recipes_of(family, trained),
        ]
        for family in FAMILIES.values()
    ]
    return head, lines
