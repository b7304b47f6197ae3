"""The table of model families, and how a pipeline or a transformer finds its record."""

from __future__ import annotations

from typing import Any

from flowgrpo.config import ConfigError
from flowgrpo.policies.family import Family
from flowgrpo.policies.flux.family import FLUX
from flowgrpo.policies.flux.kontext import KONTEXT
from flowgrpo.policies.flux2.family import FLUX2
from flowgrpo.policies.qwen.family import QWEN
from flowgrpo.policies.sd3.family import SD3
from flowgrpo.policies.wan.family import WAN
from flowgrpo.policies.zimage.family import ZIMAGE

FAMILIES: dict[str, Family] = {
    family.pipeline: family for family in (SD3, FLUX, KONTEXT, FLUX2, QWEN, WAN, ZIMAGE)
}
"""Class of a pipeline -> its family. A new family is one entry."""


def family_named(pipeline: str, model: str) -> Family:
    """Look up the family of the pipeline class that `model`, a folder or Hub id, names."""
    if pipeline not in FAMILIES:
        raise ConfigError(
            f"policy.model {model!r} is a {pipeline}, but one of {', '.join(FAMILIES)} is "
            "expected; name such a pipeline."
        )
    return FAMILIES[pipeline]


def family_of_pipeline(pipeline: Any) -> Family:
    """Find the family of a pipeline in memory, by its class or one that it inherits from."""
    for cls in type(pipeline).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__]
    raise ConfigError(
        f"the model is a {type(pipeline).__name__}, but a name or one of {', '.join(FAMILIES)} is "
        "expected; give such a pipeline."
    )


def family_of(transformer: Any) -> Family:
    """Find the family of a transformer: its policy's, or else the first of its class or of one that
    it inherits from."""
    if known := getattr(transformer, "_flowgrpo_family", None):
        return FAMILIES[known]
    classes = {cls.__name__ for cls in type(transformer).__mro__}
    for family in FAMILIES.values():
        if family.transformer in classes:
            return family
    raise TypeError(
        f"transformer is a {type(transformer).__name__}, but one of "
        f"{', '.join(family.transformer for family in FAMILIES.values())} is expected"
    )
