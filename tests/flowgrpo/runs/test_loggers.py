"""Boards: the numbers and pictures that leave the run directory, and what is needed for them."""

from __future__ import annotations

import io
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flowgrpo import train
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.evaluation import evaluate
from flowgrpo.runs import directory, loggers, monitor
from flowgrpo.runs.state import learning_rate
from support import processes


def read(folder) -> EventAccumulator:
    """All that TensorBoard shows of the run in `folder`."""
    return EventAccumulator(str(folder / "tensorboard"), {"scalars": 0, "images": 0}).Reload()


def pictures_of(found: EventAccumulator, tag: str) -> dict[int, np.ndarray]:
    """Step -> picture; a step that is there twice is an error."""
    events = found.Images(tag)
    assert len({event.step for event in events}) == len(events)
    opened = {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events}
    return {step: np.asarray(picture.convert("RGB")) for step, picture in opened.items()}


def of_file(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_numbers_are_flat_and_leave_out_what_is_none():
    line = {"iteration": 3, "kind": "eval", "a": 1, "b": {"c": {"d": 0.5}}, "e": None, "f": [1.0]}
    assert dict(loggers.numbers(line, "eval")) == {"eval/a": 1.0, "eval/b/c/d": 0.5}


def test_a_gradient_norm_for_each_update_is_its_mean_and_the_last():
    found = dict(loggers.numbers({"grad_norm": [1.0, 2.0, 6.0], "interval": [0.0, 1.0]}, "train"))
    assert found == {"train/grad_norm/mean": 3.0, "train/grad_norm/last": 6.0}
    for unknown in ([], [1.0, None]):
        assert dict(loggers.numbers({"grad_norm": unknown}, "train")) == {}


def test_a_board_that_is_not_installed_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "is_installed", lambda name: False)
    config = replace(Config(), **{"run.wandb": "p", "run.out": str(tmp_path / "run")})
    with pytest.raises(ConfigError, match=r"install flowgrpo\[wandb\]"):
        directory.RunDirectory.open(config)
    assert list(tmp_path.iterdir()) == []


