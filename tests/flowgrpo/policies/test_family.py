"""The seam of a model family: records that are light and true, and no class named elsewhere."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers.models import attention, normalization
from diffusers.models.transformers import (
    transformer_flux,
    transformer_flux2,
    transformer_qwenimage,
    transformer_z_image,
)

from flowgrpo.policies.families import FAMILIES, family_of
from flowgrpo.policies.family import Family, import_hook

ROOT = Path(__file__).resolve().parents[3]
TRAINER = ROOT / "flowgrpo"
# The embedded model is built there, of diffusers' classes.
HOMES = [
    *(TRAINER / "policies" / name for name in ("sd3", "flux", "flux2", "qwen", "wan", "zimage")),
    TRAINER / "nano",
]
PREFIXES = (
    r"(?:StableDiffusion3|SD3|SD35|Flux2?|Joint|QwenImage|QwenDouble|Wan|ZImage|ZSingle)[A-Z]\w*"
)
"""Of the families' classes: pipelines, transformers, blocks, norms, attention, processors."""


def classes() -> set[str]:
    """Names that the records know, and the classes of their blocks."""
    names = set()
    for family in FAMILIES.values():
        names |= {family.pipeline, family.transformer, family.policy.partition(":")[2]}
        if family.modulation is not None:
            names |= {*family.modulation.blocks, *family.modulation.norms, *family.modulation.ends}
        names |= {cls.__name__ for cls in import_hook(family.fused_blocks)}
    return names


def named_in(text: str) -> set[str]:
    words = set(re.findall(r"\b\w+\b", text))
    return {word for word in words if word in classes() or re.fullmatch(PREFIXES, word)}


@pytest.mark.slow
def test_no_other_file_names_a_familys_classes():
    """Neither in code nor in comments; the families' own files show that the search finds them."""
    assert named_in("a FluxAttnProcessor, a AdaLayerNormZero") == {
        "FluxAttnProcessor",
        "AdaLayerNormZero",
    }
    seen = set()
    for file in TRAINER.rglob("*.py"):
        names = named_in(file.read_text(encoding="utf-8"))
        if any(home in file.parents for home in HOMES):
            seen |= names
        else:
            assert not names, f"{file.relative_to(ROOT)} names {', '.join(sorted(names))}"
    assert classes() <= seen


def test_records_are_light():
    """The command line's help and the memory plan come without torch."""
    heavy = "{'torch', 'diffusers', 'transformers', 'peft'}"
    code = f"import sys, flowgrpo.plan, flowgrpo.policies; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_the_documented_names_are_in_the_package():
    policies = importlib.import_module("flowgrpo.policies")
    from flowgrpo.policies import Conditioning, Policy

    assert Policy.__module__ == "flowgrpo.policies.base"
    assert Conditioning.__module__ == "flowgrpo.records"
    with pytest.raises(AttributeError, match=r"'flowgrpo\.policies' has no attribute 'Polic'"):
        _ = policies.Polic


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_record_names_is_there(name):
    """Hooks import, classes are the library's, blocks and norms those of its version here."""
    family = FAMILIES[name]
    assert family.pipeline == name
    hooks = ("policy", "positions", "attention_processors", "fused_blocks", "guide", "widths")
    hooks += ("scheduler",)
    for hook in hooks:
        assert not getattr(family, hook) or import_hook(getattr(family, hook))
    pipeline, transformer = map(family.load_class, (family.pipeline, family.transformer))
    assert issubclass(pipeline, diffusers.DiffusionPipeline)
    assert issubclass(transformer, diffusers.ModelMixin)
    if family.modulation is None:
        return
    table = import_hook(family.fused_blocks)
    assert set(family.modulation.blocks) < {cls.__name__ for cls in table}
    for block in (*family.modulation.blocks, *family.modulation.ends):
        homes = (
            attention,
            transformer_flux,
            transformer_flux2,
            transformer_qwenimage,
            transformer_z_image,
        )
        assert any(hasattr(home, block) for home in homes), block
    for norm in family.modulation.norms:
        assert hasattr(normalization, norm) or hasattr(transformer_flux2, norm), norm


def test_each_field_says_what_it_is():
    """A line below each field, as dataclasses of this project have it."""
    text = (TRAINER / "policies" / "family.py").read_text(encoding="utf-8")
    body = text[text.index("class Family:") : text.index("def load_class")]
    for field in dataclasses.fields(Family):
        assert re.search(rf'^    {field.name}: .*\n    """', body, re.MULTILINE), field.name


def test_a_transformer_of_no_family():
    with pytest.raises(TypeError, match="is a Linear, but one of SD3Transformer2DModel, Flux"):
        family_of(importlib.import_module("torch").nn.Linear(2, 2))
