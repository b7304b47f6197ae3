"""The monitor of a run: what it shows, and what it saves when a reward ends it."""

from __future__ import annotations

import types

import pytest
import torch
from rich.console import Console

from flowgrpo import rewards, train
from flowgrpo.config import replace
from flowgrpo.policies.load import load_policy
from flowgrpo.prompts.load import has_splits
from flowgrpo.runs import display
from flowgrpo.runs.banner import slow_start
from support import processes


@pytest.fixture
def shown(monkeypatch):
    """The console of the runs of a test, wide and recording."""
    console = Console(width=300, record=True, quiet=False, highlight=False)
    monkeypatch.setattr(display, "Terminal", lambda **options: console)
    return console


@pytest.mark.slow
def test_a_reward_that_ends_the_run_loses_nothing(tmp_path, monkeypatch, shown):
    """Iterations since the last checkpoint are saved; the resumed run is the uninterrupted one."""
    changes = {"run.eval_every": 0, "run.steps": 4, "run.eval_guidance": 1.0}
    config, red = processes.make(tmp_path, **changes), processes.red
    lines = config.out_dir / "metrics.jsonl"

    def dies(images, prompts, metadata):
        if lines.exists() and '"iteration": 3, "kind": "train"' in lines.read_text():
            raise ConnectionError("the machine is gone")
        return red(images, prompts, metadata)

    monkeypatch.setattr(processes, "red", dies)
    with pytest.raises(rewards.RewardError, match="the machine is gone"):
        train.run(config)
    assert (config.out_dir / "checkpoints" / "step-000003").is_dir()
    text = shown.export_text()
    assert f"Saved after 3 iterations; go on with --run.resume {config.out_dir}" in text
    monkeypatch.setattr(processes, "red", red)
    train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    whole = replace(config, **{"run.out": str(tmp_path / "whole")})
    train.run(whole)
    assert processes.untimed(lines) == processes.untimed(whole.out_dir / "metrics.jsonl")
    for folder in ("adapter", "checkpoints/step-000004"):
        assert (
            processes.bits_of(config.out_dir / folder)
            == processes.bits_of(whole.out_dir / folder)
            != {}
        )


@pytest.mark.slow
def test_the_banner_tells_what_is_trained_and_what_is_evaluated(tmp_path, shown):
    config = processes.make(tmp_path, **{"run.steps": 1, "run.eval_every": 0})
    train.run(config)
    text = shown.export_text()
    policy = load_policy(config)
    frozen = sum(p.numel() for p in policy.transformer.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in policy.parameters())
    assert f"{frozen / 1e3:.2f} k parameters" in text and f"{trained / 1e3:.2f} k param" in text
    seen = f"of the prompts of training: {config.sample.prompts} is one file"
    assert f"6 prompts x 2 images in 3 steps, {seen}" in text
    # Its reward is between -1 and 1.
    assert text.index("before training: 12 images.") < text.index("iteration 0  base: held-out")
    assert "held-out support.processes:red" in text and "accuracy" not in text
    train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    assert "resumed at 1; nothing is left to train, see --run.steps" in shown.export_text()


def flat(images, prompts, metadata):
    """Equal inside a group, whatever is drawn."""
    return torch.tensor([float(len(text)) for text in prompts])


@pytest.mark.slow
def test_a_run_that_has_nothing_to_learn_from_says_so_once(tmp_path, shown):
    changes = {"run.steps": 21, "run.eval_every": 0, "run.checkpoint_every": 0}
    changes |= {"reward.weights": {"test_monitor:flat": 1.0}, "run.eval_prompts": 1}
    train.run(processes.make(tmp_path, **changes))
    text = shown.export_text()
    assert text.count("Nothing to learn from: for 10 iterations the rewards were equal") == 1
    assert "inside each of the 2 groups; try other prompts (sample.prompts)" in text
    assert text.index("iteration 10/21") < text.index("Nothing") < text.index("iteration 11/21")


def test_which_sets_hold_prompts_out(tmp_path):
    for name in ("nano", "geneval", "hub:a/b", str(tmp_path)):
        assert has_splits(name)
    assert not has_splits(str(tmp_path / "p.txt"))


def test_what_takes_longer_the_first_time():
    policy = types.SimpleNamespace(compiled=False, graphs=None)
    assert slow_start(policy) == ""
    policy.compiled, policy.graphs = True, object()
    assert slow_start(policy) == (
        "In the first evaluation and iteration blocks are compiled, which takes minutes and "
        "CUDA graphs are recorded."
    )
