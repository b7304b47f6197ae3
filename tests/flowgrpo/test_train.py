"""Training as a whole: it learns, repeats itself, and refuses bad input before it writes."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowgrpo import objectives, rewards, train, update
from flowgrpo.config import ConfigError, replace
from support import setups

FAST = {
    "sample.group_size": 8,
    "sample.batch_size": 8,
    "sample.steps": 5,
    "sample.eval_steps": 8,
    "sample.shared_noise": True,
    "optim.lr": 3e-2,
    "optim.beta": 0.0,
    "optim.step_weighting": "std",
    "optim.ema_decay": 0.5,
    "optim.ema_every": 1,
    "run.steps": 10,
    "run.eval_every": 0,
    "run.checkpoint_every": 0,
}


SHORT = {
    **FAST,
    "sample.group_size": 4,
    "sample.batch_size": 4,
    "sample.steps": 4,
    "sample.eval_steps": 2,
    "run.eval_prompts": 1,
    "run.eval_samples": 2,
}
"""Where nothing is learned."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"policy.adapter": "full", "optim.lr": 3e-3}], ids=["lora", "full"]
)
def test_brightness_is_learned(pixel_model, tmp_path, changes):
    """Held-out brightness, by the ODE sampler, rises far beyond its confidence interval."""
    summary = train.run(setups.config(pixel_model, tmp_path, **{**FAST, **changes}))
    before, after = summary["before"], summary["after"]
    assert after["interval"][0] > before["interval"][1] + 0.03
    assert summary["max_ratio_error"] == 0.0 and summary["iterations"] == 10


@pytest.mark.slow
def test_the_backward_alone_is_strict(pixel_model, tmp_path):
    """PyTorch's attention kernels sum gradients in a fixed order only where it may raise; rewards
    and rollout, and processes that asked for nothing, are left alone."""
    config = setups.config(pixel_model, tmp_path)
    made = setups.parts(config)
    experience = setups.experience(made, config)
    batch = objectives.gather_trained_steps(made.schedule, experience, slice(0, 3), range(1))
    seen, level = [], torch.get_deterministic_debug_mode

    def objective(policy, batch, config):
        out = objectives.grpo.loss(policy, batch, config)
        out.loss.register_hook(lambda gradient: seen.append(level()))
        seen.append(level())
        return out

    try:
        for mode in ("default", "warn"):
            torch.set_deterministic_debug_mode(mode)
            update.run_micro_step(made.policy, objective, batch, config, 1)
            seen.append(level())
    finally:
        torch.set_deterministic_debug_mode("default")
    assert seen == [0, 0, 0, 1, 2, 1]


def metrics(folder: Path) -> list[dict]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.mark.slow
def test_global_random_numbers_play_no_part(pixel_model, tmp_path):
    """Whatever the global generators were: the same numbers, to the bit."""
    found = []
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        torch.manual_seed(number), np.random.seed(number)
        train.run(setups.config(pixel_model, folder, **{**SHORT, "run.steps": 2}))
        found.append(metrics(folder))
    assert found[0] == found[1] and len(found[0]) == 4
    assert found[0][1]["reward"] != found[0][2]["reward"]


@pytest.mark.slow
def test_another_seed_is_another_run(pixel_model, tmp_path):
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        changes = {**SHORT, "run.steps": 1, "run.seed": seed}
        train.run(setups.config(pixel_model, tmp_path / str(seed), **changes))
    one, other = metrics(tmp_path / "0"), metrics(tmp_path / "1")
    assert one[0] == other[0], "the evaluation of the base model is the same in every run"
    assert one[1]["reward"] != other[1]["reward"]


@pytest.mark.slow
def test_a_dropped_group_is_counted(pixel_model, tmp_path, monkeypatch):
    def choosy(images, prompts, metadata):
        found = setups.bright(images, prompts, metadata)
        return [float("nan") if "red" in p else x for p, x in zip(prompts, found, strict=True)]

    monkeypatch.setattr(setups, "choosy", choosy, raising=False)
    changes = {
        "reward.weights": {"support.setups:choosy": 1.0},
        "reward.retries": 0,
        "run.eval_prompts": 6,
        "run.steps": 2,
        "sample.prompts_per_iteration": 3,
        "sample.group_size": 4,
        "sample.batch_size": 2,
    }
    summary = train.run(setups.config(pixel_model, tmp_path, **{**SHORT, **changes}))
    lines = [line for line in metrics(tmp_path) if line["kind"] == "train"]
    assert summary["dropped_groups"] == sum(line["dropped_groups"] for line in lines) > 0
    assert summary["max_ratio_error"] == 0.0
    assert all(
        np.isfinite([*line["grad_norm"], line["reward"], line["loss"]]).all() for line in lines
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"reward.weights": {"beauty": 1.0}}, rewards.RewardError, "'beauty' is unknown"),
        (
            {"sample.prompts": "absent.txt"},
            ConfigError,
            "neither one of nano, nano_text, geneval, ocr, general nor an",
        ),
        ({"sample.prompts_per_iteration": 9}, ConfigError, "is 9, but .* only 6 prompts"),
        ({"policy.model": "/no/such/folder"}, ConfigError, "could not be found|no folder"),
        ({"policy.lora_targets": ("to_x",)}, ConfigError, "'to_x'"),
        ({"policy.adapter": "full", "policy.dtype": "bfloat16"}, ConfigError, "float32"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    pixel_model, tmp_path, changes, error, message, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    changes = {"sample.batch_size": 6, "sample.group_size": 4, **changes}
    config = setups.config(pixel_model, tmp_path, **{"sample.prompts_per_iteration": 3, **changes})
    with pytest.raises(error, match=message):
        train.run(config)
    assert not (tmp_path / "run").exists()


def test_words_outside_the_vocabulary(pixel_model, tmp_path):
    config = setups.config(pixel_model, tmp_path)
    Path(config.sample.prompts).write_text("a red circle\na purple circle\n")
    with pytest.raises(ConfigError, match="'a purple circle' has a word"):
        train.run(config)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_fails_in_every_group_stops_the_run(pixel_model, tmp_path, monkeypatch):
    def nothing(images, prompts, metadata):
        return [float("nan")] * len(images)

    monkeypatch.setattr(setups, "nothing", nothing, raising=False)
    config = setups.config(pixel_model, tmp_path, **SHORT)
    config = replace(config, **{"reward.weights": {"support.setups:nothing": 1.0}})
    with pytest.raises(rewards.RewardError, match="failed for all"):
        train.run(config)


def test_the_loop_fits_one_screen():
    lines = inspect.getsource(train.run).splitlines()
    assert len(lines) <= 40
    stages = (
        "prompt_batch(",
        "collect(",
        "share_scores(",
        ".weigh(",
        "update(",
        "monitor.iteration",
    )
    places = [next(i for i, line in enumerate(lines) if stage in line) for stage in stages]
    assert places == sorted(places)
