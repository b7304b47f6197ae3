"""Whole runs in processes of their own: equal, killed, stopped, resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from flowgrpo.config import Config
from support import processes

pytestmark = pytest.mark.slow


def make(folder: Path, **changes) -> Config:
    """Evaluations at the start, half-way and at the end: they take most of such a run."""
    return processes.make(folder, **{"run.eval_every": 3, **changes})


def wait_for_line(metrics: Path, iteration: int, run: processes.Fork) -> None:
    """Return as soon as `metrics` has a train line of `iteration`."""
    deadline = time.time() + 90
    while time.time() < deadline:
        assert run.process.is_alive(), run.log.read_text()
        if metrics.exists() and f'"iteration": {iteration}, "kind": "train"' in metrics.read_text():
            return
        time.sleep(0.002)
    raise AssertionError("the run did not get there")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run of 6 iterations."""
    folder = tmp_path_factory.mktemp("whole")
    fork = processes.Fork(folder / "log", processes.run, make(folder), draws=True)
    assert "6/6" in fork.wait()
    assert (folder / "run" / "curve.png").read_bytes().startswith(b"\x89PNG")
    return folder


def same(one: Path, other: Path) -> None:
    """Two runs with the same numbers: every metric, every weight, every moment, every picture."""
    assert processes.untimed(one / "metrics.jsonl") == processes.untimed(other / "metrics.jsonl")
    for part in ("checkpoints/step-000006", "adapter", "evaluations/step-000006"):
        assert processes.bits_of(one / part) == processes.bits_of(other / part) != {}
    for name in ("step-000000.png", "step-000006.png", "before-after.png"):
        assert (one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes()
    summaries = [json.loads((run / "summary.json").read_text()) for run in (one, other)]
    for summary in summaries:
        summary.pop("seconds")
    assert summaries[0] == summaries[1]


def test_two_equal_runs_are_equal(whole, tmp_path):
    processes.Fork(tmp_path / "log", processes.run, make(tmp_path)).wait()
    same(whole / "run", tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["max_ratio_error"] == 0.0 and not summary["interrupted"]
    assert set(summary["seconds"]) >= {"rollout", "reward", "update", "evaluate", "total"}
    assert summary["after"]["accuracy"] != summary["before"]["accuracy"]


@pytest.mark.parametrize("iteration", [1, 3])
def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path, iteration):
    run = processes.Fork(tmp_path / "log", processes.run, make(tmp_path))
    wait_for_line(tmp_path / "run" / "metrics.jsonl", iteration, run)
    run.kill(signal.SIGKILL)
    run.wait(code=-signal.SIGKILL)
    assert not (tmp_path / "run" / "summary.json").exists()
    output = processes.Fork(tmp_path / "log2", processes.resume, tmp_path / "run").wait()
    assert iteration < 2 or "resumed at" in output
    same(whole / "run", tmp_path / "run")


def test_a_run_goes_on_when_nobody_reads_its_output(tmp_path):
    """In `flowgrpo train | tee log` Ctrl-C ends tee before the run has saved."""
    run = processes.Fork(tmp_path / "log", processes.run_unread, make(tmp_path))
    wait_for_line(tmp_path / "run" / "metrics.jsonl", 1, run)
    run.kill(signal.SIGINT)
    run.wait()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] and 1 <= summary["iterations"] < 6
    assert (tmp_path / "run" / "checkpoints" / f"step-{summary['iterations']:06d}").is_dir()


def test_ctrl_c_saves_and_resumes(whole, tmp_path):
    run = processes.Fork(tmp_path / "log", processes.run, make(tmp_path))
    wait_for_line(tmp_path / "run" / "metrics.jsonl", 3, run)
    run.kill(signal.SIGINT)
    assert "Finishing this iteration" in run.wait()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    stopped = summary["iterations"]
    assert summary["interrupted"] and 3 <= stopped < 6
    assert (tmp_path / "run" / "checkpoints" / f"step-{stopped:06d}").is_dir()
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    processes.Fork(tmp_path / "log2", processes.resume, tmp_path / "run").wait()
    same(whole / "run", tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_scheduler_that_ends_the_run_finds_it_saved(whole, tmp_path, number):
    run = processes.Fork(tmp_path / "log", processes.run, make(tmp_path))
    wait_for_line(tmp_path / "run" / "metrics.jsonl", 3, run)
    run.kill(number)
    run.kill(signal.SIGTERM)
    assert "Finishing this iteration" in run.wait()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["interrupted"] and 3 <= summary["iterations"] < 6
    processes.Fork(tmp_path / "log2", processes.resume, tmp_path / "run").wait()
    same(whole / "run", tmp_path / "run")


def test_a_longer_run_continues_a_finished_one(tmp_path):
    """Three iterations with an evaluation that only the end called for, then two, are five."""
    changes = {"run.eval_every": 2, "run.checkpoint_every": 0}
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    processes.Fork(one / "log", processes.run, make(one, **changes, **{"run.steps": 3})).wait()
    assert processes.untimed(one / "run" / "metrics.jsonl")[-1]["final"]
    processes.Fork(one / "log2", processes.resume, one / "run", "--run.steps", "5").wait()
    processes.Fork(other / "log", processes.run, make(other, **changes, **{"run.steps": 5})).wait()
    lines = [processes.untimed(folder / "run" / "metrics.jsonl") for folder in (one, other)]
    assert lines[0] == lines[1]


def test_killed_before_the_first_checkpoint_it_starts_again(whole, tmp_path):
    run = shutil.copytree(whole / "run", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    (run / "summary.json").unlink()
    processes.Fork(tmp_path / "log", processes.resume, run).wait()
    same(whole / "run", run)


def test_full_fine_tuning_goes_on_with_the_same_numbers(tmp_path):
    """Two iterations and two more are four; the reference stays the untrained model."""
    changes = {"policy.adapter": "full", "optim.lr": 1e-3, "optim.beta": 0.1}
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir(), other.mkdir()
    processes.Fork(one / "log", processes.run, make(one, **changes, **{"run.steps": 2})).wait()
    processes.Fork(one / "log2", processes.resume, one / "run", "--run.steps", "4").wait()
    processes.Fork(other / "log", processes.run, make(other, **changes, **{"run.steps": 4})).wait()
    lines = [processes.untimed(folder / "run" / "metrics.jsonl") for folder in (one, other)]
    assert lines[0] == lines[1] and lines[0][-2]["kl"] > 0
    for part in ("checkpoints/step-000004", "transformer"):
        found = [processes.bits_of(folder / "run" / part) for folder in (one, other)]
        assert found[0] == found[1] != {}


def resume_apart(folder: Path, stdout: Path) -> None:
    """Resume with standard output in a file of its own, apart from the log."""
    sys.stdout = open(stdout, "w")  # noqa: SIM115
    os.dup2(sys.stdout.fileno(), 1)
    processes.resume(folder, "--run.progress", "none")


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    """By the command line, which says nothing and keeps the run's numbers. In a process that was
    not forked, test_compare.py and test_mistakes.py call it."""
    run = shutil.copytree(whole / "run", tmp_path / "run")
    processes.Fork(tmp_path / "log", resume_apart, run, tmp_path / "stdout").wait()
    assert (tmp_path / "stdout").read_text() == ""
    same(whole / "run", run)
