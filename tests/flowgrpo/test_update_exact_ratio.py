"""The ratios of the first update are exactly 1, in every mode; a mismatch is found."""

from __future__ import annotations

import itertools

import pytest
import torch

from flowgrpo import objectives, update
from flowgrpo.config import replace
from flowgrpo.runs import monitor
from flowgrpo.sampling.rollout import chunks
from support import setups

CASES = {
    "plain": {},
    "all steps, beta 0": {"sample.window_size": 0, "optim.beta": 0.0},
    "guidance": {"sample.guidance_scale": 3.0},
    "guidance and guard": {"sample.guidance_scale": 3.0, "optim.guard": True, "optim.beta": 0.0},
    "guard": {"optim.guard": True, "sample.transition": "dance_sde"},
    "cps": {"sample.transition": "cps", "sample.noise_level": 0.8, "sample.shared_noise": True},
    "odd chunks": {"sample.batch_size": 1, "sample.group_size": 5, "sample.window_size": 1},
    "larger chunks": {
        "sample.batch_size": 6,
        "sample.group_size": 6,
        "optim.step_weighting": "std",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_ratios_are_exactly_one(pixel_model, tmp_path, case, dtype):
    """Before any optimizer step, every chunk's every ratio is 1.0, under grad, with adapters that
    are not zero; and the gradient is not 0."""
    small = {"sample.steps": 4, "sample.group_size": 3, "policy.dtype": dtype}
    config = setups.config(pixel_model, tmp_path, **{**small, **CASES[case]})
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    experience = objectives.with_prepared_conditioning(parts.policy, parts.schedule, experience)
    every = chunks(config.sample.rows, config.sample.batch_size)
    for rows, turn in itertools.product(every, range(config.sample.trained_steps)):
        batch = objectives.gather_trained_steps(
            parts.schedule, experience, rows, range(turn, turn + 1)
        )
        out = objectives.grpo.loss(parts.policy, batch, config)
        assert torch.equal(out.ratio, torch.ones_like(out.ratio))
        out.loss.backward()
    assert sum(p.grad.abs().sum() for p in parts.state.parameters.values()) > 0


@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_full_fine_tuning(pixel_model, tmp_path, beta):
    changes = {"policy.adapter": "full", "policy.dtype": "auto", "optim.beta": beta}
    config = setups.config(pixel_model, tmp_path, **changes)
    parts = setups.parts(config)
    metrics = setups.update(parts, setups.experience(parts, config), config)
    assert metrics["max_ratio_error"] == 0.0
    # The weights were moved after the reference was taken, so they differ from it.
    assert (metrics["kl"] > 0) == (beta > 0)


@pytest.mark.slow
def test_latent_model_with_three_encoders(latent_model, tmp_path):
    config = setups.config(latent_model, tmp_path, **{"policy.dtype": "bfloat16"})
    parts = setups.parts(config)
    metrics = setups.update(parts, setups.experience(parts, config), config)
    assert metrics["max_ratio_error"] == 0.0 and metrics["kl"] > 0


@pytest.mark.slow
def test_every_iteration_starts_at_one(pixel_model, tmp_path):
    """Over iterations with optimizer steps between them, and the second update is off policy."""
    config = setups.config(pixel_model, tmp_path, **{"optim.lr": 1e-2})
    parts = setups.parts(config)
    for _ in range(3):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0 and metrics["clip_fraction"] > 0
        parts.state.iteration += 1
    assert parts.state.updates == 6


@pytest.mark.slow
def test_a_mismatch_raises(pixel_model, tmp_path):
    config = setups.config(pixel_model, tmp_path)
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    with torch.no_grad():
        next(iter(parts.state.parameters.values())).mul_(1.5)
    with pytest.raises(update.RatioError, match=r"ratio - 1\| up to .* but at most 0 is allowed"):
        setups.update(parts, experience, config)
    loose = replace(config, **{"optim.ratio_tolerance": 10.0})
    assert setups.update(parts, setups.experience(parts, config), loose)["max_ratio_error"] == 0.0


@pytest.mark.parametrize("error", [float("inf"), 2e-7])
def test_check_ratio(error):
    with pytest.raises(update.RatioError):
        update.check_ratio(error, 1e-7)
    update.check_ratio(1e-7, 1e-7)


def test_ratios_that_are_nan_are_no_fault_of_the_kernels():
    with pytest.raises(monitor.DivergedError, match=r"NaN, but finite .* lower optim\.lr"):
        update.check_ratio(float("nan"), 10.0)
