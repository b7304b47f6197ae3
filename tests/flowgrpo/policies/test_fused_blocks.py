"""Fused blocks against diffusers' own: velocities, gradients, error in bfloat16, training, bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from flowgrpo import train
from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Conditioning, Policy, blocks
from flowgrpo.policies.families import family_of
from flowgrpo.policies.sd3 import blocks as sd3_blocks
from support import setups
from support.cpu_graphs import assert_equal, eager, evaluate, made

KINDS = ("sd3.5-medium", "sd3", "flux")
FUSED = {"policy.fused": True}


def policy_of(kinds, kind, folder, **changes):
    model, own = kinds[kind]
    return setups.parts(setups.config(model, folder, **own, **changes)).policy


def inputs(policy, rows=3):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(rows, *policy.latent_shape, generator=generator)
    # Times that bfloat16 holds, for FLUX rounds them to it.
    sigma = torch.tensor([1.0, 0.5, 0.125]).repeat(rows // 3)
    return sample, sigma, policy.encode(setups.TEXTS[:3] * (rows // 3))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_velocity_and_gradients_are_diffusers_own(kinds, tmp_path, kind, adapter):
    """In float32 within rounding, for adapters and for all weights: modulations, norms, linears."""
    changes = {"policy.adapter": adapter, "policy.dtype": "float32"}
    ours = policy_of(kinds, kind, tmp_path, **changes, **FUSED)
    theirs = policy_of(kinds, kind, tmp_path, **changes)
    assert ours.fused and not theirs.fused
    weight = torch.randn(3, *ours.latent_shape, generator=torch.Generator().manual_seed(1))
    found = []
    for policy in (ours, theirs):
        velocity = policy.velocity(*inputs(policy))
        (velocity * weight).sum().backward()
        grads = {n: p.grad for n, p in policy.transformer.named_parameters() if p.requires_grad}
        found.append((velocity.detach(), grads))
    (velocity, grads), (expected, own) = found
    torch.testing.assert_close(velocity, expected, rtol=1e-5, atol=3e-6)
    assert list(grads) == list(own)
    reached = {name for name, grad in own.items() if grad is not None}
    assert reached == {name for name, grad in grads.items() if grad is not None}
    assert len(reached) > 10
    for name in reached:
        # The gradient of a key's bias is zero but for rounding: softmax does not see it.
        scale = max(own[name].abs().max(), 1e-2)
        torch.testing.assert_close(grads[name], own[name], rtol=0, atol=2e-5 * scale)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_is_no_worse_than_diffusers(kinds, tmp_path, kind):
    """Root mean square error against diffusers' forward of the same weights in float64."""
    model, own = kinds[kind]

    def load(dtype, **changes):
        own_and = {**own, "policy.embedded_guidance": 4.0, **changes}
        config = setups.config(model, tmp_path, **own_and).policy
        return Policy.load(str(model), device="cpu", dtype=dtype, config=config)

    half = {"ours": load("bfloat16", **FUSED), "theirs": load("bfloat16")}
    exact = load(torch.float64)
    weights = half["theirs"].transformer.state_dict()
    exact.transformer.load_state_dict({name: t.double() for name, t in weights.items()})
    sample, sigma, text = inputs(half["ours"], rows=9)
    double = Conditioning(text.embeds.double(), text.pooled.double())
    with torch.no_grad():
        expected = exact.velocity(sample.bfloat16(), sigma, double)
        found = {name: policy.velocity(sample, sigma, text) for name, policy in half.items()}
    errors = {n: float((v.double() - expected).square().mean().sqrt()) for n, v in found.items()}
    assert found["ours"].dtype == torch.bfloat16 and expected.dtype == torch.float64
    assert 1e-5 < errors["ours"] <= 1.02 * errors["theirs"]


TRAINED = {
    "plain": {},
    "bfloat16, guidance and guard": {
        "policy.dtype": "bfloat16",
        "sample.guidance_scale": 3.0,
        "optim.guard": True,
        "optim.beta": 0.0,
    },
    "recomputed, shared prefix": {
        "policy.gradient_checkpointing": True,
        "sample.shared_noise": True,
        "sample.share_prefix": True,
    },
    "full": {"policy.adapter": "full", "policy.dtype": "auto"},
}


