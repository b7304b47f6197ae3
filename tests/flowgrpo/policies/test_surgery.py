"""Model surgery: what a load puts on the modules is what surgery.py's table says, and no more."""

from __future__ import annotations

import copy
import inspect
import re

import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import nn

from flowgrpo.distributed import sharding
from flowgrpo.policies import lora, split_forward, surgery
from flowgrpo.policies.attention import IMAGE_LAYERS, TEXT_LAYERS
from flowgrpo.policies.families import family_of
from flowgrpo.policies.load import load_policy
from flowgrpo.policies.lora import Product, SharedInput
from flowgrpo.policies.modulation import Columns
from support import setups

TABLE = {
    number: re.split(r"\s{2,}", line.strip())
    for number, line in re.findall(r"^    (\d)  (.*)$", surgery.__doc__, re.MULTILINE)
}
"""Number -> rewrite, where, modules, attributes."""


def loaded(folder):
    """The transformer as diffusers loads it."""
    index = DiffusionPipeline.load_config(folder)
    absent = [name for name, value in index.items() if value == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent)).transformer


def additions(before: nn.Module, after: nn.Module) -> dict[str, set[str]]:
    """Module -> attributes and buffers that it has only afterwards."""
    modules = dict(before.named_modules())
    added = {}
    for name, module in after.named_modules():
        new = set(vars(module)) - set(vars(modules[name]))
        new |= {f"buffer {b}" for b in set(module._buffers) - set(modules[name]._buffers)}
        if new:
            added[name] = new
    return added


def with_adapter(folder, config):
    """The transformer as diffusers and PEFT make it."""
    plain = loaded(folder)
    targets = config.policy.lora_targets or family_of(plain).lora_targets
    plain.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(targets)))
    return plain


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["sd3.5-medium", "sd3", "flux"])
def test_attributes_are_those_of_the_table(kinds, tmp_path, kind, fused):
    folder, changes = kinds[kind]
    options = {"policy.fused": fused, "policy.gradient_checkpointing": True}
    config = setups.config(folder, tmp_path, **changes, **options)
    plain = with_adapter(folder, config)
    policy = load_policy(config)
    family, transformer = policy.family, policy.transformer
    blocks = set(map(id, family.blocks_of(transformer)))
    kinds_seen = set()
    for name, new in additions(plain, transformer).items():
        module = transformer.get_submodule(name)
        rewrite = vars(module).get("_flowgrpo")
        if name:
            kinds_seen.add(type(rewrite))
        if name == "":
            expected = {"_flowgrpo_family"}
        elif name == "pos_embed":
            expected = {"cropped_pos_embed", "buffer _cropped"}
        elif isinstance(rewrite, Product | Columns):
            expected = {"_flowgrpo", "forward"}
        elif isinstance(rewrite, SharedInput):
            expected = {"_flowgrpo"}
            assert set(rewrite.groups) == {IMAGE_LAYERS, TEXT_LAYERS}
        else:
            assert fused and (id(module) in blocks or name == "norm_out"), name
            expected = {"forward"}
        assert new == expected, name
    assert {Product, Columns} <= kinds_seen
    assert (SharedInput in kinds_seen) == (kind != "flux" or fused)
    assert list(transformer.state_dict()) == list(plain.state_dict())


def test_the_table_has_the_rewrites_in_their_order():
    assert list(TABLE) == [str(number) for number in range(10)]
    _, *steps = re.split(r"# (\d)\. ", inspect.getsource(surgery.rewrite))
    assert steps[::2] == ["1", "2", "3", "4", "5"]
    for number, code in zip(steps[::2], steps[1::2], strict=True):
        _, where, *_ = TABLE[number]
        assert where[0].lower() + where[1:] in code, where
    for number, function in (
        ("0", surgery.quantize),
        ("6", lora.install),
        ("7", surgery.recompute),
        ("8", split_forward.install),
        ("9", sharding.shard),
    ):
        assert TABLE[number][1].rpartition(".")[2] == function.__name__


def test_a_copy_has_rewrites_of_its_own(kinds, tmp_path):
    """As the reference of a full fine-tuning: what a copy remembers names its own modules."""
    folder, changes = kinds["sd3"]
    policy = load_policy(setups.config(folder, tmp_path, **changes))
    clone = copy.deepcopy(policy.transformer)
    layer = clone.transformer_blocks[0].attn.to_q
    assert layer._flowgrpo.layers[0] is layer and layer.forward.__self__ is layer
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.zero_()
    assert any(p.abs().sum() > 0 for p in policy.transformer.parameters())
