"""Scouts: what they preview, whom they choose, and that the chosen are sampled as without them."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo import plan, train
from flowgrpo.config import ConfigError, replace
from flowgrpo.objectives import OBJECTIVES, objective_of
from flowgrpo.prompts.batches import prompt_batch, row_seeds
from flowgrpo.recipes import recipe
from flowgrpo.rewards import RewardError
from flowgrpo.sampling.finite import NotFiniteError
from flowgrpo.sampling.rollout import rollout
from flowgrpo.sampling.schedule import Schedule, table_rows, windows
from flowgrpo.sampling.scouts import Scouted, agreement, asking_steps, choose, sample_scouts
from flowgrpo_kernels import initial_noise, ode
from support import setups
from support.processes import untimed

N, G = 9, 6


@pytest.fixture(scope="module")
def made(pixel_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scouts")
    config = setups.config(pixel_model, folder, **{"sample.scouts": N, "sample.window_size": 3})
    return setups.parts(config), config


def send(parts, config):
    batch = prompt_batch(parts.prompts, config, parts.state.iteration)
    conditioning = parts.policy.encode(batch.texts)
    clock = train.Clock(parts.policy.device)
    return train.send_scouts(parts, batch, conditioning, config, clock), conditioning, clock


def previews(parts, table, forwards, schedule=None, **changes):
    """Results of scouts of 12 rows, of two prompts."""
    results = []
    sample_scouts(
        parts.policy,
        parts.policy.encode(setups.TEXTS[:2]),
        schedule or parts.schedule,
        table,
        forwards=forwards,
        groups=torch.arange(12) // 6,
        seeds=torch.arange(12) + 100,
        noise_seeds=torch.arange(12) + 200,
        batch_size=5,
        on_chunk=results.append,
        **changes,
    )
    return torch.cat(results)


def test_models_are_asked_at_even_distances():
    assert asking_steps(10, 1) == (0,)
    assert asking_steps(10, 5) == (0, 2, 4, 6, 8)
    assert asking_steps(7, 3) == (0, 2, 4)
    assert all(asking_steps(t, t) == tuple(range(t)) for t in range(1, 20))


def test_a_scout_that_asks_at_every_step_is_the_rollout(made):
    """Bit for bit, stochastic windows included, also where a chunk is short or left over."""
    parts, config = made
    steps = windows(2, replace(config, **{"sample.scouts": 0}), 3)
    table = table_rows(steps, config.sample.steps)
    expected = rollout(
        parts.policy,
        parts.policy.encode(setups.TEXTS[:2]),
        parts.schedule,
        table,
        groups=torch.arange(12) // 6,
        seeds=torch.arange(12) + 100,
        noise_seeds=torch.arange(12) + 200,
        batch_size=5,
    ).latents[-1]
    assert torch.equal(previews(parts, table, 6), expected)
    assert torch.equal(previews(parts, table, 6, chunk_count=5), expected)
    few = previews(parts, table, 3)
    # The same noise, and a coarser path.
    assert 0 < (few - expected).std() < 0.5 * (expected - expected.flip(0)).std()


@pytest.mark.slow
def test_a_scout_without_noise_is_the_sampler_of_larger_steps(made):
    parts, config = made
    total = config.sample.steps
    table = torch.arange(total)[:, None].expand(-1, 12) + total
    for forwards in (1, 2, 3, 4):
        sigmas = parts.policy.sigmas(total)[[*asking_steps(total, forwards), total]]
        coarse = Schedule(sigmas.float(), ode(sigmas), torch.zeros(forwards))
        own = torch.arange(forwards)[:, None].expand(-1, 12)
        larger_steps = previews(parts, own, forwards, coarse)
        difference = previews(parts, table, forwards) - larger_steps
        assert difference.abs().max() < 2e-5 * larger_steps.abs().max()


def test_the_chosen_are_sampled_as_a_run_without_scouts_samples_their_seeds(made):
    """States, log-probabilities and seeds of the rollout are those of the candidates' seeds."""
    parts, config = made
    scouted, conditioning, clock = send(parts, config)
    assert set(clock.seconds) == {"scout"} and clock.seconds["scout"] > 0
    trajectory = train.collect(parts, conditioning, config, None, scouted)
    seeds, noise_seeds = row_seeds(2, config, 0)
    assert len(seeds) == 2 * N and (scouted.rows // N == torch.arange(12) // G).all()
    assert torch.equal(trajectory.seeds, seeds[scouted.rows])
    start = initial_noise(noise_seeds[scouted.rows], parts.policy.latent_shape)
    assert torch.equal(trajectory.latents[0], start)
    plain = rollout(
        parts.policy,
        conditioning,
        parts.schedule,
        trajectory_table(config, scouted),
        groups=torch.arange(12) // G,
        seeds=seeds[scouted.rows],
        noise_seeds=noise_seeds[scouted.rows],
        batch_size=config.sample.batch_size,
    )
    assert torch.equal(trajectory.latents, plain.latents)
    assert torch.equal(trajectory.log_probs, plain.log_probs)


def trajectory_table(config, scouted):
    return table_rows(windows(2, config, 0)[:, scouted.rows], config.sample.steps)


def test_what_is_chosen_is_the_best_and_the_worst_by_the_reward_of_the_previews(made):
    parts, config = made
    images = []
    score = parts.scorer.score_each

    def listen(pictures, *arguments):
        images.append(pictures)
        return score(pictures, *arguments)

    parts.scorer.score_each = listen
    try:
        scouted, *_ = send(parts, config)
    finally:
        del parts.scorer.score_each
    rewards = setups.bright(torch.cat(images), None, None).view(2, N).double()
    torch.testing.assert_close(scouted.previews, rewards, rtol=0, atol=0)
    order = rewards.argsort(dim=1)
    kept = [set(row.tolist()) for row in torch.cat([order[:, :3], order[:, -3:]], dim=1)]
    chosen = (scouted.rows % N).view(2, G)
    assert [set(row.tolist()) for row in chosen] == kept


rewards_of = st.integers(2, 12).flatmap(
    lambda n: st.tuples(
        st.integers(2, n),
        st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=3),
    )
)


