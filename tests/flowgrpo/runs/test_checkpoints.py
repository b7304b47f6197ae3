"""Checkpoints: all or nothing on disk, and every corruption is found before anything changes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time

import pytest
import torch

from flowgrpo import files
from flowgrpo.config import ConfigError, OptimConfig
from flowgrpo.runs import checkpoints
from flowgrpo.runs.state import State
from support import processes


def state_of(seed=0, updates=3, **changes):
    """A small model with a used optimizer and average."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2))
    config = OptimConfig(**{"lr": 0.1, "ema_every": 1, "warmup": 4, **changes})
    state = State.create(model, config)
    use(state, model, updates, seed)
    return state, model


def use(state, model, updates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(updates):
        model(torch.randn(7, 3, generator=generator)).square().mean().backward()
        state.step()
        state.iteration += 1


def save(state, folder, score=None):
    record = {**state.counters(), "score": score}
    return checkpoints.save(folder / "checkpoints", state.iteration, state.tensors(), record)


def bits(state):
    return {
        f"{stem}|{name}": tensor.clone().reshape(-1).view(torch.uint8).numpy().tobytes()
        for stem, tensors in state.tensors().items()
        for name, tensor in tensors.items()
    }


@pytest.mark.parametrize("changes", [{}, {"ema_decay": 0.0}, {"ema_every": 2}])
def test_restored_state_goes_on_with_the_same_bits(tmp_path, changes):
    state, model = state_of(**changes)
    state.totals = {"seconds": {"rollout": 1.5}, "max_ratio_error": 0.0}
    path = save(state, tmp_path)
    other, other_model = state_of(seed=9, updates=1, **changes)
    addresses = [p.data_ptr() for p in other_model.parameters()]
    other.restore(path)
    assert bits(other) == bits(state)
    assert (other.iteration, other.updates, other.ema.updates) == (3, 3, 3)
    assert other.totals == state.totals
    for s, m in ((state, model), (other, other_model)):
        use(s, m, 4, seed=3)
    assert bits(other) == bits(state)
    assert [p.data_ptr() for p in other_model.parameters()] == addresses


def test_a_state_before_the_first_update_is_restored(tmp_path):
    state, _ = state_of(updates=0)
    path = save(state, tmp_path)
    other, _ = state_of(seed=1, updates=2)
    other.restore(path)
    assert bits(other) == bits(state) and other.updates == 0


def damage_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-10])


def write_json(path):
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "format": "another-2"}))


DAMAGE = [
    ("weights.safetensors", damage_byte, "SHA-256"),
    ("optimizer.safetensors", damage_byte, "SHA-256"),
    ("ema.safetensors", cut, "SHA-256"),
    ("weights.safetensors", lambda path: path.unlink(), "No such file"),
    ("state.json", cut, "cannot be read"),
    ("state.json", write_json, "its format is 'another-2'"),
    ("state.json", lambda path: path.write_text("{}"), "'format'"),
    ("state.json", lambda path: path.write_bytes(b"\xff\xfe"), "cannot be read"),
]


@pytest.mark.parametrize(("name", "damage", "words"), DAMAGE)
def test_damage_is_found_and_nothing_is_changed(tmp_path, name, damage, words):
    path = save(state_of()[0], tmp_path)
    damage(path / name)
    other, _ = state_of(seed=1)
    before = bits(other)
    with pytest.raises(ConfigError, match=words) as caught:
        other.restore(path)
    assert str(path / name) in str(caught.value) and f"remove {path}" in str(caught.value)
    assert bits(other) == before and other.iteration == 3


def test_another_model_is_refused_and_nothing_is_changed(tmp_path):
    path = save(state_of()[0], tmp_path)
    one, two = torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)
    models = {
        "weights.safetensors lacks 2.bias (2 such of 6": [one, two, torch.nn.Linear(2, 2)],
        "weights.safetensors also holds 1.bias (2 such of 2": [one],
        "weights.safetensors differs in 1.bias": [one, torch.nn.Linear(5, 4)],
        "weights.safetensors differs in 0.bias": [torch.nn.Linear(3, 5, dtype=torch.bfloat16), two],
    }
    for words, layers in models.items():
        state = State.create(torch.nn.Sequential(*layers), OptimConfig())
        before = bits(state)
        with pytest.raises(ConfigError) as caught:
            state.restore(path)
        assert words in str(caught.value)
        assert bits(state) == before


def test_moments_of_another_model_are_refused(tmp_path):
    state, _ = state_of()
    tensors = state.tensors()
    tensors["optimizer"]["0.weight|exp_avg"] = torch.zeros(5, 4)
    path = checkpoints.save(tmp_path, 3, tensors, state.counters())
    other, _ = state_of(seed=1)
    before = bits(other)
    with pytest.raises(ConfigError, match=r"optimizer.safetensors holds 0.weight.exp_avg .5, 4."):
        other.restore(path)
    assert bits(other) == before


