"""DiffusionNFT: its loss by hand and in float64, and the old policy that samples."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch

from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.objectives import matching, nft
from flowgrpo.objectives.table import OBJECTIVES
from flowgrpo.runs.state import State
from support import setups
from support.forward_process import (
    noised,
    prepared,
    record_gradients,
    velocity_of,
    with_rewards,
)

THREE = {"sample.prompts_per_iteration": 3, "sample.group_size": 4, "sample.batch_size": 3}


def by_hand(advantage, weight=1.0, **changes):
    """A latent of two elements at sigma 1/2 with x_0 = 0, x_s = (1, 2), v = (1, 3), v_old = (2, 2);
    the velocity is a parameter."""
    velocity = torch.tensor([[1.0, 3.0]], requires_grad=True)
    policy = SimpleNamespace(velocity=lambda sample, sigma, conditioning: velocity)
    batch = SimpleNamespace(
        sample=torch.tensor([[1.0, 2.0]]), prev_sample=torch.zeros(1, 2),
        sigma=torch.tensor([0.5]), old_velocity=torch.tensor([[2.0, 2.0]]),
        advantages=torch.tensor([advantage]), weights=torch.tensor([weight]),
        conditioning=None, uncond=None,
    )  # fmt: skip
    changes = {"optim.objective": "nft", "optim.beta": 0.0, **changes}
    out = nft.loss(policy, batch, replace(Config(), **changes))
    out.loss.backward()
    return out, velocity.grad[0].tolist()


def test_loss_and_gradient_by_hand():
    """beta 1: v+ = v = (1, 3) and v- = (3, 1), so x+ = (1/2, 1/2) and x- = (-1/2, 3/2).

    Means of |x| are 1/2 and 1, of x^2 1/4 and 5/4: e+ = 1/2, e- = 5/4. With advantage 2.5 of at
    most 5, r = 3/4, and the loss is 5 (3/4 1/2 + 1/4 5/4). Of the velocity, e+ has the derivative
    x+ (-1/2) / (1/2) and e- x- (1/2) / 1.
    """
    out, gradient = by_hand(2.5)
    assert out.loss.item() == pytest.approx(5 * (0.75 * 0.5 + 0.25 * 1.25))
    expected = [5 * (0.75 * -0.5 + 0.25 * -0.25), 5 * (0.75 * -0.5 + 0.25 * 0.75)]
    assert gradient == pytest.approx(expected)
    assert out.metrics["positive_error"] == 0.5 and out.metrics["negative_error"] == 1.25
    assert out.metrics["old_deviation"] == 1.0 and out.ratio is None
    worse, _ = by_hand(-100.0)
    assert worse.loss.item() == pytest.approx(5 * 1.25)


def test_beta_by_hand():
    """beta 1/2: v+ = (3/2, 5/2), v- = (5/2, 3/2), x+ = (1/4, 3/4), x- = (-1/4, 5/4), and the loss
    is divided by beta; adv_clip 1 leaves r = 1 of advantage 2.5."""
    out, gradient = by_hand(2.5, **{"optim.nft_beta": 0.5, "optim.adv_clip": 1.0})
    error = (1 / 16 + 9 / 16) / 2 / (1 / 2)
    assert out.loss.item() == pytest.approx(2 * error)
    # d e+ / d v = x+ (-1/4) / (1/2), twice that.
    assert gradient == pytest.approx([-0.25, -0.75])


def test_a_row_of_weight_0_has_no_gradient():
    out, gradient = by_hand(2.5, weight=0.0)
    assert out.loss == 0 and gradient == [0.0, 0.0]


CASES = {
    "plain": {},
    "guidance, two levels": {"sample.guidance_scale": 2.5, "optim.levels": 2},
    "beta 0, small": {"optim.beta": 0.0, "optim.nft_beta": 0.3, "optim.adv_clip": 0.7},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(pixel_model, tmp_path, case, monkeypatch):
    """Of both optimizer steps, with a dropped group and an old policy that lags, in float64."""
    changes = {**THREE, "optim.beta": 0.3, **CASES[case]}
    components, config, _ = prepared("nft", pixel_model, tmp_path, **changes)
    state, optim = components.state, config.optim
    generator = torch.Generator().manual_seed(7)
    for weight in state.old.weights.values():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    experience = with_rewards(setups.experience(components, config), components.objective, config)
    model, base = setups.double_copies(components)
    with state.rollout_weights():
        old, _ = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, state)
    metrics = setups.update(components, experience, config)
    assert metrics["max_ratio_error"] == 0.0 and metrics["old_deviation"] > 0
    draws = matching.draw_levels(components.policy, config, experience.iteration)
    losses, scale = [], config.sample.guidance_scale
    for number, actual in enumerate(gradients):
        terms = []
        for draw in range(optim.levels):
            for row in range(6 * number, 6 * number + 6):
                if experience.weights[row] == 0:
                    terms.append(torch.zeros((), dtype=torch.float64))
                    continue
                sigma, sample, target = noised(experience, draws, draw, row)
                arguments = (experience, sample, sigma, row, scale)
                velocity = velocity_of(model, *arguments)
                with torch.no_grad():
                    v_old, v_ref = (velocity_of(net, *arguments) for net in (old, base))
                x0 = sample - sigma * target
                errors = []
                for side in (optim.nft_beta, -optim.nft_beta):
                    x = sample - sigma * ((1 - side) * v_old + side * velocity)
                    scale_x = (x - x0).detach().abs().mean().clamp(min=1e-5)
                    errors.append((x - x0).square().mean() / scale_x)
                bound = optim.adv_clip
                gain = experience.advantages[row].double()
                r = ((gain.clamp(-bound, bound) / bound) / 2 + 0.5).clamp(0, 1)
                policy = (r * errors[0] + (1 - r) * errors[1]) / optim.nft_beta * bound
                kl = (velocity - v_ref).square().mean()
                terms.append(experience.weights[row].double() * (policy + optim.beta * kl))
        model.zero_grad()
        loss = torch.stack(terms).mean()
        loss.backward()
        losses.append(loss.item())
        expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        ours, theirs = (
            torch.cat([values[name].double().flatten() for name in expected])
            for values in (actual, expected)
        )
        assert theirs.norm() > 0 and (ours - theirs).norm() < 2e-4 * theirs.norm()
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)


@pytest.mark.slow
def test_it_is_awm_where_the_old_policy_is_the_trained_one(pixel_model, tmp_path, monkeypatch):
    """The gradient is then that of A e with the normaliser as weight: the first of an iteration."""
    gradients = {}
    one = {"optim.updates_per_iteration": 1, "optim.beta": 0.0}
    for name, changes in (("nft", {}), ("awm", {"optim.level_weight": "normalized"})):
        components, config, experience = prepared(name, pixel_model, tmp_path, **one, **changes)
        if name == "nft":
            components.state.old.follow(0)
            experience = setups.experience(components, config)
        found = record_gradients(monkeypatch, components.state)
        setups.update(components, experience, config)
        gradients[name] = torch.cat([g.flatten() for g in found[0].values()])
    # d/dA of c (r e+ + (1 - r) e-) is (e+ - e-) / 2, of which both halves move v alike.
    torch.testing.assert_close(gradients["nft"], gradients["awm"], rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"policy.adapter": "full", "policy.dtype": "auto"}])
def test_the_old_policy_samples_and_follows(pixel_model, tmp_path, changes):
    """Its weights make the rollout, the trained ones come back with their bits, and after an
    iteration of two updates it keeps 2 rise of itself."""
    changes = {"optim.old_decay_rise": 0.125, "optim.old_decay": 0.3, **changes}
    components, config, _ = prepared("nft", pixel_model, tmp_path, **changes)
    state, parameters = components.state, components.state.parameters
    trained = {name: p.detach().clone() for name, p in parameters.items()}
    lagged = setups.experience(components, config).trajectory.latents
    assert all(torch.equal(p, trained[name]) for name, p in parameters.items())
    with state.rollout_weights():
        assert all(torch.equal(p, state.old.weights[name]) for name, p in parameters.items())
        old = setups.experience(components, config).trajectory.latents
    assert torch.equal(lagged, old)
    before = {name: weight.clone() for name, weight in state.old.weights.items()}
    experience = setups.experience(components, config)
    setups.update(components, experience, config)
    moved = False
    for name, parameter in parameters.items():
        expected = 0.25 * before[name] + 0.75 * parameter.detach()
        torch.testing.assert_close(state.old.weights[name], expected, rtol=1e-5, atol=1e-6)
        moved |= not torch.equal(state.old.weights[name], parameter)
    assert moved
    state.updates = 100
    before = {name: weight.clone() for name, weight in state.old.weights.items()}
    state.follow()
    for name, parameter in parameters.items():
        expected = 0.3 * before[name] + 0.7 * parameter.detach()
        torch.testing.assert_close(state.old.weights[name], expected, rtol=1e-5, atol=1e-6)
    state.updates = 0
    state.follow()
    assert all(torch.equal(state.old.weights[name], p) for name, p in parameters.items())


def test_an_error_in_a_rollout_leaves_the_trained_weights(pixel_model, tmp_path):
    components, _, _ = prepared("nft", pixel_model, tmp_path)
    trained = [p.detach().clone() for p in components.state.parameters.values()]
    with pytest.raises(KeyError), components.state.rollout_weights():
        raise KeyError
    assert all(map(torch.equal, trained, components.state.parameters.values()))


def test_only_nft_has_an_old_policy(pixel_model, tmp_path):
    assert [name for name, row in OBJECTIVES.items() if row.old_policy] == ["nft"]
    model = torch.nn.Linear(2, 2)
    optim = setups.config(pixel_model, tmp_path).optim
    assert State.create(model, optim).old is None
    assert "old" not in State.create(model, optim).tensors()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.old_decay": 1.0}, "old_decay 1.0, but each must be at least 0 and below 1"),
        ({"optim.old_decay_rise": -1.0}, "optim.old_decay_rise is -1.0"),
        ({"optim.nft_beta": 0.0}, "optim.nft_beta is 0.0, but it must be greater than 0"),
        ({"optim.nft_beta": math.nan}, "optim.nft_beta is nan"),
    ],
)
def test_bad_options(pixel_model, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        setups.config(pixel_model, tmp_path, **changes)


FLUX = {"policy.resolution": 16, "policy.max_sequence_length": 4, "policy.text_cache": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"), [("latent_model", {"policy.dtype": "bfloat16"}), ("flux_model", FLUX)]
)
def test_other_families(request, tmp_path, model, changes):
    targets = {"policy.lora_targets": ("to_q", "to_v")}
    folder = request.getfixturevalue(model)
    components, config, experience = prepared("nft", folder, tmp_path, **targets, **changes)
    metrics = setups.update(components, experience, config)
    assert min(metrics["grad_norm"]) > 0 and dataclasses.asdict(config.optim)["nft_beta"] == 1.0