@settings(max_examples=30, deadline=None)
@given(rewards_of)
def test_best_and_worst_are_taken_and_nobody_twice(case):
    """Few values, so many of them equal."""
    count, values = case
    rewards = torch.tensor(values, dtype=torch.float64)
    for row, chosen in zip(values, choose(rewards, count).tolist(), strict=True):
        assert chosen == sorted(set(chosen)) and len(chosen) == count
        descending = sorted(row, reverse=True)
        best, worst = count - count // 2, count // 2
        assert sorted(row[i] for i in chosen) == sorted(
            [*descending[:best], *descending[len(row) - worst :]]
        )


def test_a_group_whose_reward_failed_keeps_its_first_candidates():
    rewards = torch.tensor([[3.0, 1, 2, 0, 5], [9, torch.nan, torch.nan, torch.nan, 0]]).double()
    scouted = Scouted.of(rewards, 3)
    # Two best, one worst; and the first three.
    assert scouted.rows.tolist() == [0, 3, 4, 5, 6, 7]
    described = scouted.describe(torch.tensor([[2.0, 0.0, 4.0], [1.0, 2.0, 3.0]]).double())
    assert described["dropped_groups"] == 1 and described["images"] == 10
    assert math.isclose(described["reward"], 11 / 5)
    # Only the group that was scouted: 3, 0, 5 against 2, 0, 4.
    assert math.isclose(described["agreement"], np.corrcoef([3, 0, 5], [2, 0, 4])[0, 1])


def test_agreement_is_the_correlation_inside_groups():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(2, 4, 6))
    b += a
    inside = [x - x.mean(axis=1, keepdims=True) for x in (a, b)]
    expected = np.corrcoef(inside[0].ravel(), inside[1].ravel())[0, 1]
    shift = np.arange(4)[:, None] * 100.0
    found = agreement(torch.from_numpy(a + shift), torch.from_numpy(b - shift))
    assert math.isclose(found, expected, rel_tol=1e-9) and 0.3 < found < 1
    equal = torch.ones(2, 3, dtype=torch.float64)
    assert agreement(equal, torch.rand(2, 3).double()) is None
    assert agreement(equal * torch.nan, torch.rand(2, 3).double()) is None


