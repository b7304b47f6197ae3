"""The run directory: what it refuses, what it writes, how it is stopped."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from flowgrpo import files
from flowgrpo.config import Config, ConfigError, replace, to_json
from flowgrpo.runs import checkpoints, directory
from flowgrpo.runs.process import stoppable, versions
from flowgrpo.runs.state import State


def config_for(folder: Path, **changes) -> Config:
    return replace(Config(), **{"run.out": str(folder), **changes})


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def small_state(config: Config) -> tuple[State, torch.nn.Module]:
    """A state whose transformer is not one: export is tested in test_state.py."""
    model = torch.nn.Linear(2, 2)
    return State.create(model, config.optim), model


def save(run: directory.RunDirectory, state: State, score: float | None = None) -> None:
    record = {**state.counters(), "score": score, "versions": versions()}
    checkpoints.save(run.checkpoints, state.iteration, state.tensors(), record)


def test_a_new_run_holds_its_configuration(tmp_path):
    config = config_for(tmp_path / "a" / "run")
    with directory.RunDirectory.open(config) as run:
        assert (run.path / "config.json").read_text() == to_json(config)
        assert tree(run.path) == {"config.json", "metrics.jsonl", "samples", "checkpoints"}
    resumed = directory.resume_config(tmp_path / "a" / "run")
    assert resumed == replace(config, **{"run.resume": str(tmp_path / "a" / "run")})


def test_a_directory_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    for call in (directory.check_directory, directory.RunDirectory.open):
        with pytest.raises(ConfigError, match=r"is not empty.*--run.resume"):
            call(config_for(tmp_path))
    assert tree(tmp_path) == {"note.txt"}


def test_the_directory_of_a_run_that_never_began_is_used_again(tmp_path):
    """As one whose first evaluation failed, or that was killed in it, leaves it."""
    before = config_for(tmp_path, **{"run.seed": 1})
    with directory.RunDirectory.open(before) as run:
        run.log(0, {"accuracy": 0.5}, kind="eval")
        for folder in ("tensorboard", "evaluations"):
            (run.path / folder).mkdir(exist_ok=True)
            (run.path / folder / "left").write_text("x")
        (run.checkpoints / ".step-000000.0").mkdir()
        # That it is being written does not show in its files.
        for call in (directory.check_directory, directory.RunDirectory.open):
            with pytest.raises(ConfigError, match="is not empty"):
                call(config_for(tmp_path))
        assert len(run.metrics()) == 1 and (run.path / "evaluations" / "left").exists()
    config = config_for(tmp_path)
    directory.check_directory(config)
    assert (tmp_path / "evaluations" / "left").exists()
    with directory.RunDirectory.open(config) as run:
        assert run.metrics() == [] and (run.path / "config.json").read_text() == to_json(config)
        run.log(0, {"accuracy": 0.25}, kind="eval")
        assert [line["accuracy"] for line in run.metrics()] == [0.25]
    assert not {name for name in tree(tmp_path) if "left" in name or ".step" in name}


@pytest.mark.parametrize(
    "change", ["checkpoint", "damaged", "note", "lines", "no config", "another's config"]
)
def test_a_directory_with_anything_to_lose_is_refused(tmp_path, change):
    config = config_for(tmp_path)
    with directory.RunDirectory.open(config) as run:
        if change == "checkpoint":
            save(run, small_state(config)[0])
        elif change == "damaged":
            (run.checkpoints / "step-000010").mkdir()
        elif change == "lines":
            run.log(1, {"reward": 0.5})
    if change == "note":
        (tmp_path / "notes.txt").write_text("mine")
    elif change == "no config":
        (tmp_path / "config.json").unlink()
    elif change == "another's config":
        # Of another program, whose samples/ would be removed.
        (tmp_path / "config.json").write_text('{"model_type": "clip"}')
        (tmp_path / "samples" / "mine.png").write_bytes(b"x")
    before = tree(tmp_path)
    for call in (directory.check_directory, directory.RunDirectory.open):
        with pytest.raises(ConfigError, match=r"is not empty.*--run.resume"):
            call(config)
    assert tree(tmp_path) == before


def test_a_directory_that_cannot_be_made_is_refused(tmp_path):
    """Under a file, and where the system refuses: nothing is left behind."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file" / "run", tmp_path / "file", Path("/proc/flowgrpo/run")):
        with pytest.raises(
            ConfigError, match=r"cannot be written \(.+\).*choose another --run.out"
        ):
            directory.RunDirectory.open(config_for(out))
    assert tree(tmp_path) == {"file"}


