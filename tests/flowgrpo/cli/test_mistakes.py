"""Mistakes on the command line, and what ends a run: one sentence each, and no traceback."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from safetensors import SafetensorError

from flowgrpo import train, update
from flowgrpo.cli import main
from flowgrpo.distributed import world
from flowgrpo.runs import monitor
from support import processes

MISTAKES = [
    ("paint", "'paint' is no command"),
    ("train nanno", "did you mean 'nano'?"),
    ("train --sample.batch_size 50", "divides 288"),
    ("train --optim.updates-per-iteration 5", "does not divide the 2 chunks"),
    ("train --optim.guard --sample.transition cps", "choose flow_sde or dance_sde"),
    ("train --reward.weights nano_strict", "NAME WEIGHT, repeated"),
    ("train --reward.weights nano_strict x", "NAME WEIGHT, repeated"),
    ("train --reward.weights nano_strict 1 nano_strict 2", "'nano_strict' is given twice"),
    ("train --reward.options a.b 1 c.d 2 a.b 3", "'a.b' is given twice"),
    ("train --run.resume /no/such", "/no/such/config.json cannot be read"),
    ("train --run.out /proc/x --policy.model /no/such", "policy.model is '/no/such'"),
    ("evaluate /no/such", "neither a run directory nor a recipe"),
    ("evaluate .", "holds no checkpoint"),
    ("sample", "no prompt was given"),
    ("sample x\ud83d", "a prompt has '\\ud83d' in 'x\\ud83d'"),
    ("sample x --count 0", "at least one image is expected"),
    ("sample x --seed -1", "--seed is -1, but it must be at least 0"),
    ("sample x --seed 9223372036854775808", "--seed is 9223372036854775808, but it must be below"),
    ("sample x --steps 0", "--steps is 0, but it must be greater than 0"),
    ("evaluate nano --guidance 0", "--guidance is 0.0, but it must be greater than 0"),
    ("evaluate nano --cfg nan", "--cfg is nan, but it must be greater than 0"),
    ("evaluate nano --prompts -1", "--prompts is -1, but it must be at least 0"),
    ("evaluate nano --split trian", "the split is 'trian', but one of train"),
    ("sample x --run /no/such", "neither a run directory nor a recipe"),
    ("serve-reward nano_stric", "reward 'nano_stric' is unknown"),
    ("serve-reward nano_strict --host 0.0.0.0", "without a token"),
    ("serve-reward nano_strict --port 65536", "cannot listen on 127.0.0.1 port 65536"),
    ("doctor now", "takes no options"),
    (f"evaluate {'x' * 300}", "neither a run directory nor a recipe"),
    (f"train --run.resume {'x' * 300}", "cannot be read (File name too long)"),
    (f"train --policy.model {'x' * 300}", "which is no folder and could not be got from"),
    ("train --run.out=~no-such-user/x", "home directory of ~no-such-user is not known"),
    (f"sample x --out {'y' * 300}.png", "which cannot be written (File name too long)"),
    ("sample x --out a\0b.png", "which cannot be written (embedded null byte)"),
    ("sample x --out=", "--out is empty"),
    ("serve-reward nano_strict --host a\0b --token t", "choose another port or address"),
    ("train --reward.weights localhost:8400 1", "write the address of a server as http://local"),
    ("evaluate no-file.py:recipe", "there is no file"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_one_sentence_and_code_2(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main.main(line.split()) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_half_of_what_a_launcher_sets_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main.main(["train", "--run.out", "there"]) == 2
    shown = capsys.readouterr()
    assert shown.err == (
        "error: the environment has RANK, WORLD_SIZE and no LOCAL_RANK, MASTER_ADDR, MASTER_PORT, "
        "but a launcher sets all of RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start "
        "with torchrun, or unset WORLD_SIZE and RANK for one process.\n"
    )
    assert list(tmp_path.iterdir()) == [] and shown.out == ""


def test_several_processes_do_not_compare(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main.main(["compare", "kl"]) == 2
    shown = capsys.readouterr()
    assert "WORLD_SIZE is 2" in shown.err and "flowgrpo compare is one process" in shown.err


@pytest.mark.parametrize("size", ["1", ""])
def test_one_process_may_have_the_variable(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    assert world.join() is world.ALONE


def test_a_module_of_the_user_that_cannot_be_imported(capsys, tmp_path, monkeypatch):
    (tmp_path / "broken_module.py").write_text("def (\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for words in ("broken_module:f", "--reward.weights broken_module:f 1"):
        assert main.main(["train", *words.split()]) == 2
        shown = capsys.readouterr().err
        assert "broken_module:f (SyntaxError: invalid syntax (broken_module.py, line 1))" in shown
        assert shown.count("\n") == 1


@pytest.mark.parametrize("error", [update.RatioError, monitor.DivergedError])
def test_a_run_that_cannot_go_on_exits_with_1(error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda config: (_ for _ in ()).throw(error("the reason")))
    assert main.main(["train"]) == 1
    assert capsys.readouterr().err == "error: the reason\n"


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_is_one_sentence(error, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "run", lambda config: (_ for _ in ()).throw(error))
    assert main.main(["train", "--run.out", "there"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("error: no space is left on a disk that the run in 'there' writes")
    assert shown.endswith("go on with --run.resume there.\n") and shown.count("\n") == 1
    monkeypatch.setattr(train, "run", lambda config: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.main(["train"])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("train --sample.stpes 8", "--sample.steps"),
        ("train --optim.lr fast", "could not convert string to float"),
        ("train --policy.dtype int8", "bfloat16"),
        ("sample x --colour", "--colour"),
    ],
)
def test_what_tyro_refuses_exits_with_2(line, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(line.split())
    assert stop.value.code == 2
    shown = capsys.readouterr()
    assert words in shown.err + shown.out


def test_evaluate_needs_a_target(capsys):
    assert main.main(["evaluate"]) == 2
    shown = capsys.readouterr().err
    assert "required without --images and --table" in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_a_reader_that_has_gone_gets_no_traceback():
    """As `flowgrpo train --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    pipes = {"capture_output": False, "stdout": write, "stderr": subprocess.PIPE}
    done = processes.command("train", "--help", **pipes)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_control_characters_of_a_name_are_written_out(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a\nb\x1b[2J").mkdir()
    assert main.main(["train", "--sample.prompts", "a\nb\x1b[2J"]) == 2
    shown = capsys.readouterr().err
    assert r"the prompt folder a\nb\x1b[2J has no file" in shown and shown.count("\n") == 1


@pytest.mark.slow
def test_a_working_directory_that_was_removed(capsys, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main.main(["train", "nano", "--run.progress", "none"]) == 2
    assert "run.out 'runs/nano-0' cannot be written (No such file" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)


def test_a_picture_takes_the_place_of_no_device(capsys, tmp_path):
    """A pipe stands for /dev/null, which root could replace."""
    os.mkfifo(tmp_path / "pipe.png")
    assert main.main(["sample", "three red circles", "--out", str(tmp_path / "pipe.png")]) == 2
    assert "is a device, a pipe, a folder or a link in a circle" in capsys.readouterr().err
    assert (tmp_path / "pipe.png").is_fifo()
