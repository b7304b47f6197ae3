"""The monitor of a run: what it shows, and what it saves when a reward ends it."""

from __future__ import annotations

import json
import os
import signal
import types

import pytest
import torch
from rich.console import Console

from flowgrpo import files, rewards, train
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.config import replace
from flowgrpo.policies.load import load_policy
from flowgrpo.prompts.load import has_splits
from flowgrpo.runs import display, monitor
from flowgrpo.runs.banner import servers_lines, slow_start
from support import processes
from support.servers import running


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
def test_servers_of_a_reward_train_as_the_reward_itself(tmp_path, shown):
    """Bit for bit, with one server and with two, of which one fails in the first iteration."""
    pytest.importorskip("fastapi")
    from flowgrpo.rewards.remote.serve import app

    calls = []

    def fails(images, prompts, metadata):
        calls.append(len(images))
        if len(calls) > 3:
            raise RuntimeError("CUDA error")
        return processes.red(images, prompts, metadata)

    def bits(name, reward):
        changes = {"run.steps": 2, "run.eval_every": 0, "run.out": str(tmp_path / name)}
        options = {f"{reward}.batch_size": "2"} if reward.startswith("http") else {}
        config = processes.make(
            tmp_path, **changes, **{"reward.weights": {reward: 1.0}, "reward.options": options}
        )
        train.run(config)
        return processes.bits_of(config.out_dir / "adapter")

    local = bits("local", "support.processes:red")
    with running(app(processes.red, "red")) as one, running(app(fails, "red")) as two:
        assert bits("one", one) == local
        assert bits("two", f"{one},{two}") == local
    assert len(calls) > 3
    text = shown.export_text()
    assert f"2 of 2 serve: {one}/score (red), {two}/score (red)" in text


def test_the_banner_tells_which_servers_serve():
    assert servers_lines({}) == {}
    servers = {"http://a,http://b": "1 of 2 serve: http://a; http://b hangs", "deqa": "http://c"}
    text = "1 of 2 serve: http://a; http://b hangs; deqa: http://c"
    assert servers_lines(servers) == {"servers": text}


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
    assert f"3 prompts x 2 images in 3 steps, {seen}" in text
    # Its reward is between -1 and 1.
    assert text.index("before training: 6 images.") < text.index("iteration 0  base: held-out")
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
    # Little else, so many times.
    changes |= {"sample.group_size": 2, "sample.batch_size": 2, "sample.steps": 2}
    changes |= {"sample.window_size": 1}
    train.run(processes.make(tmp_path, **changes))
    text = shown.export_text()
    assert text.count("Nothing to learn from: for 10 iterations no rewards differed") == 1
    assert "inside any of the 2 groups; try other prompts (sample.prompts)" in text
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


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [False, True])
def test_a_short_run_shows_what_it_trained(tmp_path, monkeypatch, shown, stopped):
    """The average moves every 8 updates, and the run has 6, or is stopped after 2."""
    changes = {"run.steps": 3, "run.eval_every": 0, "optim.ema_every": 8}
    config, red = processes.make(tmp_path, **changes), processes.red
    lines, signals = config.out_dir / "metrics.jsonl", [signal.SIGINT]

    def stops(images, prompts, metadata):
        if signals and lines.exists() and '"kind": "eval"' in lines.read_text():
            os.kill(os.getpid(), signals.pop())
        return red(images, prompts, metadata)

    if stopped:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        monkeypatch.setattr(processes, "red", stops)
    summary = train.run(config)
    if stopped:
        signal.signal(signal.SIGINT, before)
    assert summary["interrupted"] == stopped and summary["weights"] == "live"
    assert json.loads((config.out_dir / "summary.json").read_text())["weights"] == "live"
    updates = 2 if stopped else 6
    text = f"weights (as the last update left them: after {updates} updates the average of decay"
    assert f"{text} 0.9, which moves every 8, is still 100% untrained)." in shown.export_text()
    checkpoint = config.out_dir / "checkpoints" / f"step-{summary['iterations']:06d}"
    trained = files.read_tensors(checkpoint / "weights.safetensors")
    for folder in (config.out_dir / "adapter", checkpoint):
        exported = files.read_tensors(folder / "pytorch_lora_weights.safetensors")
        ends = sorted(float(tensor.abs().max()) for tensor in exported.values())
        assert ends == sorted(float(tensor.abs().max()) for tensor in trained.values())
        # B starts at 0, and the untrained adapter has nothing else there.
        assert any(bool(t.any()) for name, t in exported.items() if "lora_B" in name)
        assert "the weights as the last update left them" in (folder / "README.md").read_text()
    if not stopped:
        # What the run evaluated is what `flowgrpo evaluate` finds in it.
        assert summary["after"]["accuracy"] != summary["before"]["accuracy"]
        options = EvaluateOptions(str(config.out_dir), out=str(tmp_path / "e"), device="cpu")
        report = evaluate_run(options, Console(quiet=True))
        assert report["reports"]["iteration 3"]["accuracy"] == summary["after"]["accuracy"]


