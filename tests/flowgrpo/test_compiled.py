"""A compiled transformer: rollout and update still agree to the bit, and nothing is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
import trainers

from flowgrpo import train
from flowgrpo.policies import compiled

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None,
    reason="torch.compile needs a C++ compiler on a CPU",
)


# Half a minute of compilation, of the first and the last block alone: with beta 0 the form without
# adapters is not needed.
def test_first_ratios_are_exactly_one(pixel_model, tmp_path):
    """An iteration with adapters that are not zero; the velocity is the eager one within
    rounding, with gradients and without."""
    changes = {"policy.compile": True, "policy.dtype": "bfloat16", "optim.beta": 0.0}
    eager = trainers.parts(trainers.config(pixel_model, tmp_path, **{"policy.dtype": "bfloat16"}))
    config = trainers.config(pixel_model, tmp_path, **changes)
    parts = trainers.parts(config)
    policy = parts.policy
    assert policy.compiled and not eager.policy.compiled

    conditioning = policy.encode(["a circle", "two square"])
    x = torch.randn(2, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.3])
    with_gradients = policy.velocity(x, sigma, conditioning)
    with torch.no_grad():
        without = policy.velocity(x, sigma, conditioning)
        expected = eager.policy.velocity(x, sigma, conditioning)
    assert with_gradients.requires_grad and not without.requires_grad
    assert torch.equal(with_gradients, without)
    error = (without.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.02, "the compiled kernels run, and compute the same function"

    metrics = train.update(parts, trainers.experience(parts, config), config)
    assert metrics["max_ratio_error"] == 0.0


def test_training_form_keeps_nothing():
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad(), compiled.training_form():
        y = layer(torch.ones(2, 4)).square().sum()
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="keeps nothing"):
        y.backward()


def test_all_blocks_are_compiled_one_by_one(pixel_model, tmp_path):
    config = trainers.config(pixel_model, tmp_path, **{"policy.compile": True})
    transformer = trainers.parts(config).policy.transformer
    found = compiled.blocks(transformer)
    assert found == list(transformer.transformer_blocks)
    assert all(block._compiled_call_impl is not None for block in found)
    assert transformer._compiled_call_impl is None