def test_the_last_two_and_the_best_are_kept(tmp_path):
    state, model = state_of(updates=0)
    for score in (0.1, 0.9, None, 0.3, 0.2, None):
        use(state, model, 1)
        save(state, tmp_path, score)
        checkpoints.prune(tmp_path / "checkpoints")
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000002", "step-000005", "step-000006"]
    assert checkpoints.best(tmp_path).name == "step-000002"
    assert checkpoints.latest(tmp_path).name == "step-000006"
    assert checkpoints.latest(tmp_path / "checkpoints" / "step-000005").name == "step-000005"
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        checkpoints.latest(tmp_path / "checkpoints")


def test_an_old_checkpoint_that_cannot_go_is_a_warning(tmp_path, monkeypatch, caplog):
    state, model = state_of(updates=0)
    for _ in range(4):
        use(state, model, 1)
        save(state, tmp_path)

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoints.shutil, "rmtree", busy)
    checkpoints.prune(tmp_path / "checkpoints")
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and "step-000001 cannot be removed" in messages[0]
    assert all("Device or resource busy" in message for message in messages)
    names = [path.name for path in checkpoints.list_checkpoints(tmp_path / "checkpoints")]
    assert names == ["step-000003", "step-000004"]
    monkeypatch.undo()
    checkpoints.clean(tmp_path / "checkpoints")
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == names


def test_saving_again_replaces(tmp_path):
    state, _ = state_of()
    save(state, tmp_path, 0.1)
    assert checkpoints.read_state(save(state, tmp_path, 0.2))["record"]["score"] == 0.2
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000003"]


def test_a_failed_save_leaves_nothing_behind_that_counts(tmp_path):
    state, _ = state_of()

    def fail(folder):
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoints.save(tmp_path, 3, state.tensors(), state.counters(), fail)
    assert checkpoints.list_checkpoints(tmp_path) == []
    checkpoints.clean(tmp_path)
    assert list(tmp_path.iterdir()) == []


def _save_for_ever(folder):
    state, model = state_of()
    while True:
        use(state, model, 1)
        save(state, folder)
        checkpoints.prune(folder / "checkpoints")


@pytest.mark.slow
def test_killed_at_any_moment_the_newest_checkpoint_is_whole(tmp_path):
    for number in range(6):
        folder = tmp_path / str(number)
        process = processes.Fork(tmp_path / f"log{number}", _save_for_ever, folder)
        while not checkpoints.list_checkpoints(folder / "checkpoints"):
            time.sleep(0.001)
        time.sleep(0.02 + 0.0037 * number)
        process.kill(signal.SIGKILL)
        process.wait(code=-signal.SIGKILL)
        state, _ = state_of(seed=1)
        newest = checkpoints.latest(folder)
        state.restore(newest)
        expected, model = state_of()
        for _ in range(state.iteration - 3):
            use(expected, model, 1)
        assert bits(state) == bits(expected)


OPERATIONS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Audit events of file operations; each is raised before it happens."""


def _killed_before_operation(number, state, folder) -> bool:
    """Save in a process that is killed before its file operation `number`; False: it has fewer."""
    process = os.fork()
    if not process:
        count = 0

        def watch(event, arguments):
            nonlocal count
            if event in OPERATIONS:
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        save(state, folder, 0.2)
        checkpoints.prune(folder / "checkpoints")
        os._exit(0)
    _, status = os.waitpid(process, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, -signal.SIGKILL)
    return code != 0


def _killed_before_each_operation(folder):
    state, model = state_of()
    saved = {}
    while state.iteration < 7:
        use(state, model, 1)
        # The newest is saved again, as at the end of a run, and an older one is removed.
        before = save(state, folder, {4: 1.0}.get(state.iteration))
        saved[before.name] = bits(state)
    whole = folder.with_name("whole")
    folder.rename(whole)
    number = 1
    while _killed_before_operation(number, state, shutil.copytree(whole, folder)):
        files.remove_leftovers(folder)
        listed = checkpoints.list_checkpoints(folder / "checkpoints")
        assert sorted((folder / "checkpoints").iterdir()) == listed, number
        names = [path.name for path in listed]
        assert names in (list(saved), ["step-000004", "step-000006", "step-000007"]), number
        for path in listed:
            restored, _ = state_of(seed=1)
            restored.restore(path)
            assert bits(restored) == saved[path.name], number
        shutil.rmtree(folder)
        number += 1
    print(number, "operations")


def test_killed_before_any_file_operation_each_checkpoint_is_whole_or_gone(tmp_path):
    run = processes.Fork(tmp_path / "log", _killed_before_each_operation, tmp_path / "run")
    operations, _, word = run.wait().strip().rpartition(" ")
    assert word == "operations" and int(operations) > 15


def test_a_damaged_old_checkpoint_ends_no_run(tmp_path, caplog):
    """The run goes on from another; none is removed, as the best is not known."""
    state, model = state_of(updates=0)
    for _ in range(4):
        use(state, model, 1)
        save(state, tmp_path)
    (tmp_path / "checkpoints" / "step-000001" / checkpoints.STATE).write_text("{")
    checkpoints.prune(tmp_path / "checkpoints")
    assert len(checkpoints.list_checkpoints(tmp_path / "checkpoints")) == 4
    assert "No old checkpoint is removed" in caplog.text and "step-000001" in caplog.text
