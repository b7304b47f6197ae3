"""Re-noised results: levels, noise, weights; and the objectives that match them, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from flowgrpo import objectives, train
from flowgrpo.config import ConfigError, replace
from flowgrpo.objectives import matching
from flowgrpo.records import Experience
from flowgrpo_kernels import initial_noise
from support import setups
from support.forward_process import (
    SMALL,
    noised,
    prepared,
    record_gradients,
    velocity_of,
    with_rewards,
)

NAMES = ("awm", "sft", "orw")


# Levels and noise


def test_levels_are_spread_evenly_over_a_group_and_over_an_image(pixel_model, tmp_path):
    config = setups.config(pixel_model, tmp_path, **{"optim.levels": 3, **SMALL})
    shares = matching.draw_shares(config, 5)
    assert shares.shape == (3, 12)
    # One image: a draw in each third. One group of six: a draw in each of eighteen stretches.
    assert (np.floor(shares * 3) == np.arange(3)[:, None]).all()
    for group in (shares[:, :6], shares[:, 6:]):
        assert sorted(np.floor(group * 18).flatten()) == list(range(18))
    assert not (np.floor(shares[:, :6] * 18) == np.floor(shares[:, 6:] * 18)).all()
    others = (
        matching.draw_shares(config, 6),
        matching.draw_shares(replace(config, **{"run.seed": 1}), 5),
    )
    assert all((shares != other).all() for other in others)
    assert (shares == matching.draw_shares(config, 5)).all()


def test_levels_follow_the_model_s_schedule(pixel_model, tmp_path):
    components, _, _ = prepared("awm", pixel_model, tmp_path)
    policy = components.policy
    at = matching.levels_at(policy, np.array([[0.0, 0.25, 0.5, 1.0]]))
    sigmas = policy.sigmas(matching.STEPS)
    torch.testing.assert_close(at[0], sigmas[[0, 250, 500, 1000]], rtol=0, atol=1e-12)
    between = matching.levels_at(policy, np.array([0.2505]))
    assert sigmas[251] < between.item() < sigmas[250]


def test_a_batch_is_the_noised_result_and_its_target(pixel_model, tmp_path):
    components, config, experience = prepared("awm", pixel_model, tmp_path, **{"optim.levels": 2})
    schedule, experience = matching.prepare(
        components.policy, components.schedule, experience, config
    )
    draws, results = experience.draws, experience.trajectory.latents[-1]
    assert len(set(draws.seeds.flatten().tolist())) == 24
    assert not set(draws.seeds.flatten().tolist()) & set(experience.trajectory.seeds.tolist())
    batch = matching.gather(schedule, experience, slice(3, 6), range(2))
    for m, (draw, row) in enumerate((d, r) for d in range(2) for r in range(3, 6)):
        noise = initial_noise(draws.seeds[draw, row : row + 1], results.shape[1:])[0].double()
        s, result = draws.sigmas[draw, row].double(), results[row].double()
        torch.testing.assert_close(batch.sample[m].double(), (1 - s) * result + s * noise)
        torch.testing.assert_close(batch.prev_sample[m].double(), noise - result)
        assert batch.sigma[m] == draws.sigmas[draw, row]
        table_row = batch.table_row[m]
        assert schedule.transitions.column("sigma")[table_row] == batch.sigma[m]
        assert batch.advantages[m] == experience.advantages[row]


@pytest.mark.slow
def test_the_rollout_is_deterministic_and_kept_whole(pixel_model, tmp_path):
    """No noise after the first, so it is the sampler of an evaluation; nothing is trained."""
    components, config, experience = prepared("awm", pixel_model, tmp_path)
    trajectory = experience.trajectory
    assert trajectory.trained_steps.shape == (0, 12) and not trajectory.log_probs.any()
    other = replace(config, **{"sample.noise_level": 0.1})
    again = setups.experience(components, other)
    assert torch.equal(trajectory.latents, again.trajectory.latents)


# Losses and gradients


def weight_of(kind, sigma, velocity, target):
    if kind == "normalized":
        return (sigma / (velocity - target).abs().mean()).detach()
    return sigma if kind == "sigma" else 1.0


def expected_terms(name, model, base, then, experience, draws, rows, config):
    """Each sample's loss in float64, written down from the papers."""
    optim, scale = config.optim, config.sample.guidance_scale
    for draw in range(optim.levels):
        for row in rows:
            if experience.weights[row] == 0:
                yield torch.zeros((), dtype=torch.float64)
                continue
            sigma, sample, target = noised(experience, draws, draw, row)
            arguments = (experience, sample, sigma, row, scale)
            velocity = velocity_of(model, *arguments)
            error, gain = (velocity - target).square().mean(), experience.advantages[row].double()
            kl = torch.zeros(())
            if optim.beta > 0:
                with torch.no_grad():
                    reference = velocity_of(base, *arguments)
                kl = (velocity - reference).square().mean()
            with torch.no_grad():
                old = velocity_of(then, *arguments)
            if name == "awm":
                w = weight_of(optim.level_weight, sigma, old, target)
                ratio = torch.exp(w * ((old - target).square().mean() - error))
                gain = gain.clamp(-optim.adv_clip, optim.adv_clip)
                clipped = ratio.clamp(1 - optim.clip_range, 1 + optim.clip_range)
                policy = torch.maximum(-gain * ratio, -gain * clipped)
            else:
                w = weight_of(optim.level_weight, sigma, velocity, target)
                policy = gain * w * error
            yield experience.weights[row].double() * (policy + optim.beta * kl)