@pytest.mark.slow
def test_a_run_counts_its_scouts(pixel_model, tmp_path):
    """In metrics, seconds and summary; one group failed, and is counted."""
    failing = {"reward.weights": {"flowgrpo_test_scouts:moody": 1.0}, "reward.retries": 0}
    changes = {
        "sample.scouts": 8,
        "sample.scout_forwards": 2,
        "sample.guidance_scale": 2.0,
        "run.steps": 1,
        "run.eval_prompts": 1,
        "run.eval_samples": 1,
        "sample.eval_steps": 2,
    }
    module = types.ModuleType("flowgrpo_test_scouts")
    calls = []

    def moody(images, prompts, metadata):
        calls.append(len(images))
        # The first prompt of a chunk that has two.
        scores = setups.bright(images, prompts, metadata)
        first = torch.tensor([p == prompts[0] for p in prompts])
        return torch.where(first & (len(set(prompts)) > 1), torch.nan, scores)

    module.moody = moody
    sys.modules["flowgrpo_test_scouts"] = module
    try:
        config = setups.config(pixel_model, tmp_path, **{**changes, **failing})
        summary = train.run(config)
    finally:
        del sys.modules["flowgrpo_test_scouts"]
    assert summary["scouts"] == 16 and summary["images"] == 12
    assert summary["seconds"]["scout"] > 0 and summary["max_ratio_error"] == 0.0
    [line] = [
        line for line in untimed(Path(config.run.out, "metrics.jsonl")) if line["kind"] == "train"
    ]
    assert {"images", "reward", "reward_std", "agreement", "dropped_groups"} == set(line["scouts"])
    # Chunks of 3: the third of the 16 candidates is of both prompts, none of the 12 images.
    assert line["scouts"]["images"] == 16 and line["scouts"]["dropped_groups"] == 1
    assert line["dropped_groups"] == 0 and line["scouts"]["agreement"] > 0.5
    # Then those of the 12 images, and of two evaluations of one.
    assert sum(calls) == 2 + 1 + 16 + 12 + 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sample.scouts": 6}, "sample.scouts is 6, but the 6 images"),
        ({"sample.scouts": -1}, "sample.scouts is -1, but it must be at least 0"),
        ({"sample.scouts": 9, "sample.scout_forwards": 6}, "less than the 6 steps"),
        ({"sample.scout_forwards": 2}, "sample.scout_forwards is 2 with sample.scouts 0"),
        ({"sample.scouts": 9, "optim.objective": "refl"}, "refl, which does not read it"),
        ({"sample.scouts": 9, "optim.objective": "opd"}, "opd, which does not read it"),
        (
            {"sample.scouts": 9, "optim.objective": "dpo", "sample.curated": "set"},
            "dpo, which does not read it",
        ),
    ],
)
def test_scouts_that_nobody_can_send(pixel_model, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        objective_of(setups.config(pixel_model, tmp_path, **changes))


def test_every_objective_that_compares_rewards_takes_scouts():
    readers = {name for name, row in OBJECTIVES.items() if "sample.scouts" in row.options}
    assert readers == set(OBJECTIVES) - {"opd", "refl"}


def test_previews_that_are_no_numbers_stop_the_run(made):
    parts, config = made
    sigmas = parts.schedule.sigmas.clone()
    sigmas[2] = torch.nan
    broken = dataclasses.replace(parts, schedule=dataclasses.replace(parts.schedule, sigmas=sigmas))
    with pytest.raises(NotFiniteError, match="latents of the previews of iteration 1 are NaN"):
        send(broken, config)


def test_rewards_that_fail_for_all_previews_stop_the_run(made):
    parts, config = made
    score = parts.scorer.score_each
    parts.scorer.score_each = lambda images, *_: {
        "support.setups:bright": torch.full((len(images),), torch.nan).double()
    }
    parts.scorer.problems["support.setups:bright"] = "no answer"
    try:
        with pytest.raises(RewardError, match="failed for all 2 groups"):
            send(parts, config)
    finally:
        parts.scorer.score_each = score


def test_the_plan_says_what_scouts_cost():
    config = recipe("sd35m_ocr", memory=80.0)
    size, steps = config.sample.group_size, config.sample.steps
    assert "scouts" not in plan.plan_lines(config)
    lines = plan.plan_lines(replace(config, **{"sample.scouts": 4 * size}))
    assert f"by {steps // 2} forwards each, 2 x those of the rollout" in lines["scouts"]
    assert f"the best {size - size // 2} and the worst {size // 2}" in lines["scouts"]