def test_a_folder_made_for_a_run_that_cannot_be_written_goes_again(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(ConfigError, match="No space left"):
        directory.RunDirectory.open(config_for(tmp_path / "a" / "b" / "run"))
    assert tree(tmp_path) == set()


def test_one_process_at_a_time(tmp_path):
    config = config_for(tmp_path / "run")
    with (
        directory.RunDirectory.open(config) as run,
        pytest.raises(ConfigError, match="in use by another process"),
    ):
        directory.RunDirectory.open(directory.resume_config(run.path))
    directory.RunDirectory.open(directory.resume_config(tmp_path / "run")).close()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog, number):
    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with directory.RunDirectory.open(config_for(tmp_path / "run")) as run:
        run.log(0, {"x": 1})
    assert (
        run.path.joinpath("metrics.jsonl").read_text()
        == '{"iteration": 0, "kind": "train", "x": 1}\n'
    )
    (message,) = [record.getMessage() for record in caplog.records]
    assert f"cannot be locked ({os.strerror(number)})" in message
    assert "in use" not in message
    # A second process may be at work there, so it is no run that never began.
    with pytest.raises(ConfigError, match="is not empty"):
        directory.check_directory(config_for(tmp_path / "run"))


def test_a_run_that_cannot_be_written_any_more_is_refused(tmp_path, monkeypatch):
    directory.RunDirectory.open(config_for(tmp_path / "run")).close()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    (tmp_path / "run" / "metrics.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"run' cannot be written \(Is a directory\)"):
        directory.RunDirectory.open(directory.resume_config(tmp_path / "run"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optim.lr": 0.5}, r"optim.lr is 0.5, but the run in .* was started with 0.0003"),
        ({"run.seed": 3}, "run.seed is 3"),
        ({"sample.window_range": (0, 5)}, r"sample.window_range is \[0, 5\]"),
        ({"recipe": "other"}, "recipe is 'other'"),
        ({"reward.weights": {"x": 1.0}}, "reward.weights"),
    ],
)
def test_going_on_with_another_configuration_is_refused(tmp_path, changes, words):
    directory.RunDirectory.open(config_for(tmp_path / "run")).close()
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}
    with pytest.raises(ConfigError, match=words):
        directory.RunDirectory.open(replace(directory.resume_config(tmp_path / "run"), **changes))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").glob("*.json*")}


def test_what_does_not_change_the_numbers_may_change(tmp_path):
    directory.RunDirectory.open(config_for(tmp_path / "run")).close()
    changes = {"run.steps": 7, "run.eval_every": 1, "run.threads": 1, "run.progress": "none"}
    changes |= {"policy.offload_text_encoders": True, "sample.overlap": 0}
    # Which of the model's files, as content.py compares them; and a GPU that is not there now.
    changes |= {"policy.variant": "fp16", "sample.capture": "off"}
    again = directory.RunDirectory.open(
        replace(directory.resume_config(tmp_path / "run"), **changes)
    )
    again.close()
    assert again.config.run.steps == 7 and again.config.sample.overlap == 0


def test_the_places_of_files_may_change(tmp_path):
    """Another variant of the weights, whose content is compared, and an adapter that is copied."""
    first = {"policy.init_adapter": "a", "policy.variant": "fp16"}
    directory.RunDirectory.open(config_for(tmp_path / "run", **first)).close()
    before = directory.resume_config(tmp_path / "run")
    changes = {"policy.init_adapter": "b", "policy.variant": ""}
    directory.RunDirectory.open(replace(before, **changes)).close()
    with pytest.raises(ConfigError, match=r"init_adapter is '', but the run in .* with 'a'"):
        directory.RunDirectory.open(replace(before, **{"policy.init_adapter": ""}))


def test_a_run_without_an_adapter_does_not_get_one(tmp_path):
    directory.RunDirectory.open(config_for(tmp_path / "run")).close()
    changed = replace(directory.resume_config(tmp_path / "run"), **{"policy.init_adapter": "a"})
    with pytest.raises(ConfigError, match=r"init_adapter is 'a', but the run in .* with ''"):
        directory.RunDirectory.open(changed)


def services(first: str, second: str, **options) -> dict:
    weights = {"ocr": 0.5, first: 1.0, second: 2.0}
    report = ("ocr", second, "http://other")
    return {"reward.weights": weights, "reward.report": report, "reward.options": options}