THREE = {"sample.prompts_per_iteration": 3, "sample.group_size": 4, "sample.batch_size": 3}
CASES = {
    "awm": ("awm", {}),
    "awm normalized, two levels": ("awm", {"optim.level_weight": "normalized", "optim.levels": 2}),
    "awm guidance, wide clip": (
        "awm",
        {"sample.guidance_scale": 2.5, "optim.clip_range": 0.5, "optim.adv_clip": 0.7},
    ),
    "awm one step": ("awm", {"optim.updates_per_iteration": 1, "optim.beta": 0.0}),
    "awm one step normalized": (
        "awm",
        {"optim.updates_per_iteration": 1, "optim.level_weight": "normalized"},
    ),
    "orw": ("orw", {"optim.tau": 0.3}),
    "orw sigma, beta 0": ("orw", {"optim.level_weight": "sigma", "optim.beta": 0.0}),
    "orw normalized": ("orw", {"optim.level_weight": "normalized", "sample.guidance_scale": 2.0}),
    "sft": ("sft", {"optim.updates_per_iteration": 1, "optim.levels": 2}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(pixel_model, tmp_path, case, monkeypatch):
    """Of every optimizer step, with a dropped group, and for awm with weights that moved since."""
    name, changes = CASES[case]
    changes = {**THREE, "optim.clip_range": 2e-3, "optim.beta": 0.3, **changes}
    components, config, experience = prepared(name, pixel_model, tmp_path, **changes)
    objective, state, optim = components.objective, components.state, config.optim
    experience = with_rewards(experience, objective, config)
    then, base = setups.double_copies(components)
    moves = name == "awm" and optim.updates_per_iteration > 1
    if moves:
        prepare = objective.prepare

        def prepare_and_move(*arguments):
            result = prepare(*arguments)
            with torch.no_grad():
                for number, parameter in enumerate(state.parameters.values()):
                    wave = torch.sin(torch.arange(parameter.numel()) + number)
                    parameter.add_(0.05 * wave.view_as(parameter))
            return result

        row = type(objective)(**{**vars(objective), "prepare": prepare_and_move})
        monkeypatch.setattr(components.micro_step, "objective", row)
    gradients = record_gradients(monkeypatch, state)
    loose = replace(config, **{"optim.ratio_tolerance": 1e9})
    metrics = setups.update(components, experience, loose)
    model, _ = setups.double_copies(components)
    assert (metrics["max_ratio_error"] > 0) == moves
    draws = matching.draw_levels(components.policy, config, experience.iteration)
    rows = [1, 4, 11] if name == "sft" else list(range(12))
    share = len(rows) // optim.updates_per_iteration
    losses = []
    for number, actual in enumerate(gradients):
        model.zero_grad()
        arguments = (name, model, base, then, experience, draws)
        terms = [*expected_terms(*arguments, rows[number * share : (number + 1) * share], config)]
        loss = torch.stack(terms).mean()
        loss.backward()
        losses.append(loss.item())
        expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        ours, theirs = (
            torch.cat([values[name].double().flatten() for name in expected])
            for values in (actual, expected)
        )
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 2e-4 * theirs.norm()
    assert len(losses) == optim.updates_per_iteration
    assert metrics["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4, abs=1e-6)


def test_weights_of_orw_by_hand():
    """Rewards 0, ln 2 and ln 5 at tau 1 count 1, 2 and 5; a dropped group has weight 0."""
    optim = setups_optim(tau=1.0)
    rewards = torch.tensor([[0.0, math.log(2), math.log(5)], [math.nan, 0.0, 1.0]]).double()
    gains, weights = objectives.OBJECTIVES["orw"].weigh(rewards, optim)
    torch.testing.assert_close(gains[:3], torch.tensor([3 / 8, 6 / 8, 15 / 8]))
    assert weights.tolist() == [2.0] * 3 + [0.0] * 3
    huge, _ = objectives.OBJECTIVES["orw"].weigh(torch.tensor([[0.0, 1e6]]), optim)
    assert huge.tolist() == [0.0, 2.0]


def test_weights_of_sft():
    """The first of the best; nothing of a dropped group."""
    rewards = torch.tensor([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5], [math.nan, 2.0, 1.0]]).double()
    gains, weights = objectives.OBJECTIVES["sft"].weigh(rewards, setups_optim())
    assert gains[:6].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    assert weights.tolist() == [1.5] * 6 + [0.0] * 3


def setups_optim(**changes):
    from flowgrpo.config import OptimConfig

    return OptimConfig(**changes)


def test_awm_by_hand():
    """One latent of two elements, whose velocity is a parameter: e, ratio, clip and gradient."""
    from types import SimpleNamespace

    from flowgrpo.config import Config
    from flowgrpo.objectives import awm
    from flowgrpo_kernels import Transitions
    from flowgrpo_kernels import matching as rows

    velocity = torch.tensor([[1.0, 3.0]], requires_grad=True)
    policy = SimpleNamespace(velocity=lambda sample, sigma, conditioning: velocity)
    table = Transitions.cat(rows([0.5], weight=0.5), rows([0.5]))
    config = replace(
        Config(), **{"optim.objective": "awm", "optim.beta": 0.0, "optim.clip_range": 0.25}
    )
    batch = SimpleNamespace(
        sample=torch.zeros(1, 2), prev_sample=torch.tensor([[0.0, 1.0]]), sigma=torch.tensor([0.5]),
        conditioning=None, uncond=None, transitions=table, table_row=torch.tensor([0]),
        advantages=torch.tensor([2.0]), weights=torch.tensor([1.0]),
        # e = (1 + 4) / 2 = 2.5, log p = -1.25; the old one was 0.1 lower.
        old_log_prob=torch.tensor([-1.35]),
    )  # fmt: skip
    out = awm.loss(policy, batch, config)
    assert out.ratio.item() == pytest.approx(math.exp(0.1), rel=1e-6)
    assert out.loss.item() == pytest.approx(-2 * math.exp(0.1), rel=1e-6)
    assert out.metrics["matching_error"].item() == pytest.approx(1.25)
    out.loss.backward()
    # d log p / d v = -0.5 * 2 (v - v*) / 2 elements = (-0.5, -1).
    expected = torch.tensor([[0.5, 1.0]]) * 2 * math.exp(0.1)
    torch.testing.assert_close(velocity.grad, expected)
    velocity.grad = None
    # A ratio of e^0.5 is past the clip of a positive advantage.
    batch.old_log_prob = torch.tensor([-1.75])
    out = awm.loss(policy, batch, config)
    assert out.loss.item() == -2.5 and out.metrics["clip_fraction"] == 1
    out.loss.backward()
    assert not velocity.grad.any()


# Other models, weights and forms


@pytest.mark.parametrize("changes", [{}, {"policy.adapter": "full", "policy.dtype": "auto"}])
@pytest.mark.parametrize("name", NAMES)
def test_lora_and_full(pixel_model, tmp_path, name, changes):
    components, config, experience = prepared(
        name, pixel_model, tmp_path, **{"optim.updates_per_iteration": 2, **changes}
    )
    before = [p.detach().clone() for p in components.state.parameters.values()]
    metrics = setups.update(components, experience, config)
    assert metrics["max_ratio_error"] == 0.0 and metrics["kl"] > 0
    assert all(value > 0 for value in metrics["grad_norm"])
    changed = map(torch.equal, before, components.state.parameters.values())
    assert not all(changed)


FLUX = {"policy.resolution": 16, "policy.max_sequence_length": 4, "policy.text_cache": ""}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("model", "changes"), [("latent_model", {"policy.dtype": "bfloat16"}), ("flux_model", FLUX)]
)
def test_other_families(request, tmp_path, name, model, changes):
    targets = {"policy.lora_targets": ("to_q", "to_v")}
    components, config, experience = prepared(
        name, request.getfixturevalue(model), tmp_path, **targets, **changes
    )
    metrics = setups.update(components, experience, config)
    assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


@pytest.mark.parametrize("name", NAMES)
def test_groups_with_weight_0_move_nothing(pixel_model, tmp_path, name):
    """Not even where their results are no numbers."""
    changes = {"optim.beta": 0.0, "optim.weight_decay": 0.0}
    components, config, experience = prepared(name, pixel_model, tmp_path, **changes)
    silent = Experience(**{**vars(experience), "weights": torch.zeros(12)})
    metrics = setups.update(components, silent, config)
    assert metrics["grad_norm"] == [0.0, 0.0] and metrics["loss"] == 0.0


# Configuration


BAD = {
    "shared noise": ("awm", {"sample.shared_noise": True}, "shared_noise is on .*turn it off"),
    "anchor": ("awm", {"optim.anchor": "replay"}, "optim.anchor is 'replay' with .* awm, .* grpo"),
    "guard": ("sft", {"optim.guard": True}, "optim.guard is True with optim.objective sft"),
    "dppo": ("nft", {"optim.dppo": True}, "optim.dppo is True with optim.objective nft"),
    "tau": ("awm", {"optim.tau": 0.1}, "optim.tau is 0.1 .* leave it at 0.5, or choose one of orw"),
    "levels": ("grpo", {"optim.levels": 2}, "optim.levels is 2 with optim.objective grpo"),
    "shares": ("sft", {"sample.prompts_per_iteration": 3}, "must divide the 3 micro-steps"),
}


@pytest.mark.parametrize("case", BAD)
def test_options_that_do_not_fit(pixel_model, tmp_path, case):
    """Before a model is loaded."""
    name, changes, message = BAD[case]
    config = setups.config("nowhere", tmp_path, **{**SMALL, "optim.objective": name, **changes})
    with pytest.raises(ConfigError, match=message):
        train.setup(config)
