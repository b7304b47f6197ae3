"""Rollouts: windows, ODE steps outside them, seeds, geometry."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import train
from flowgrpo.config import replace
from flowgrpo.sampling.rollout import chunks, rollout, sample_images
from flowgrpo.sampling.schedule import (
    ode_schedule,
    step_weights,
    table_rows,
    training_schedule,
    windows,
)
from support import setups


@pytest.fixture(scope="module")
def made(pixel_model, tmp_path_factory):
    config = setups.config(pixel_model, tmp_path_factory.mktemp("rollout"))
    return setups.parts(config), config


def run(made, positions, rows=12, **changes):
    """A rollout of `rows` rows, all of prompt 0 and 1 in turn, with the windows `positions`."""
    parts, config = made
    arguments = {
        "groups": torch.arange(rows) // 6,
        "seeds": torch.arange(rows) + 100,
        "batch_size": 3,
        "trained_steps": positions,
        **changes,
    }
    conditioning = parts.policy.encode(setups.TEXTS[:2])
    table = table_rows(positions, config.sample.steps)
    return rollout(parts.policy, conditioning, parts.schedule, table, **arguments)


def window(*starts: int, length: int = 2) -> torch.Tensor:
    return torch.tensor(starts)[None, :] + torch.arange(length)[:, None]


def test_windows_are_drawn_once_a_group_and_uniformly(pixel_model, tmp_path):
    changes = {"sample.window_range": (1, 5), "sample.window_size": 2}
    config = setups.config(pixel_model, tmp_path, **changes)
    drawn = torch.stack([windows(4, config, i).view(2, 4, 6) for i in range(200)])
    assert (drawn == drawn[..., :1]).all() and (drawn[:, 1] == drawn[:, 0] + 1).all()
    counts = torch.bincount(drawn[:, 0, :, 0].flatten(), minlength=6)
    assert counts[[0, 4, 5]].tolist() == [0, 0, 0]
    assert all(200 < n < 333 for n in counts[1:4].tolist())
    assert torch.equal(windows(2, config, 7), windows(4, config, 7)[:, :12])
    other = replace(config, **{"run.seed": 1})
    assert any(not torch.equal(windows(4, config, i), windows(4, other, i)) for i in range(5))


def test_window_size_0_trains_all_steps_but_the_last(pixel_model, tmp_path):
    config = setups.config(pixel_model, tmp_path, **{"sample.window_size": 0})
    positions = windows(2, config, 0)
    assert torch.equal(positions, torch.arange(5)[:, None].expand(5, 12))
    assert table_rows(positions, 6)[:, 0].tolist() == [0, 1, 2, 3, 4, 11]


def test_outside_the_window_steps_are_ode_steps(made):
    parts, _ = made
    positions = window(*[0] * 3, *[1] * 3, *[4] * 3, *[2] * 3)
    found = run(made, positions)
    sigmas = parts.schedule.sigmas
    for row, start in enumerate(positions[0].tolist()):
        for i in range(6):
            inside = start <= i < start + 2
            assert (found.log_probs[i, row] != 0).item() == inside
            if i == 5 and not inside:
                # The last state of a row is x + dt v at the state before it.
                part = slice(row // 3 * 3, row // 3 * 3 + 3)
                velocity = parts.policy.velocity(
                    found.latents[5, part],
                    sigmas[5].expand(3),
                    parts.policy.encode(setups.TEXTS[:2]).rows(found.groups[part]),
                )[row % 3]
                x = found.latents[5, row] + (sigmas[6] - sigmas[5]) * velocity
                torch.testing.assert_close(found.latents[6, row], x, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.trained_steps, positions)
    assert torch.equal(found.table_rows, positions)


@pytest.mark.slow
def test_mixed_windows_equal_each_groups_own_batch(made):
    """Rows with window a in a mixed batch have the bits of a batch whose rows all have window a."""
    mixed = run(made, window(*[0, 3] * 6))
    for start in (0, 3):
        alone = run(made, window(*[start] * 12))
        rows = slice(start // 3, None, 2)
        assert torch.equal(mixed.latents[:, rows], alone.latents[:, rows])
        assert torch.equal(mixed.log_probs[:, rows], alone.log_probs[:, rows])
    assert not torch.equal(mixed.latents[6], run(made, window(*[3] * 12)).latents[6])


def test_noise_belongs_to_the_sample(made):
    """A row keeps its noise when the rows around it change."""
    base = run(made, window(*[1] * 12))
    seeds = torch.arange(12) + 100
    seeds[::2] += 1000
    changed = run(made, window(*[1] * 12), seeds=seeds)
    assert torch.equal(base.latents[:, 1::2], changed.latents[:, 1::2])
    assert (base.latents[0, ::2] != changed.latents[0, ::2]).any()


def test_shared_initial_noise(made):
    shared = torch.arange(12) // 6
    found = run(made, window(*[1] * 12), noise_seeds=shared)
    x = found.latents.view(7, 2, 6, -1)
    assert torch.equal(x[0], x[0][:, :1].expand_as(x[0]))
    # The ODE step before the window keeps the rows together, the first SDE step parts them.
    torch.testing.assert_close(x[1], x[1][:, :1].expand_as(x[1]), rtol=0, atol=1e-6)
    assert (x[2][:, 0] - x[2][:, 1]).abs().amax() > 0.01


def test_only_the_result_is_kept_when_asked(made):
    found = run(made, window(*[1] * 12))
    short = run(made, window(*[1] * 12), keep_states=False)
    assert short.latents.shape[0] == 2
    assert torch.equal(short.latents[-1], found.latents[-1])
    assert torch.equal(short.log_probs, found.log_probs)


def test_sampling_is_the_ode_and_batches_do_not_mix(made):
    parts, _ = made
    conditioning = parts.policy.encode(setups.TEXTS[:3])
    arguments = {"steps": 5, "groups": torch.tensor([0, 1, 2, 0, 1]), "batch_size": 2}
    seeds = torch.arange(5)
    images = sample_images(parts.policy, conditioning, seeds=seeds, **arguments)
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 8, 8)
    again = sample_images(parts.policy, conditioning, seeds=seeds, **{**arguments, "batch_size": 5})
    assert (images.int() - again.int()).abs().amax() <= 1
    assert ode_schedule(parts.policy, 5).transitions.deterministic


def test_chunks_cover_the_rows_in_order():
    assert chunks(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert chunks(6, 3) == [slice(0, 3), slice(3, 6)]


@pytest.mark.parametrize("transition", ["flow_sde", "dance_sde", "cps"])
def test_step_weights_equalise_the_gradient(made, transition):
    """Weight x |d log_prob / d v| is the same for every trained step: B / C x C / |B|."""
    parts, config = made
    config = replace(config, **{"sample.transition": transition, "sample.window_size": 0})
    plan = training_schedule(parts.policy, config.sample)
    b, c, k = plan.transitions.table[:5, 1:4].double().unbind(1)
    weights = plan.weights[:5].double()
    torch.testing.assert_close(weights.mean(), torch.ones((), dtype=torch.float64))
    if transition != "cps":
        scale = weights * 2 * k * b.abs() * c
        torch.testing.assert_close(scale, scale[:1].expand_as(scale))
    assert torch.equal(step_weights(plan.transitions, 0, 5)[:5], plan.weights[:5])


@pytest.mark.slow
def test_collect_uses_the_iteration(made):
    parts, config = made
    conditioning = parts.policy.encode(setups.TEXTS[:2])
    one = train.collect(parts, conditioning, config)
    assert torch.equal(one.latents, train.collect(parts, conditioning, config).latents)
    parts.state.iteration += 1
    other = train.collect(parts, conditioning, config)
    parts.state.iteration -= 1
    assert len(set(one.seeds.tolist()) & set(other.seeds.tolist())) == 0
