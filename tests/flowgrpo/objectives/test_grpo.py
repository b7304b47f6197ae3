"""The loss of grpo, over a whole update, against flow_grpo's formulas in float64 autograd."""

from __future__ import annotations

import math

import pytest
import torch

from flowgrpo.config import ConfigError, replace
from flowgrpo.records import Experience
from support import setups

CASES = {
    "plain": {},
    "all steps": {"sample.window_size": 0},
    "beta 0": {"optim.beta": 0.0},
    "gaussian KL": {"optim.kl": "gaussian", "optim.beta": 0.3},
    "step weighting": {"optim.step_weighting": "std"},
    "guidance": {"sample.guidance_scale": 2.5},
    "guard": {"optim.guard": True},
    "dance": {"sample.transition": "dance_sde", "sample.noise_level": 0.3},
    "cps": {"sample.transition": "cps", "sample.noise_level": 0.8},
    "dppo": {"optim.dppo": True, "optim.dppo_threshold": 2e-5},
    "dppo, guidance, cps": {
        "optim.dppo": True,
        "optim.dppo_threshold": 1e-4,
        "sample.guidance_scale": 2.5,
        "sample.transition": "cps",
        "sample.noise_level": 0.8,
    },
    "wide clip": {"optim.clip_range": 0.5, "optim.adv_clip": 0.7},
}


def std_and_mean(v, x, s, s_next, sigma_max, config):
    """flow_grpo's sde_step_with_logprob: returned std_dev_t, mean, and std of the noise."""
    dt, a = s_next - s, config.sample.noise_level
    if config.sample.transition == "cps":
        std = s_next * math.sin(a * math.pi / 2)
        x0, x1 = x - s * v, x + v * (1 - s)
        return std, x0 * (1 - s_next) + x1 * math.sqrt(s_next**2 - std**2), std
    std = a
    if config.sample.transition == "flow_sde":
        std = math.sqrt(s / (1 - (sigma_max if s == 1 else s))) * a
    mean = x * (1 + std**2 / (2 * s) * dt) + v * (1 + std**2 * (1 - s) / (2 * s)) * dt
    return std, mean, std * math.sqrt(-dt)


def log_prob(x_next, mean, noise, config):
    squares = (x_next - mean) ** 2
    if config.sample.transition == "cps":
        return -squares.mean()
    full = -squares / (2 * noise**2) - math.log(noise) - math.log(math.sqrt(2 * math.pi))
    return full.mean()