class Wandb(types.ModuleType):
    """The part of wandb's interface that is used, with a record of the calls."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.calls: list = []

    def Image(self, picture):
        return ("image", picture.size)

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
    config = replace(Config(), **{"run.wandb": "project", "run.out": str(tmp_path / "run")})
    with directory.RunDirectory.open(config) as run:
        run.log(1, {"reward": torch.tensor(0.5)}, {"update": 2.0})
    with directory.RunDirectory.open(directory.resume_config(tmp_path / "run")) as run:
        run.log(2, {"reward": 0.75})
    first, one, end, second, two, _ = fake.calls
    assert (first["project"], first["name"]) == ("project", "run")
    assert first["config"]["optim"]["lr"] == config.optim.lr
    assert first["id"] == second["id"] and second["resume"] == "allow"
    assert one == ({"train/reward": 0.5, "train/seconds/update": 2.0}, 1) and end == "finish"
    assert two == ({"train/reward": 0.75}, 2)


class Killed(BaseException):
    """As a process that is killed: nothing of the run catches it."""


@pytest.mark.slow
def test_samples_and_learning_rates_of_a_resumed_run_are_those_of_a_whole_one(
    tmp_path, monkeypatch
):
    changes = {"run.steps": 5, "run.eval_every": 2, "run.checkpoint_every": 3, "optim.warmup": 7}
    config = processes.make(tmp_path, **changes, **{"run.eval_guidance": 2.0})
    lines, prompt_batch = config.out_dir / "metrics.jsonl", train.prompt_batch

    def dies(*arguments):
        if '"iteration": 4, "kind": "eval"' in lines.read_text():
            raise Killed
        return prompt_batch(*arguments)

    monkeypatch.setattr(train, "prompt_batch", dies)
    with pytest.raises(Killed):
        train.run(config)
    # What was shown is beyond the checkpoint that the run goes on from.
    assert list(pictures_of(read(config.out_dir), "eval/samples")) == [0, 2, 4]
    monkeypatch.setattr(train, "prompt_batch", prompt_batch)
    train.run(replace(config, **{"run.resume": str(config.out_dir)}))
    whole = replace(config, **{"run.out": str(tmp_path / "whole")})
    train.run(whole)

    one, other = read(config.out_dir), read(whole.out_dir)
    assert one.Tags()["scalars"] == other.Tags()["scalars"]
    for tag in one.Tags()["scalars"]:
        events = [[(e.step, e.value) for e in found.Scalars(tag)] for found in (one, other)]
        if "seconds" in tag:
            events = [[step for step, _ in found] for found in events]
        assert events[0] == events[1], tag
    samples = pictures_of(one, "eval/samples")
    assert list(samples) == [0, 2, 4, 5]
    for step, picture in samples.items():
        path = whole.out_dir / "samples" / f"step-{step:06d}.png"
        assert np.array_equal(picture, of_file(path))
    assert list(pictures_of(one, "guided/samples")) == [0]
    assert not np.array_equal(pictures_of(one, "guided/samples")[0], samples[0])

    logged = [line for line in processes.untimed(lines) if line["kind"] == "train"]
    # Two updates an iteration; the last one's rate.
    assert config.optim.updates_per_iteration == 2
    expected = [learning_rate(config.optim, 2 * i + 1) for i in range(5)]
    assert [line["lr"] for line in logged] == expected and len(set(expected)) == 4
    assert [e.value for e in one.Scalars("train/lr")] == pytest.approx(expected)
    norms = [e.value for e in one.Scalars("train/grad_norm/last")]
    assert norms == pytest.approx([line["grad_norm"][-1] for line in logged])
    assert processes.untimed(lines) == processes.untimed(whole.out_dir / "metrics.jsonl")


def test_what_is_logged_can_be_read_at_once(tmp_path):
    """A process that is killed writes nothing any more."""
    picture = Image.new("RGB", (5, 3), (1, 200, 30))
    with directory.RunDirectory.open(
        replace(Config(), **{"run.out": str(tmp_path / "run")})
    ) as run:
        run.log(3, {"x": 0.5}, kind="eval", pictures={"samples": picture})
        found = read(run.path)
        assert [(e.step, e.value) for e in found.Scalars("eval/x")] == [(3, 0.5)]
        assert np.array_equal(pictures_of(found, "eval/samples")[3], np.asarray(picture))
        assert run.metrics() == [{"iteration": 3, "kind": "eval", "x": 0.5}]


@pytest.mark.slow
def test_weights_and_biases_gets_the_samples(tmp_path, monkeypatch):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = processes.make(tmp_path, **{"run.wandb": "p", "run.steps": 1, "run.eval_every": 1})
    train.run(config)
    logged = [call for call in fake.calls if isinstance(call, tuple)]
    size = Image.open(config.out_dir / "samples" / "step-000001.png").size
    assert [step for _, step in logged] == [0, 1, 1]
    assert logged[2][0]["eval/samples"] == ("image", size)
    assert "eval/samples" not in logged[1][0] and logged[1][0]["train/lr"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_weights_and_biases_that_cannot_start_is_said_before_the_evaluation(
    tmp_path, monkeypatch, resumed
):
    config = processes.make(tmp_path, **{"run.steps": 1, "run.eval_every": 1})
    config = replace(config, **{"run.out": str(tmp_path / "a" / "run")})
    if resumed:
        train.run(config)
        config = replace(config, **{"run.resume": str(config.out_dir), "run.steps": 2})
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    fake = Wandb()

    def init(**options):
        raise RuntimeError("api_key not configured (no-tty).\n  call wandb.login()")

    monkeypatch.setattr(fake, "init", init)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(evaluate, "evaluate", None)
    with pytest.raises(ConfigError) as error:
        train.run(replace(config, **{"run.wandb": "p"}))
    assert str(error.value) == (
        "run.wandb is 'p', but Weights & Biases cannot be started (RuntimeError: api_key not "
        "configured (no-tty). call wandb.login()); run `wandb login`, set WANDB_MODE=offline, or "
        "leave run.wandb out."
    )
    assert isinstance(error.value.__cause__, RuntimeError)
    # The same command can be given again, and a run that is there is as it was.
    assert before == {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    assert config.out_dir.exists() == resumed


@pytest.mark.parametrize(
    "metrics", [{"loss": float("nan")}, {"grad_norm": [1.0, float("inf")]}, {"grad_norm": -1e400}]
)
def test_a_run_that_diverges_says_so(metrics):
    with pytest.raises(monitor.DivergedError, match=r"at iteration 7, .* lower optim.lr"):
        monitor.check_finite({"loss": 0.0, **metrics}, 7)
    monitor.check_finite({"loss": -1.0, "grad_norm": [0.0, 3.0], "kl": None}, 7)


def test_gradients_that_are_none_before_any_update():
    """No learning rate has had a part in them; with float16 its range may."""

    def sentence(norms, iteration, dtype=torch.float32):
        with pytest.raises(monitor.DivergedError) as error:
            monitor.check_finite({"loss": 0.0, "grad_norm": norms}, iteration, dtype)
        return str(error.value)

    nan, lower = float("nan"), "start again with a lower optim.lr or optim.max_grad_norm."
    assert sentence([nan, nan], 1) == (
        "grad_norm is nan at iteration 1, before any update, but a finite number is expected; try "
        "policy.dtype float32 or another policy.attention."
    )
    assert sentence([1.0, nan], 1).endswith(
        f"at iteration 1, but a finite number is expected; {lower}"
    )
    assert sentence([nan], 2).endswith(lower)
    half = "expected; set policy.dtype to bfloat16 or float32"
    assert sentence([nan], 1, torch.float16).endswith(f"{half}.")
    assert sentence([nan], 2, torch.float16).endswith(f"{half}, or {lower}")


def test_a_logger_that_fails_costs_its_numbers_only(tmp_path, monkeypatch, caplog):
    fake = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = replace(Config(), **{"run.out": str(tmp_path / "run"), "run.wandb": "p"})
    with directory.RunDirectory.open(config) as run:
        run.log(1, {"x": 1.0})
        (first, _), log = run.loggers._open, fake.calls.append
        assert first.name == "Weights & Biases"

        def gone(*arguments, **keywords):
            log("called")
            raise ConnectionError("the network is gone")

        run.loggers._open[0] = replace_write(first, gone)
        run.log(2, {"x": 2.0})
        run.log(3, {"x": 3.0})
    assert fake.calls.count("called") == 1
    assert [line["x"] for line in processes.untimed(run.path / "metrics.jsonl")] == [1.0, 2.0, 3.0]
    assert [e.value for e in read(run.path).Scalars("train/x")] == [1.0, 2.0, 3.0]
    (message,) = [r.getMessage() for r in caplog.records if r.name == "flowgrpo"]
    assert message == (
        "Weights & Biases failed (ConnectionError: the network is gone) and gets no more numbers; "
        "metrics.jsonl has them all."
    )


def replace_write(logger, write):
    return loggers.Logger(logger.name, write, logger.close)


def test_events_that_cannot_be_written_are_a_warning(tmp_path, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "file").write_text("x")
    config = replace(Config(), **{"run.out": str(tmp_path / "run")})
    with directory.RunDirectory.open(config) as run:
        (run.path / "tensorboard").symlink_to(tmp_path / "file")
        run.log(1, {"reward": 0.5})
        run.log(2, {"reward": 0.75})
        assert [line["reward"] for line in run.metrics()] == [0.5, 0.75]
    assert caplog.text.count("There are no TensorBoard events") == 1


def test_a_folder_called_wandb_is_not_the_library(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="the package wandb, which it needs, is not installed"):
        loggers.check(replace(Config(), **{"run.wandb": "project"}).run)
