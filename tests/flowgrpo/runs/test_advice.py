"""Sentences of a run about its figures: AdamW's eps against the gradients, and too much noise."""

from __future__ import annotations

import math

import pytest
import torch
from rich.console import Console

from flowgrpo import train
from flowgrpo.config import Config, replace
from flowgrpo.runs import display
from flowgrpo.runs.advice import Advice
from flowgrpo.runs.state import State, make_optimizer
from support import processes, setups

FAST = {"run.eval_every": 0, "run.checkpoint_every": 0, "run.eval_guidance": 1.0}


@pytest.fixture
def shown(monkeypatch):
    console = Console(width=500, record=True, quiet=False, highlight=False)
    monkeypatch.setattr(display, "Terminal", lambda **options: console)
    return console


def sentences(config, norms, weights=10_000, **metrics):
    advice = Advice(config, weights)
    return [advice.gradients({"grad_norm": norm, **metrics}) for norm in norms]


def test_gradients_near_eps_are_named_with_their_size_once():
    """RMS 5e-8 of 1e4 weights with norm 5e-6, at eps 1e-8: a sixth of the step is lost."""
    found = sentences(Config(), [[5e-6, 1e-6]] * 6)
    assert [bool(text) for text in found] == [False, False, True, False, False, False]
    assert found[2] == (
        "The gradients have a root mean square of 5e-08 over 10000 weights, after clipping, near "
        "AdamW's eps of 1e-08, which makes the steps of such gradients 1.2 times shorter; set "
        "optim.eps to 5e-12 or less."
    )


@pytest.mark.parametrize(
    ("norm", "changes", "metrics"),
    [
        (1.1e-5, {}, {}),
        (1.1e-9, {"optim.eps": 1e-12}, {}),
        (5e-6, {"policy.adapter": "full"}, {}),
        (0.0, {}, {}),
        (math.nan, {}, {}),
        (5e-6, {}, {"equal_groups": 6, "dropped_groups": 2}),
    ],
)
def test_nothing_is_said(norm, changes, metrics):
    config = replace(Config(), **changes)
    assert not any(sentences(config, [[norm]] * 5, **metrics))
    assert not any(sentences(config, [[5e-6], [5e-6], [1e-3]] * 3, **metrics))


def test_the_size_is_that_after_clipping():
    """Of 1e20 weights with norm 10, clipped to 1 or not."""
    for limit, rms in ((1.0, "1e-10"), (0.0, "1e-09")):
        config = replace(Config(), **{"optim.max_grad_norm": limit})
        assert f"square of {rms} over" in sentences(config, [10.0] * 3, 10**20)[2]


@pytest.mark.parametrize(("adapter", "eps"), [("lora", 1e-8), ("full", 1e-12)])
def test_eps_follows_what_is_trained(adapter, eps, pixel_model, tmp_path):
    """And AdamW's first step with it: lr m / (sqrt(v) + eps) of a gradient of 1e-8."""
    config = setups.config(pixel_model, tmp_path, **{"policy.adapter": adapter})
    policy = setups.parts(config).policy
    for chosen, expected in ((0.0, eps), (1e-5, 1e-5)):
        optim = replace(config, **{"optim.eps": chosen, "optim.weight_decay": 0.0}).optim
        state = State.create(policy.transformer, optim)
        assert state.optimizer.param_groups[0]["eps"] == expected
        weight = torch.nn.Parameter(torch.zeros(1))
        weight.grad = torch.full([1], 1e-8)
        make_optimizer([weight], optim, adapter == "full").step()
        assert -weight.item() == pytest.approx(optim.lr * 1e-8 / (1e-8 + expected), rel=1e-5)


def test_noise_is_compared_with_the_deterministic_sampler():
    advice = Advice(Config(), 1)
    assert advice.noise(9.0) == ""
    advice.std = 0.5
    assert advice.noise(0.54) == advice.noise(0.1) == advice.noise(math.nan) == ""
    assert advice.noise(0.6) == (
        "The latents of the first rollout have a standard deviation of 0.6, which is 1.20 times "
        "that of the deterministic sampler (0.5), so noise may be left in the images that are "
        "scored; lower sample.noise_level (0.7), or raise sample.steps (10)."
    )


@pytest.mark.slow
@pytest.mark.parametrize(("level", "noisy"), [(0.1, False), (2.5, True)])
def test_a_run_says_that_its_rollouts_are_noise_once(level, noisy, tmp_path, shown):
    changes = {"run.steps": 3, "sample.noise_level": level, "sample.window_size": 0}
    config = processes.make(tmp_path, **{**FAST, **changes})
    train.run(config)
    text = shown.export_text()
    assert text.count("The latents of the first rollout have a standard deviation of") == noisy
    assert "The gradients have" not in text
    # Nothing of it is logged: the lines of a run keep their keys.
    assert "std" not in (config.out_dir / "metrics.jsonl").read_text().replace("reward_std", "")
    # On from there, where no first rollout is seen.
    train.run(replace(config, **{"run.steps": 4, "run.resume": str(config.out_dir)}))
    assert "standard deviation" not in shown.export_text()


@pytest.mark.slow
def test_a_run_says_that_eps_hides_its_gradients(tmp_path, shown):
    config = processes.make(tmp_path, **{**FAST, "run.steps": 5, "optim.eps": 1.0})
    train.run(config)
    assert shown.export_text().count("near AdamW's eps of 1, which makes the steps of such") == 1
