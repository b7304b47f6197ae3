"""Layers over diffusers' modules: what is refused, and that nothing is changed then.

What they compute is compared with diffusers' own, and with the trainer's, in
tests/kernels/test_hub_copy.py and tests/flowgrpo/policies/test_fused_blocks.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowgrpo_kernels import layers
from support import hub_copy


@pytest.fixture(scope="module")
def transformer():
    return hub_copy.sd3()[0]


def fused(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


def test_fuse_names_what_it_replaces(transformer):
    names = layers.fuse(transformer)
    blocks = [f"transformer_blocks.{i}" for i in range(3)]
    assert names == [*blocks, "norm_out"] == fused(transformer)
    for name in names:
        module = transformer.get_submodule(name)
        assert type(module).__module__.startswith("diffusers.")
        assert type(module).__name__ in layers.__all__
        del module.forward


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("transformer_blocks.0.norm1", nn.Identity()),
        ("transformer_blocks.1.norm2", nn.LayerNorm(16)),
        ("transformer_blocks.2.attn.norm_q", nn.LayerNorm(8)),
        ("norm_out.norm", nn.RMSNorm(16)),
    ],
)
def test_an_unknown_module(transformer, name, module):
    owner, _, last = name.rpartition(".")
    block = transformer.get_submodule(".".join(name.split(".")[:2]) if "blocks" in name else owner)
    theirs = transformer.get_submodule(name)
    setattr(transformer.get_submodule(owner), last, module)
    try:
        with pytest.raises(layers.UnknownModule, match=f"^{name} is a .*leave this model") as error:
            layers.fuse(transformer)
        assert (error.value.name, error.value.module) == (name, module)
        assert not layers.fits(block) and fused(transformer) == []
    finally:
        setattr(transformer.get_submodule(owner), last, theirs)
    assert layers.fits(block)


def test_a_model_without_such_blocks():
    with pytest.raises(ValueError, match=r"^Linear has no block or norm that a fused forward is"):
        layers.fuse(nn.Linear(2, 2))


def test_sizes_beyond_the_kernels_on_a_gpu(transformer):
    """Heads of 24 numbers: the CPU takes them, a GPU does not."""
    from diffusers.models.attention import JointTransformerBlock

    with torch.device("meta"):
        block = JointTransformerBlock(48, 2, 24)
    assert not layers.fits(block)
    with pytest.raises(ValueError, match=r"heads must be a power of two up to 256"):
        layers.fuse(nn.ModuleList([block]))
    assert layers.fits(JointTransformerBlock(48, 2, 24))


def test_arguments_that_only_diffusers_knows(transformer):
    block = transformer.transformer_blocks[0]
    tokens = torch.zeros(1, 2, 16)
    with pytest.raises(ValueError, match=r"fused blocks know none, got \['scale'\]"):
        layers.JointTransformerBlock.forward(block, tokens, tokens, tokens[:, 0], {"scale": 1})
    with pytest.raises(ValueError, match=r"modulate_index: .* pass None"):
        layers.QwenImageTransformerBlock.forward(
            block, tokens, tokens, None, tokens[:, 0], modulate_index=tokens
        )
