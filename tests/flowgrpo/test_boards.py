"""Boards: the numbers that leave the run directory, and what is needed for them."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from flowgrpo import boards, reports, runs
from flowgrpo.config import Config, ConfigError, replace


def test_numbers_are_flat_and_leave_out_what_is_none():
    line = {"iteration": 3, "kind": "eval", "a": 1, "b": {"c": {"d": 0.5}}, "e": None, "f": [1.0]}
    assert dict(boards.numbers(line, "eval")) == {"eval/a": 1.0, "eval/b/c/d": 0.5}


def test_a_board_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    config = replace(Config(), **{"run.wandb": "p", "run.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"install flowgrpo\[wandb\]"):
        runs.Run.open(config)
    assert list(tmp_path.iterdir()) == []


class Wandb(types.ModuleType):
    """The part of wandb's interface that is used, with a record of the calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list = []

    def init(self, **options):
        self.calls.append(options)
        return self

    def log(self, numbers, step):
        self.calls.append((numbers, step))

    def finish(self):
        self.calls.append("finish")


def test_a_resumed_run_goes_on_in_the_same_record(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: name)
    config = replace(Config(), **{"run.wandb": "project", "run.out": str(tmp_path / "run")})
    with runs.Run.open(config) as run:
        run.log(1, {"reward": torch.tensor(0.5)}, {"update": 2.0})
    with runs.Run.open(runs.resume_config(tmp_path / "run")) as run:
        run.log(2, {"reward": 0.75})
    first, one, end, second, two, _ = fake.calls
    assert (first["project"], first["name"]) == ("project", "run")
    assert first["config"]["optim"]["lr"] == config.optim.lr
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert one == ({"train/reward": 0.5, "train/seconds/update": 2.0}, 1) and end == "finish"
    assert two == ({"train/reward": 0.75}, 2)


@pytest.mark.parametrize(
    "metrics", [{"loss": float("nan")}, {"grad_norm": [1.0, float("inf")]}, {"grad_norm": -1e400}]
)
def test_a_run_that_diverges_says_so(metrics):
    with pytest.raises(reports.DivergedError, match=r"at iteration 7, .* lower optim.lr"):
        reports.check_finite({"loss": 0.0, **metrics}, 7)
    reports.check_finite({"loss": -1.0, "grad_norm": [0.0, 3.0], "kl": None}, 7)
