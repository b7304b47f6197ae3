"""Advantages against flow_grpo's formula, and their edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo.config import OptimConfig
from flowgrpo.objectives.advantages import advantages


def rewards(k: int = 5, g: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(k, g, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_values(std):
    """(r - mean of the group) / (population std + 1e-4), as flow_grpo's PerPromptStatTracker."""
    given = rewards()
    r = given.numpy()
    scale = {"group": r.std(1, keepdims=True) + 1e-4, "global": r.std() + 1e-4, "none": 1.0}[std]
    expected = (r - r.mean(1, keepdims=True)) / scale
    found, weights = advantages(given, OptimConfig(advantage_std=std))
    assert found.dtype == weights.dtype == torch.float32 and found.shape == (35,)
    np.testing.assert_allclose(found.numpy(), expected.reshape(-1), rtol=1e-6, atol=1e-7)
    assert torch.equal(weights, torch.ones(35))


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1 / 3, -1e9])
def test_equal_rewards_give_exactly_zero(std, value):
    """Also where the mean of equal numbers is not the number, as for 0.1."""
    given = rewards()
    given[2] = value
    found, weights = advantages(given, OptimConfig(advantage_std=std))
    assert (found.view(5, 7)[2] == 0).all() and (found.view(5, 7)[[0, 1, 3, 4]] != 0).all()
    assert (weights == 1).all()


@pytest.mark.parametrize("std", ["group", "global", "none"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_failed_group_is_dropped(std, bad):
    given = rewards()
    given[1, 3] = bad
    config = OptimConfig(advantage_std=std)
    found, weights = advantages(given, config)
    alone, _ = advantages(given[[0, 2, 3, 4]], config)
    kept = torch.tensor([True, False, True, True, True]).repeat_interleave(7)
    assert torch.equal(found[kept], alone)
    assert (found[~kept] == 0).all() and (weights[~kept] == 0).all()
    torch.testing.assert_close(weights[kept], torch.full((28,), 1.25))


def test_all_groups_failed():
    for std in ("group", "global", "none"):
        nothing = torch.full((2, 3), torch.nan)
        found, weights = advantages(nothing, OptimConfig(advantage_std=std))
        assert (found == 0).all() and (weights == 0).all()


def test_shift_and_scale_do_not_matter():
    given = rewards()
    one, _ = advantages(given, OptimConfig())
    other, _ = advantages(1000 * given + 12345, OptimConfig())
    torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-4)


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"rewards has shape \(3,\), but \[K, G\]"):
        advantages(torch.zeros(3), OptimConfig())