def test_services_may_change(tmp_path):
    before = services("http://a:1", "http://b:2", **{"http://a:1.token": "x", "ocr.language": "en"})
    directory.RunDirectory.open(config_for(tmp_path / "run", **before)).close()
    changes = {
        **services("https://c", "http://d/e", **{"ocr.language": "en", "http://d/e.url": "f"}),
        "reward.timeout": 5.0,
        "reward.retries": 7,
        "policy.model": "elsewhere",
        "policy.device": "cuda:1",
        "sample.prompts": "elsewhere.txt",
    }
    config = replace(directory.resume_config(tmp_path / "run"), **changes)
    with directory.RunDirectory.open(config) as run:
        assert run.config.reward.retries == 7


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reward.weights": {"ocr": 0.5, "http://c": 1.0, "http://d": 3.0}}, "reward.weights is"),
        ({"reward.weights": {"ocr": 0.5, "http://c": 1.0}}, "reward.weights is"),
        ({"reward.weights": {"ocr": 0.5, "http://c": 1.0, "clipscore": 2.0}}, "reward.weights is"),
        ({"reward.report": ("http://b:2", "ocr", "http://other")}, "reward.report is"),
        ({"reward.report": ("ocr", "http://a:1", "http://other")}, "reward.report is"),
        ({"reward.options": {"ocr.language": "fr"}}, "reward.options is"),
        ({"reward.options": {"ocr.language": "en", "http://a:1.batch_size": "3"}}, "reward.opt"),
    ],
)
def test_what_services_count_for_may_not_change(tmp_path, changes, words):
    before = services("http://a:1", "http://b:2", **{"ocr.language": "en"})
    directory.RunDirectory.open(config_for(tmp_path / "run", **before)).close()
    with pytest.raises(ConfigError, match=words):
        directory.RunDirectory.open(replace(directory.resume_config(tmp_path / "run"), **changes))


@pytest.mark.parametrize("content", [None, "{", '{"optim": {"lrr": 1}}'])
def test_resuming_what_is_no_run_is_refused(tmp_path, content):
    if content:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError):
        directory.resume_config(tmp_path)


def test_metrics_are_plain_json_and_times_stand_apart(tmp_path):
    with directory.RunDirectory.open(config_for(tmp_path / "run")) as run:
        values = {
            "a": torch.tensor(1.5),
            "nested": {"b": [torch.tensor([1, 2]), 3]},
            "bad": float("nan"),
            "worse": torch.tensor(float("-inf")),
            "flag": True,
        }
        run.log(4, values, {"rollout": 0.25})
        run.log(5, {"accuracy": 0.5}, kind="eval")
        lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
        assert lines[0] == {
            "iteration": 4,
            "kind": "train",
            "a": 1.5,
            "nested": {"b": [[1, 2], 3]},
            "bad": None,
            "worse": None,
            "flag": True,
            "seconds": {"rollout": 0.25},
        }
        assert run.metrics("eval") == lines[1:]


def test_tensorboard_reads_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with directory.RunDirectory.open(config_for(tmp_path / "run")) as run:
        for iteration in (1, 2):
            run.log(iteration, {"reward": iteration / 8, "rewards": {"x": 2.0}}, {"update": 1.0})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert {"train/reward", "train/rewards/x", "train/seconds/update"} <= set(
        events.Tags()["scalars"]
    )
    found = [(event.step, event.value) for event in events.Scalars("train/reward")]
    assert found == [(1, 0.125), (2, 0.25)]


def test_resuming_cuts_the_metrics_back_to_the_checkpoint(tmp_path):
    config = config_for(tmp_path / "run")
    with directory.RunDirectory.open(config) as run:
        state, _ = small_state(config)
        assert not run.restore(state)
        run.log(0, {"accuracy": 0.5}, kind="eval")
        for state.iteration in (1, 2, 3):
            run.log(state.iteration, {"x": state.iteration})
            if state.iteration == 2:
                save(run, state)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + b'{"iteration": 4, "ki')
    with directory.RunDirectory.open(directory.resume_config(run.path)) as run:
        state, _ = small_state(config)
        assert run.restore(state) and state.iteration == 2
        assert path.read_bytes() == b"".join(whole[:3])
        run.log(3, {"x": 3})
        assert path.read_bytes() == b"".join(whole)