# The plain case is the recomputed one without its recomputation, and every kind's gradients of all
# weights are compared above.
PAIRS = [(kind, case) for kind in KINDS for case in list(TRAINED)[1:3]]
PAIRS += [("sd3.5-medium", "plain"), ("sd3", "full"), ("flux", "full")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "case"), PAIRS)
def test_two_iterations_with_ratio_one(kinds, tmp_path, kind, case):
    model, own = kinds[kind]
    small = {"sample.group_size": 3, "sample.steps": 4}
    config = setups.config(model, tmp_path, **{**small, **own, **FUSED, **TRAINED[case]})
    parts = setups.parts(config)
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0
        assert (metrics.get("kl", 0) > 0) == (config.optim.beta > 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_captured_rollout_has_the_eager_bits(kinds, tmp_path, kind):
    model, own = kinds[kind]
    changes = {"sample.guidance_scale": 2.0, "sample.group_size": 3, "sample.steps": 4}
    parts, config = made(model, tmp_path, **{**own, **FUSED, **changes})
    policy = parts.policy
    for parts.state.iteration in range(2):
        conditioning = policy.encode(setups.TEXTS[:2])
        found = train.collect(parts, conditioning, config)
        assert_equal(found, eager(policy, partial(train.collect, parts, conditioning, config)))
    images = partial(evaluate, policy, scale=2.0)
    assert torch.equal(images(), eager(policy, images))
    assert policy.graphs.recorder.captures == 2


@pytest.mark.slow
def test_nano_trains(tmp_path):
    changes = {"policy.lora_targets": None, "sample.prompts": "nano", "sample.group_size": 2}
    changes |= {"sample.batch_size": 2, "sample.steps": 3, "sample.window_size": 1}
    config = setups.config("nano", tmp_path, **changes, **FUSED)
    parts = setups.parts(config)
    assert "blocks fused" in parts.policy.describe()
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


def test_names_and_the_kept_reference_stay(kinds, tmp_path):
    """Nothing that is saved changes; a copy of the model has its own fused blocks."""
    full = {"policy.adapter": "full"}
    ours = policy_of(kinds, "sd3.5-medium", tmp_path, **full, **FUSED)
    theirs = policy_of(kinds, "sd3.5-medium", tmp_path, **full)
    assert list(ours.transformer.state_dict()) == list(theirs.transformer.state_dict())
    copy = ours._frozen.transformer_blocks[0]
    assert copy.forward.__func__ is sd3_blocks.joint_block and copy.forward.__self__ is copy
    with torch.no_grad(), ours.reference(), theirs.reference():
        close = {"rtol": 1e-5, "atol": 3e-6}
        torch.testing.assert_close(*(p.velocity(*inputs(p)) for p in (ours, theirs)), **close)


class OtherBlock(nn.Module):
    """No block of diffusers."""


@pytest.mark.parametrize(
    ("kind", "name", "module"),
    [
        ("sd3", "transformer_blocks.1", OtherBlock()),
        ("sd3", "transformer_blocks.0.norm2", nn.LayerNorm(16)),
        ("sd3.5-medium", "transformer_blocks.0.norm1", nn.Identity()),
        ("sd3.5-medium", "transformer_blocks.1.attn.norm_added_k", nn.RMSNorm(8, eps=1e-3)),
        ("flux", "single_transformer_blocks.0.attn.norm_q", nn.LayerNorm(16)),
        ("flux", "norm_out.norm", nn.RMSNorm(32)),
    ],
)
def test_unknown_modules(kinds, tmp_path, kind, name, module):
    """One sentence that names the module; nothing is changed."""
    model, own = kinds[kind]
    config = setups.config(model, tmp_path, **own).policy
    transformer = Policy.load(str(model), device="cpu", config=config).transformer
    owner, _, last = name.rpartition(".")
    setattr(transformer.get_submodule(owner), last, module)
    with pytest.raises(ConfigError, match=rf"{name} is a .* set policy.fused to false"):
        blocks.fuse(transformer, family_of(transformer))
    assert "forward" not in vars(transformer.transformer_blocks[0])


def test_not_with_compile():
    with pytest.raises(ConfigError, match=r"policy.compile and policy.fused are both on"):
        PolicyConfig(compile=True, fused=True)