def expected_loss(model, base, parts, experience: Experience, rows, config, masked):
    """Mean of flow_grpo's loss over the rows and their trained steps, in float64; appends to
    `masked` which of them Flow-DPPO leaves out."""
    optim, trajectory = config.optim, experience.trajectory
    sigmas = parts.policy.sigmas(config.sample.steps).tolist()
    terms, rescale = [], {}
    low, high = config.sample.window_bounds
    for i in range(low, high):
        unit = torch.ones(1, dtype=torch.float64, requires_grad=True)
        zero = torch.zeros_like(unit)
        _, mean, noise = std_and_mean(unit, zero, sigmas[i], sigmas[i + 1], sigmas[1], config)
        rescale[i] = noise / abs(torch.autograd.grad(mean.sum(), unit)[0].item())
    average = sum(rescale.values()) / len(rescale)

    def guided(net, row, i):
        text = experience.conditioning.rows(trajectory.groups[row : row + 1])
        velocities = [
            net(
                hidden_states=trajectory.latents[i, row : row + 1].double(),
                timestep=torch.tensor([sigmas[i] * 1000]),
                encoder_hidden_states=c.embeds.double(),
                pooled_projections=c.pooled.double(),
                return_dict=False,
            )[0]
            for c in (text, experience.uncond)
            if c is not None
        ]
        if len(velocities) == 1:
            return velocities[0]
        conditional, uncond = velocities[0], velocities[1].detach()
        return uncond + config.sample.guidance_scale * (conditional - uncond)

    for row in range(rows.start, rows.stop):
        for i in trajectory.trained_steps[:, row].tolist():
            if experience.weights[row] == 0 and not optim.dppo:
                terms.append(torch.zeros((), dtype=torch.float64))
                continue
            x, x_next = (trajectory.latents[j, row : row + 1].double() for j in (i, i + 1))
            step = (sigmas[i], sigmas[i + 1], sigmas[1], config)
            std, mean, noise = std_and_mean(guided(model, row, i), x, *step)
            change = log_prob(x_next, mean, noise, config) - trajectory.log_probs[i, row].double()
            dt = sigmas[i + 1] - sigmas[i]
            if optim.guard:
                old = std_and_mean(trajectory.velocities[i, row : row + 1].double(), x, *step)[1]
                change = (change + ((mean - old) ** 2).mean() / (2 * noise**2)) * noise
            ratio = torch.exp(change)
            gain = experience.advantages[row].double().clamp(-optim.adv_clip, optim.adv_clip)
            clipped = ratio.clamp(1 - optim.clip_range, 1 + optim.clip_range)
            policy = torch.maximum(-gain * ratio, -gain * clipped)
            if optim.dppo:
                old = std_and_mean(trajectory.velocities[i, row : row + 1].double(), x, *step)[1]
                moved = ((mean - old) ** 2).mean().item() / (2 * noise**2)
                far = moved >= optim.dppo_threshold and (gain * change).item() > 0
                masked.append(far)
                policy = torch.zeros(()) if far else -gain * ratio
            if optim.guard:
                policy = policy / -dt
            if optim.step_weighting == "std":
                policy = policy * rescale[i] / average
            kl = torch.zeros(())
            if optim.beta > 0:
                with torch.no_grad():
                    mean_ref = std_and_mean(guided(base, row, i), x, *step)[1]
                scale = noise if optim.kl == "gaussian" else std
                kl = ((mean - mean_ref) ** 2).mean() / (2 * scale**2)
            terms.append(experience.weights[row].double() * (policy + optim.beta * kl))
    return torch.stack(terms).mean()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_a_whole_update(pixel_model, tmp_path, case, monkeypatch):
    """Both updates' accumulated gradients, with weights moved since the rollout so that some
    ratios are clipped, a dropped group, and rows at different steps."""
    changes = {"sample.prompts_per_iteration": 3, "sample.group_size": 4, "optim.clip_range": 2e-3}
    config = setups.config(pixel_model, tmp_path, **{**changes, **CASES[case]})
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    weights = torch.tensor([1.5, 0, 1.5]).repeat_interleave(4)
    experience = Experience(**{**vars(experience), "weights": weights})
    with torch.no_grad():
        for number, parameter in enumerate(parts.state.parameters.values()):
            wave = torch.sin(torch.arange(parameter.numel()) + number)
            parameter.add_(0.05 * wave.view_as(parameter))
    model, base = setups.double_copies(parts)
    found: list[dict[str, torch.Tensor]] = []

    def record(state):
        found.append({name: p.grad.clone() for name, p in state.parameters.items()})
        state.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    monkeypatch.setattr(type(parts.state), "step", record)
    metrics = setups.update(parts, experience, replace(config, **{"optim.ratio_tolerance": 1e9}))
    losses, masked = [], []
    for number, gradients in enumerate(found):
        model.zero_grad()
        rows = slice(number * 6, number * 6 + 6)
        loss = expected_loss(model, base, parts, experience, rows, config, masked)
        loss.backward()
        losses.append(loss.item())
        expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        ours, theirs = (
            torch.cat([g[name].double().flatten() for name in expected])
            for g in (gradients, expected)
        )
        assert theirs.norm() > 0
        assert (ours - theirs).norm() / theirs.norm() < 2e-4
    # The terms of the mean are about 1 (10 with Guard) and nearly cancel.
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-4, abs=1e-6)
    assert metrics["max_ratio_error"] > 0
    if case == "plain":
        assert 0 < metrics["clip_fraction"] < 1
    if config.optim.dppo:
        assert 0 < sum(masked) < len(masked)
        assert metrics["mask_fraction"] == pytest.approx(sum(masked) / len(masked))


def test_guard_and_dppo_exclude_each_other(pixel_model, tmp_path):
    with pytest.raises(ConfigError, match=r"optim\.guard and optim\.dppo are both on"):
        setups.config(pixel_model, tmp_path, **{"optim.guard": True, "optim.dppo": True})


@pytest.mark.slow
def test_equal_rewards_change_nothing_without_kl(pixel_model, tmp_path):
    """All groups equal: no gradient at all, the same number of forwards, weights unchanged."""
    config = setups.config(pixel_model, tmp_path, **{"optim.beta": 0.0, "optim.weight_decay": 0.0})
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    experience = Experience(**{**vars(experience), "advantages": torch.zeros(12)})
    before = [p.detach().clone() for p in parts.state.parameters.values()]
    metrics = setups.update(parts, experience, config)
    assert metrics["grad_norm"] == [0.0, 0.0] and metrics["policy_loss"] == 0.0
    assert all(map(torch.equal, before, parts.state.parameters.values()))


@pytest.mark.slow
def test_beta_0_never_computes_the_reference(pixel_model, tmp_path, monkeypatch):
    config = setups.config(pixel_model, tmp_path, **{"optim.beta": 0.0})
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    forwards = []
    parts.policy.transformer.register_forward_hook(lambda *_: forwards.append(1))
    monkeypatch.setattr(type(parts.policy), "reference", None)
    setups.update(parts, experience, config)
    assert len(forwards) == 4 * 2
