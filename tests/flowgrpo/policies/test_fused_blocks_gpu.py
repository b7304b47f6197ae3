"""Fused blocks of every kind on a GPU: diffusers' velocity, exact ratios, captured bits."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from support import setups
from support.cpu_graphs import assert_equal, eager, evaluate

pytestmark = pytest.mark.gpu

KINDS = ("sd3.5-medium", "sd3", "flux", "flux2", "zimage")


def made(kinds, kind, folder, **changes):
    model, own = kinds[kind]
    options = {"policy.device": "cuda", "policy.dtype": "bfloat16", **own, **changes}
    config = setups.config(model, folder, **options)
    return setups.parts(config), config


@pytest.mark.parametrize("kind", KINDS)
def test_the_velocity_is_diffusers_own(kinds, tmp_path, kind):
    found = []
    for fused in (True, False):
        changes = {"policy.fused": fused, "policy.dtype": "float32"}
        policy = made(kinds, kind, tmp_path, **changes)[0].policy
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(3, *policy.latent_shape, generator=generator).cuda()
        sigma = torch.tensor([1.0, 0.5, 0.1]).cuda()
        velocity = policy.velocity(sample, sigma, policy.encode(setups.TEXTS[:3]))
        velocity.square().sum().backward()
        found.append((velocity.detach(), [p.grad for p in policy.parameters()]))
    (velocity, grads), (expected, own) = found
    # TF32 is off by default, so both are float32 throughout.
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=2e-5)
    for one, other in zip(grads, own, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("capture", ["off", "on"])
@pytest.mark.parametrize("kind", KINDS)
def test_training(kinds, tmp_path, kind, capture):
    """Captured and eager rollouts are equal, and each iteration's first ratios are 1."""
    changes = {"policy.fused": True, "sample.capture": capture, "optim.capture": capture}
    parts, config = made(kinds, kind, tmp_path, **changes, **{"sample.guidance_scale": 2.0})
    policy = parts.policy
    for parts.state.iteration in range(3):
        experience = setups.experience(parts, config)
        again = eager(policy, partial(setups.experience, parts, config))
        assert_equal(experience.trajectory, again.trajectory)
        metrics = setups.update(parts, experience.to(policy.device), config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0
    images = partial(evaluate, policy, scale=2.0)
    assert torch.equal(images(), eager(policy, images))