@pytest.mark.slow
def test_a_longer_run_shows_its_average(tmp_path, shown):
    changes = {"run.steps": 4, "run.eval_every": 0, "optim.ema_every": 8}
    config = processes.make(tmp_path, **changes)
    assert train.run(config)["weights"] == "average"
    assert "weights (the average of decay 0.9)." in shown.export_text()
    checkpoint = config.out_dir / "checkpoints" / "step-000004"
    average = files.read_tensors(checkpoint / "ema.safetensors")
    exported = files.read_tensors(config.out_dir / "adapter" / "pytorch_lora_weights.safetensors")
    assert sorted(float(t.abs().max()) for t in exported.values()) == sorted(
        float(t.abs().max()) for t in average.values()
    )
    card = (config.out_dir / "adapter" / "README.md").read_text()
    assert "the weights' average of decay 0.9" in card


@pytest.mark.slow
def test_a_picture_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **keywords):
        raise ValueError("no font")

    monkeypatch.setattr(monitor.pictures, "curve", fail)
    config = processes.make(tmp_path, **{"run.steps": 1, "run.eval_every": 0})
    assert train.run(config)["iterations"] == 1
    messages = [r.getMessage() for r in caplog.records if r.name == "flowgrpo"]
    assert messages == ["curve.png cannot be drawn (ValueError: no font)."] * 2
    assert (config.out_dir / "samples" / "before-after.png").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("iteration", [2, 3])
def test_a_stop_in_an_evaluation_saves_at_once(tmp_path, monkeypatch, shown, iteration):
    """The one of an iteration, and the one of the end: left at the next chunk, with a checkpoint
    that would not have been due, and made by the run that goes on, to the same numbers."""
    changes = {"run.steps": 3, "run.checkpoint_every": 0}
    config, calls = processes.make(tmp_path, **changes), []
    progress, label = display.EvaluationProgress.__call__, f"iteration {iteration}"

    def ask(self, stage, images):
        progress(self, stage, images)
        if self.label == label:
            calls.append((stage, images))
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(display.EvaluationProgress, "__call__", ask)
    summary = train.run(config)
    assert signal.getsignal(signal.SIGTERM) == before and calls == [("sampling", 4)]
    assert summary["interrupted"] and summary["iterations"] == iteration
    assert summary["after"]["iteration"] == (0 if iteration == 2 else 2)
    assert (config.out_dir / "checkpoints" / f"step-{iteration:06d}").is_dir()
    assert shown.export_text().count(monitor.LEFT) == 1
    monkeypatch.setattr(display.EvaluationProgress, "__call__", progress)
    summary = train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    assert not summary["interrupted"] and summary["after"]["iteration"] == 3
    whole = replace(config, **{"run.out": str(tmp_path / "whole")})
    train.run(whole)
    lines = [processes.untimed(c.out_dir / "metrics.jsonl") for c in (config, whole)]
    assert lines[0] == lines[1]
    for folder in ("adapter", "checkpoints/step-000003", "evaluations/step-000002"):
        bits = [processes.bits_of(c.out_dir / folder) for c in (config, whole)]
        assert bits[0] == bits[1] != {}


@pytest.mark.slow
def test_a_stop_before_the_first_iteration_leaves_the_base_measured(tmp_path, monkeypatch):
    """There is nothing to save until then, and the same command would have to begin again."""
    config, progress = processes.make(tmp_path), display.EvaluationProgress.__call__

    def ask(self, stage, images):
        progress(self, stage, images)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(display.EvaluationProgress, "__call__", ask)
    summary = train.run(config)
    assert summary["interrupted"] and summary["iterations"] == 0
    assert [line["kind"] for line in processes.untimed(config.out_dir / "metrics.jsonl")] == [
        "eval"
    ]
    assert (config.out_dir / "checkpoints" / "step-000000").is_dir()
