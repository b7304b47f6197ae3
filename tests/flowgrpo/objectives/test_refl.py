"""ReFL: the gradient of the reward through the picture, in float64; which rewards have one."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import train
from flowgrpo.config import ConfigError, RewardConfig
from flowgrpo.objectives import refl
from flowgrpo.rewards import RewardError, load
from flowgrpo.rewards.differentiable import differentiable_rewards
from support import setups
from support.forward_process import prepared, record_gradients, velocity_of, with_rewards

THREE = {
    "sample.prompts_per_iteration": 3,
    "sample.group_size": 4,
    "sample.batch_size": 3,
    "sample.steps": 5,
}


def test_steps_are_drawn_from_the_last(pixel_model, tmp_path):
    components, config, experience = prepared(
        "refl", pixel_model, tmp_path, **{**THREE, "optim.refl_steps": 2}
    )
    assert experience.trajectory.trained_steps.shape == (0, 12)
    steps = []
    for iteration in range(4):
        experience = type(experience)(**{**vars(experience), "iteration": iteration})
        arguments = (components.policy, components.schedule, experience, config)
        steps += refl.prepare(*arguments)[1].trajectory.trained_steps[0].tolist()
    assert set(steps) == {3, 4} and 12 < steps.count(3) < 36


CASES = {
    "plain": {"optim.beta": 0.3},
    "guidance, last step": {
        "sample.guidance_scale": 2.5,
        "optim.refl_steps": 1,
        "optim.beta": 0.0,
        "reward.weights": {"support.setups:bright": -0.5},
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(pixel_model, tmp_path, case, monkeypatch):
    """Both optimizer steps, with a dropped group: the brightness of the predicted picture, whose
    pixels are the latents of this model."""
    components, config, experience = prepared(
        "refl", pixel_model, tmp_path, **{**THREE, **CASES[case]}
    )
    experience = with_rewards(experience, components.objective, config)
    model, base = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    metrics = setups.update(components, experience, config)
    arguments = (components.policy, components.schedule, experience, config)
    steps = refl.prepare(*arguments)[1].trajectory.trained_steps[0].tolist()
    [weight] = config.reward.weights.values()
    losses, scale = [], config.sample.guidance_scale
    for number, actual in enumerate(gradients):
        terms = []
        for row in range(6 * number, 6 * number + 6):
            sample = experience.trajectory.latents[steps[row], row : row + 1].double()
            sigma = components.schedule.sigmas[steps[row]].double()
            inputs = (experience, sample, sigma, row, scale)
            velocity = velocity_of(model, *inputs)
            picture = ((sample - sigma * velocity) / 2 + 0.5).clamp(0, 1)
            with torch.no_grad():
                reference = velocity_of(base, *inputs)
            kl = (velocity - reference).square().mean()
            value = -weight * picture.mean() + config.optim.beta * kl
            terms.append(experience.weights[row].double() * value)
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


FLUX = {"policy.resolution": 16, "policy.max_sequence_length": 4, "policy.text_cache": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"), [("latent_model", {"policy.dtype": "bfloat16"}), ("flux_model", FLUX)]
)
def test_through_a_decoder(request, tmp_path, model, changes):
    """The gradient comes through the VAE, whose weights get none."""
    targets = {"policy.lora_targets": ("to_q", "to_v")}
    folder = request.getfixturevalue(model)
    components, config, experience = prepared("refl", folder, tmp_path, **targets, **changes)
    assert min(setups.update(components, experience, config)["grad_norm"]) > 0
    assert all(p.grad is None for p in components.policy.pipeline.vae.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(("adapter", "lr"), [("lora", 3e-2), ("full", 3e-3)])
def test_brightness_is_learned(pixel_model, tmp_path, adapter, lr):
    changes = {"policy.adapter": adapter, "optim.objective": "refl", "optim.beta": 0.0}
    short = {"run.steps": 6, "run.eval_every": 0, "run.checkpoint_every": 0, "optim.lr": lr}
    small = {"sample.steps": 4, "sample.eval_steps": 4, "optim.ema_decay": 0.0}
    summary = train.run(setups.config(pixel_model, tmp_path, **changes, **short, **small))
    assert summary["after"]["interval"][0] > summary["before"]["interval"][1]


def dark(images, prompts, metadata):
    """A reward without a gradient."""
    return -images.float().mean((1, 2, 3))


BAD = {
    "no gradient": (
        {"reward.weights": {"test_refl:dark": 1.0}},
        "reward 'test_refl:dark' passes no gradient on to the pixels",
    ),
    "normalised": ({"reward.normalize": "std"}, "reward.normalize is 'std' with optim.objective"),
    "captured": ({"optim.capture": "on"}, "optim.capture is on with optim.objective refl"),
    "too many": ({"optim.refl_steps": 7}, "optim.refl_steps is 7, but a rollout has 6 steps"),
    "same noise": ({"sample.shared_noise": True}, "sample.shared_noise is on"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit(tmp_path, case):
    """Before a model is loaded."""
    changes, message = BAD[case]
    config = setups.config("nowhere", tmp_path, **{"optim.objective": "refl", **changes})
    with pytest.raises(ConfigError, match=message):
        train.setup(config)


def test_rewards_by_weight():
    assert [weight for weight, _ in differentiable_rewards(setups_rewards(2.0))] == [2.0]
    with pytest.raises(RewardError, match="jpeg_compressibility' passes no gradient"):
        differentiable_rewards(RewardConfig(weights={"jpeg_compressibility": 1.0}))


def setups_rewards(weight):
    return RewardConfig(weights={"support.setups:bright": weight})


def test_the_function_of_pixels_is_the_reward(tmp_path):
    """For whole numbers both give the same score."""
    reward = load("support.setups:bright")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 8, 8), generator=generator, dtype=torch.uint8)
    expected = reward(images, [""] * 3, [{}] * 3)
    torch.testing.assert_close(reward.of_pixels(images.float(), [""] * 3, [{}] * 3), expected)