@pytest.mark.parametrize("blank", [b"\n", b"  \n", b"\r\n"])
def test_a_blank_line_in_the_metrics_costs_no_other(tmp_path, blank):
    config = config_for(tmp_path / "run")
    with directory.RunDirectory.open(config) as run:
        state, _ = small_state(config)
        for state.iteration in (1, 2, 3):
            run.log(state.iteration, {"x": state.iteration})
            if state.iteration == 2:
                save(run, state)
    path = tmp_path / "run" / "metrics.jsonl"
    one, two, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + blank + two + three)
    with directory.RunDirectory.open(directory.resume_config(run.path)) as run:
        assert [line["x"] for line in run.metrics()] == [1, 2, 3]
        assert run.restore(small_state(config)[0])
        assert path.read_bytes() == one + blank + two
        assert [line["x"] for line in run.metrics("train")] == [1, 2]


def test_a_damaged_checkpoint_leaves_the_metrics_alone(tmp_path):
    config = config_for(tmp_path / "run")
    with directory.RunDirectory.open(config) as run:
        state, _ = small_state(config)
        run.log(1, {"x": 1})
        save(run, state)
    before = (run.path / "metrics.jsonl").read_bytes()
    (run.checkpoints / "step-000000" / "ema.safetensors").write_bytes(b"\0" * 100)
    with (
        directory.RunDirectory.open(directory.resume_config(run.path)) as run,
        pytest.raises(ConfigError, match="ema"),
    ):
        run.restore(small_state(config)[0])
    assert (run.path / "metrics.jsonl").read_bytes() == before


@pytest.fixture
def default_sigint():
    """Python's own handler, also where the tests run in the background and Ctrl-C is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_first_signal_asks_and_second_aborts(capfd, default_sigint):
    with stoppable() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "Finishing this iteration" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGTERM])
def test_a_scheduler_asks_once_by_several_signals(capfd, default_sigint, first):
    before = signal.getsignal(first)
    with stoppable() as stop:
        os.kill(os.getpid(), first)
        assert stop.requested and "Ctrl-C to abort at once" in capfd.readouterr().err
        for number in (first, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(first) == before


def test_a_handler_of_the_callers_stays(default_sigint):
    calls = []
    before = signal.signal(signal.SIGUSR1, lambda *arguments: calls.append("mine"))
    try:
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert calls == ["mine"] and not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_end_of_the_terminal_asks_too(default_sigint):
    """With stderr gone as well; but not under nohup, which has it ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    stderr, (reader, writer) = os.dup(2), os.pipe()
    os.close(reader)
    try:
        os.dup2(writer, 2)
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stoppable() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        os.dup2(stderr, 2)
        signal.signal(signal.SIGHUP, before)
        for number in (stderr, writer):
            os.close(number)


