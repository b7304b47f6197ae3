"""Runs that go on until so many seconds of training, and are evaluated by seconds."""

from __future__ import annotations

import json
import shutil

import pytest

from flowgrpo import train
from flowgrpo.config import ConfigError, replace
from flowgrpo.runs.banner import length
from flowgrpo.runs.monitor import Monitor
from support import processes


@pytest.fixture
def a_second_each(monkeypatch):
    """Let every iteration have taken one second."""
    iteration = Monitor.iteration

    def timed(self, metrics, seconds):
        iteration(self, metrics, {"rollout": 0.5, "reward": 0.25, "update": 0.25})

    monkeypatch.setattr(Monitor, "iteration", timed)


def evaluations(config) -> list[tuple[int, float]]:
    """Iteration and training seconds of each evaluation."""
    text = (config.out_dir / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    lines = [line for line in lines if line["kind"] == "eval"]
    return [(line["iteration"], line["seconds"]["training"]) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "min_seconds", "eval_every", "eval_seconds", "iterations"),
    [
        # At iteration 2 by both, at 4 s, and at the end, where 5 s are over.
        (2, 5.0, 2, 2.0, [0, 2, 4, 5]),
        # Multiples of 1.5 s, in the iterations that pass them, until 3 s.
        (4, 3.0, 0, 1.5, [0, 2, 3, 4]),
        # After run.steps, since the run goes on.
        (2, 3.0, 0, 0.0, [0, 2, 3]),
        (2, 2.0, 1, 0.0, [0, 1, 2]),
    ],
)
def test_where_a_run_ends_and_is_evaluated(
    tmp_path, a_second_each, steps, min_seconds, eval_every, eval_seconds, iterations
):
    changes = {"run.steps": steps, "run.min_seconds": min_seconds, "run.eval_every": eval_every}
    changes |= {"run.eval_seconds": eval_seconds, "run.checkpoint_every": 0, "run.eval_kl": 0.7}
    config = processes.make(tmp_path, **changes, **{"run.progress": "plain"})
    summary = train.run(config)
    assert summary["iterations"] == iterations[-1]
    assert evaluations(config) == [(i, float(i)) for i in iterations]
    lines = processes.untimed(config.out_dir / "metrics.jsonl")
    kls = [line.get("kl") for line in lines if line["kind"] == "eval"]
    # The model before training is its own reference, and is not compared with itself.
    assert kls[0] is None and all(value > 0 for value in kls[1:])
    assert summary["after"]["kl"] == kls[-1] and "kl" not in summary["before"]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_seconds(tmp_path, a_second_each):
    changes = {"run.steps": 1, "run.min_seconds": 5.0, "run.eval_seconds": 2.0}
    changes |= {"run.eval_every": 0, "run.checkpoint_every": 0}
    config = processes.make(tmp_path, **changes, **{"run.progress": "none"})
    train.run(config)
    metrics = config.out_dir / "metrics.jsonl"
    whole = processes.untimed(metrics)
    # Each evaluation by seconds was saved, and so was the one after run.steps.
    checkpoints = config.out_dir / "checkpoints"
    assert (checkpoints / "step-000004").is_dir()
    for name in ("step-000005", "step-000004"):
        if any(path.name < name for path in checkpoints.iterdir()):
            shutil.rmtree(checkpoints / name)
    (config.out_dir / "summary.json").unlink()
    resumed = train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    assert processes.untimed(metrics) == whole and resumed["iterations"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(("eval_every", "eval_seconds"), [(2, 0.0), (0, 2.0)])
def test_an_evaluation_that_a_stop_left_is_made_when_the_run_goes_on(
    tmp_path, a_second_each, eval_every, eval_seconds
):
    """By its iteration and by its seconds alike; with the numbers of a run that was not stopped."""
    changes = {"run.steps": 1, "run.min_seconds": 3.0, "run.eval_seconds": eval_seconds}
    if eval_every:
        changes = {"run.steps": 3, "run.eval_every": eval_every}
    else:
        changes["run.eval_every"] = 0
    changes |= {"run.checkpoint_every": 2, "run.progress": "none"}
    config = processes.make(tmp_path, **changes)
    train.run(config)
    metrics = config.out_dir / "metrics.jsonl"
    whole = processes.untimed(metrics)
    checkpoints = config.out_dir / "checkpoints"
    shutil.rmtree(checkpoints / "step-000003")
    (config.out_dir / "summary.json").unlink()
    # As the process that was stopped left it: saved after iteration 2, without its evaluation.
    shutil.rmtree(config.out_dir / "evaluations" / "step-000002")
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    left = [line for line in lines if (line["iteration"], line["kind"]) != (2, "eval")]
    assert len(left) == len(lines) - 1
    text = "".join(json.dumps(line) + "\n" for line in left if line["iteration"] <= 2)
    metrics.write_text(text)
    train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    assert processes.untimed(metrics) == whole


def test_what_the_banner_says(tmp_path):
    config = processes.make(tmp_path, **{"run.steps": 4, "run.min_seconds": 30.0})
    text = length(config, 4)
    assert text == "4 iterations = 8 updates, and on until 30 s of training, resumed at 4"


@pytest.mark.parametrize("name", ["min_seconds", "eval_seconds", "eval_kl"])
def test_they_are_not_below_0(tmp_path, name):
    with pytest.raises(ConfigError, match=f"run.{name} is -1.0, but it must be at least 0"):
        processes.make(tmp_path, **{f"run.{name}": -1.0})
