"""Short runs whose reward rises: the direction of every objective that learns from rewards."""

from __future__ import annotations

import pytest

from flowgrpo import train
from support import setups

FAST = {
    "sample.group_size": 8,
    "sample.batch_size": 8,
    "sample.steps": 4,
    "sample.eval_steps": 4,
    "optim.lr": 1e-2,
    "optim.beta": 0.0,
    "optim.clip_range": 0.5,
    "optim.ema_decay": 0.5,
    "optim.ema_every": 1,
    "run.steps": 10,
    "run.eval_every": 0,
    "run.checkpoint_every": 0,
}
CASES = {
    "awm": {"optim.objective": "awm", "optim.lr": 2e-2},
    "awm, normalized": {
        "optim.objective": "awm",
        "optim.level_weight": "normalized",
        "optim.updates_per_iteration": 1,
        "optim.lr": 3e-2,
    },
    # It learns more slowly than the others, in small steps.
    "nft": {
        "optim.objective": "nft",
        "optim.old_decay_rise": 0.02,
        "optim.lr": 3e-2,
        "sample.steps": 5,
        "sample.eval_steps": 8,
        "run.steps": 16,
    },
    "sft": {"optim.objective": "sft", "optim.levels": 4, "optim.lr": 3e-2},
    "orw": {"optim.objective": "orw", "optim.tau": 0.01, "optim.levels": 2, "optim.lr": 3e-2},
    "dpo": {"optim.objective": "dpo"},
    "grpo, dppo": {"optim.objective": "grpo", "optim.dppo": True, "optim.lr": 3e-2},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_brightness_is_learned(pixel_model, tmp_path, case):
    """Held-out brightness, by the ODE sampler, rises beyond its confidence interval."""
    config = setups.config(pixel_model, tmp_path, **{**FAST, **CASES[case]})
    summary = train.run(config)
    before, after = summary["before"], summary["after"]
    assert after["interval"][0] > before["interval"][1]
    assert summary["max_ratio_error"] == 0.0 and summary["iterations"] == config.run.steps
