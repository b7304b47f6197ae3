"""The rollout that shares the steps before a window."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import train
from flowgrpo.config import replace
from flowgrpo.sampling import shared_prefix
from support import setups

SHARED = {"sample.shared_noise": True, "sample.prompts_per_iteration": 4}
THREE = {"sample.group_size": 3}
CASES = {
    "plain": {},
    "guidance and guard": {"sample.guidance_scale": 3.0, "optim.guard": True},
    "bfloat16": {"policy.dtype": "bfloat16"},
    "chunks across groups": {"sample.batch_size": 2},
    "one late step": {"sample.window_size": 1, "sample.window_range": (2, 6)},
}


def both(parts, config):
    """(shared, plain): the same iteration by both rollouts."""
    conditioning = parts.policy.encode(setups.TEXTS[:4])
    plain = replace(config, **{"sample.share_prefix": False})
    return tuple(train.collect(parts, conditioning, c) for c in (config, plain))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_plain_rollout_but_for_rounding(pixel_model, tmp_path, case):
    """Every state and log-probability, and the velocities of trained steps, for Guard."""
    config = setups.config(pixel_model, tmp_path, **{**SHARED, **THREE, **CASES[case]})
    parts, starts = setups.parts(config), set()
    close = {"rtol": 0, "atol": 2e-2 if case == "bfloat16" else 1e-5}
    for parts.state.iteration in range(2):
        shared, plain = both(parts, config)
        starts |= set(shared.trained_steps[0].tolist())
        torch.testing.assert_close(shared.latents, plain.latents, **close)
        # A log-probability is a squared deviation over 2 C^2, which is small in late steps.
        torch.testing.assert_close(shared.log_probs, plain.log_probs, rtol=1e-4, atol=1e-3)
        for name in ("trained_steps", "table_rows", "groups", "seeds"):
            assert torch.equal(getattr(shared, name), getattr(plain, name))
        if config.optim.guard:
            place, row = shared.trained_steps, torch.arange(12).expand_as(shared.trained_steps)
            trained = (x.velocities[place, row] for x in (shared, plain))
            torch.testing.assert_close(*trained, **close)
    assert len(starts) > 2


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ratios_are_exactly_one(pixel_model, tmp_path, case):
    config = setups.config(pixel_model, tmp_path, **{**SHARED, **THREE, **CASES[case]})
    parts = setups.parts(config)
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0


@pytest.mark.slow
def test_fewer_rows_go_through_the_model(pixel_model, tmp_path):
    """Before its window a group is one row; a window's forwards have whole chunks. Forwards of 3, 2
    and 1 rows hold what there is, so that no number of rows is new."""
    config = setups.config(pixel_model, tmp_path, **SHARED)
    parts, rows = setups.parts(config), []
    parts.policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    conditioning = parts.policy.encode(setups.TEXTS[:4])
    found = train.collect(parts, conditioning, config)
    starts = found.trained_steps[0, ::6]
    assert starts.max() > 0
    assert sum(rows) == int((starts + 6 * (6 - starts)).sum()) < 24 * 6
    assert max(rows) == config.sample.batch_size
    group = found.latents.view(7, 4, 6, -1)
    for k, start in enumerate(starts.tolist()):
        alike = group[: start + 1, k, :1].expand(-1, 6, -1)
        assert torch.equal(group[: start + 1, k], alike)
        assert not torch.equal(group[start + 1, k, 0], group[start + 1, k, 1])


def test_forwards_have_few_sizes(pixel_model, tmp_path):
    """24 rows at once: 4 to 1 groups are filled up to 6 or 3, rows behind a window to 12 or 24."""
    changes = {**SHARED, "sample.batch_size": 24, "optim.updates_per_iteration": 1}
    config = setups.config(pixel_model, tmp_path, **changes)
    parts, rows = setups.parts(config), []
    parts.policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    train.collect(parts, parts.policy.encode(setups.TEXTS[:4]), config)
    assert shared_prefix.forward_sizes(24, 4) == [3, 6, 12, 24] and set(rows) <= {3, 6, 12, 24}
    assert {24} < set(rows) and min(rows) <= 6
    # A compiled model has one: each number of rows is compiled by itself.
    rows.clear()
    parts.policy.compiled = True
    train.collect(parts, parts.policy.encode(setups.TEXTS[:4]), config)
    assert set(rows) == {24}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"sample.share_prefix": False},
        {"sample.shared_noise": False},
        {"sample.window_size": 0},
    ],
)
def test_where_nothing_is_shared_it_is_not_used(pixel_model, tmp_path, changes, monkeypatch):
    config = setups.config(pixel_model, tmp_path, **{**SHARED, **changes})
    parts = setups.parts(config)
    monkeypatch.setattr(train, "rollout_shared_prefix", None)
    found = train.collect(parts, parts.policy.encode(setups.TEXTS[:4]), config)
    assert found.latents.isfinite().all() and len(found.latents) == config.sample.steps + 1


def test_results_come_chunk_by_chunk(pixel_model, tmp_path):
    changes = {**SHARED, "sample.batch_size": 8, "optim.updates_per_iteration": 1}
    config = setups.config(pixel_model, tmp_path, **changes)
    parts = setups.parts(config)
    seen = []

    class Collector:
        def add(self, images):
            seen.append(images)

    found = train.collect(parts, parts.policy.encode(setups.TEXTS[:4]), config, Collector())
    assert [len(images) for images in seen] == [8, 8, 8]
    assert torch.equal(torch.cat(seen), parts.policy.decode(found.latents[-1]))