def test_stoppable_in_a_thread_changes_no_handler():
    before, found = signal.getsignal(signal.SIGINT), []

    def work():
        with stoppable() as stop:
            found.append((stop.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_a_run_that_was_killed_before_its_configuration_begins_again(tmp_path):
    leftover = tmp_path / f".config.json.{'0a' * 16}"
    leftover.write_text('{"reci')
    directory.check_directory(config_for(tmp_path))
    with directory.RunDirectory.open(config_for(tmp_path)):
        assert tree(tmp_path) == {"config.json", "metrics.jsonl", "samples", "checkpoints"}


def test_a_checkpoint_that_was_set_aside_is_gone_on_from(tmp_path):
    """A process killed while it saved the same iteration again leaves it under another name."""
    config = config_for(tmp_path / "run")
    with directory.RunDirectory.open(config) as run:
        state, _ = small_state(config)
        state.iteration = 3
        save(run, state)
        name = run.checkpoints / "step-000003"
        name.rename(run.checkpoints / f".{name.name}.{'0a' * 16}.old")
        (run.checkpoints / f".{name.name}.{'0a' * 16}").mkdir()
    resumed = directory.resume_config(tmp_path / "run")
    with directory.RunDirectory.open(resumed) as run:
        state, _ = small_state(config)
        assert run.restore(state) and state.iteration == 3
        assert [path.name for path in run.checkpoints.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("content", [b"\x80", b"[" * 100_000, b"{", b'{"run": 3}'])
def test_a_configuration_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"config.json cannot be read|JSON|is expected"):
        directory.resume_config(tmp_path)


def test_a_name_that_is_no_path_is_refused():
    with pytest.raises(ConfigError, match=r"cannot be read .embedded null byte"):
        directory.resume_config("a\0b")


def own(folder: str, **options) -> dict:
    weights = {f"{folder}/mine.py:score": 1.0, "clipscore": 2.0}
    report = (f"{folder}/mine.py:score", f"{folder}/other.py:score")
    options = {f"{folder}/mine.py:score.scale": "2", **options}
    return {"reward.weights": weights, "reward.report": report, "reward.options": options}


def test_files_and_models_of_rewards_may_move(tmp_path):
    """What lies there is compared by content.py."""
    before = own("/old", **{"clipscore.model": "/old/clip", "clipscore.device": "cuda:0"})
    directory.RunDirectory.open(config_for(tmp_path / "run", **before)).close()
    changes = own("/new/place", **{"clipscore.model": "/new/clip"})
    directory.RunDirectory.open(
        replace(directory.resume_config(tmp_path / "run"), **changes)
    ).close()
    stored = directory.resume_config(tmp_path / "run")
    for other in (
        {"reward.weights": {"/new/mine.py:other": 1.0, "clipscore": 2.0}},
        {"reward.weights": {"/new/mine.py:score": 1.5, "clipscore": 2.0}},
        {"reward.options": {"/old/mine.py:score.scale": "3"}},
    ):
        with pytest.raises(ConfigError, match="leave it as it was"):
            directory.RunDirectory.open(replace(stored, **{**own("/new"), **other}))


def test_two_files_of_one_name_are_told_apart(tmp_path):
    weights = {"a/mine.py:score": 1.0, "b/mine.py:score": 1.0}
    directory.RunDirectory.open(config_for(tmp_path / "run", **{"reward.weights": weights})).close()
    stored = directory.resume_config(tmp_path / "run")
    directory.RunDirectory.open(stored).close()
    swapped = dict.fromkeys(("a/mine.py:score", "c/mine.py:score"), 1.0)
    with pytest.raises(ConfigError, match=r"reward\.weights is"):
        directory.RunDirectory.open(replace(stored, **{"reward.weights": swapped}))


@pytest.mark.parametrize(
    "line", [b"no json\n", b"3\n", b"{}\n", b'{"iteration": "x"}\n', b"\xff\n"]
)
def test_a_damaged_line_among_the_metrics_costs_no_other(tmp_path, line):
    """What follows it is not written again, so it must not be cut off."""
    config = config_for(tmp_path / "run")
    with directory.RunDirectory.open(config) as run:
        state, _ = small_state(config)
        for state.iteration in (1, 2, 3):
            run.log(state.iteration, {"x": state.iteration})
            if state.iteration == 2:
                save(run, state)
    path = tmp_path / "run" / "metrics.jsonl"
    one, two, three = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(one + line + two + three)
    with (
        directory.RunDirectory.open(directory.resume_config(tmp_path / "run")) as run,
        pytest.raises(ConfigError, match=r"line 2 of .*metrics.jsonl is .*; restore it, or remove"),
    ):
        run.restore(small_state(config)[0])
    assert path.read_bytes() == one + line + two + three
    # Behind the checkpoint's it goes with what comes again.
    path.write_bytes(one + two + line + three)
    with directory.RunDirectory.open(directory.resume_config(tmp_path / "run")) as run:
        assert run.restore(small_state(config)[0])
    assert path.read_bytes() == one + two


@pytest.mark.parametrize("out", ["x" * 300, "/" + "y/" * 3000, "a\0b"])
def test_names_that_are_no_directories(out):
    for call in (directory.check_directory, directory.RunDirectory.open):
        with contextlib.suppress(ConfigError):
            call(config_for(Path(out)))
    with pytest.raises(ConfigError, match=r"cannot be written \(.*choose another --run.out"):
        directory.RunDirectory.open(config_for(Path(out)))


def test_the_home_of_nobody():
    with pytest.raises(ConfigError, match="home directory of ~no-such-user is not known"):
        config_for(Path("~no-such-user/run"))
    with pytest.raises(ConfigError, match="cannot be read"):
        directory.resume_config("~no-such-user/run")


def test_the_working_directory_of_a_run_may_change(tmp_path, monkeypatch):
    """By code of the user's, in mid-run."""
    monkeypatch.chdir(tmp_path)
    config = config_for(Path("run"))
    (tmp_path / "elsewhere").mkdir()
    with directory.RunDirectory.open(config) as run:
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.log(1, {"x": 1})
        save(run, small_state(config)[0])
        assert len(run.metrics()) == 1
    assert tree(tmp_path / "elsewhere") == set()
    assert (tmp_path / "run" / "checkpoints" / "step-000000").is_dir()
