"""One rank fails, is killed or is asked to stop: all end, with one sentence and nothing lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

from flowgrpo.config import Config, replace
from support import processes
from support.ranks import Ranks

WAY = "FLOWGRPO_TEST_FAULT"
"""Environment variable: what happens to `red` at its third call of a training image."""


def red(images, prompts, metadata):
    """Redder images are better."""
    red.calls = getattr(red, "calls", 0) + 1
    way = os.environ.get(WAY, "")
    if red.calls >= 8 and way == "wrong":
        return [1.0]
    if red.calls >= 8 and way == "slow":
        Path(os.environ["FLOWGRPO_TEST_MARK"]).touch()
        time.sleep(600)
    if red.calls >= 8 and way == "marked":
        mark = Path(os.environ["FLOWGRPO_TEST_MARK"])
        mark.touch()
        # The run must not end before it is asked.
        wait_for(mark.with_suffix(".go"))
    return processes.red(images, prompts, metadata)


def train(config: Config, first: str = "") -> None:
    """`flowgrpo train` of a configuration; the body of a process."""
    from flowgrpo.cli import main
    from flowgrpo.cli import train as command

    command.parse_train = lambda argv: config
    sys.exit(main.main(["train"]))


def impatient(config: Config) -> None:
    """`train` that waits 3 seconds for the rewards of a chunk."""
    from flowgrpo import train as trainer

    trainer.PATIENCE = 3 / config.run.rank_timeout
    train(config)


def tiny(folder: Path, name: str, **changes) -> Config:
    """4 chunks in two ranks, 3 iterations, a checkpoint each."""
    base = {
        "reward.weights": {f"{__name__}:red": 1.0},
        "sample.batch_size": 2,
        "run.out": str(folder / name),
        "run.steps": 3,
        "run.checkpoint_every": 1,
        "run.eval_every": 3,
        "run.eval_prompts": 4,
        "run.progress": "plain",
        "run.rank_timeout": 60.0,
    }
    return processes.make(folder, **{**base, **changes})


def content(run: Path) -> tuple:
    bits = {
        p.name: processes.bits_of(p) for p in (run / "adapter", run / "checkpoints/step-000003")
    }
    return processes.untimed(run / "metrics.jsonl"), bits


def sentences(output: str) -> list[str]:
    """What a rank says of a fault; a traceback would be many."""
    assert "Traceback" not in output, output
    return [line for line in output.splitlines() if line.startswith("error: ")]


def wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.slow
def test_two_ranks_survive_the_faults_of_one(tmp_path):
    alone = processes.Fork(tmp_path / "alone.log", train, tiny(tmp_path, "alone"))
    alone.wait()
    expected = content(tmp_path / "alone")

    def start(name: str, way: str, body=train) -> Ranks:
        variables = {1: {WAY: way, "FLOWGRPO_TEST_MARK": str(tmp_path / f"{name}.mark")}}
        config = tiny(tmp_path, name)
        return Ranks(tmp_path / f"{name}-logs", 2, body, config, changes=variables)

    # All are started before the first is waited for.
    faults = {
        "wrong": start("wrong", "wrong"),
        "slow": start("slow", "slow", impatient),
        "killed": start("killed", "marked"),
        "asked": start("asked", "marked"),
    }
    wait_for(tmp_path / "killed.mark")
    faults["killed"].kill(1, signal.SIGKILL)
    wait_for(tmp_path / "asked.mark")
    faults["asked"].kill(1, signal.SIGTERM)
    (tmp_path / "asked.go").touch()
    ended = {}
    for name, ranks in faults.items():
        with ranks:
            ended[name] = ranks.codes(60), ranks.outputs()
    codes, outputs = ended["wrong"]
    assert codes == [2, 2], outputs
    [sentence] = sentences(outputs[0])
    assert sentence.startswith("error: rank 1: reward ") and outputs[1] == ""
    assert "Saved after " in outputs[0]
    codes, outputs = ended["slow"]
    assert codes == [2, 2], outputs
    [sentence] = sentences(outputs[0])
    assert "rank 1: the rewards of a chunk" in sentence and "within 3 seconds" in sentence
    codes, outputs = ended["killed"]
    assert codes == [1, -signal.SIGKILL], outputs
    [sentence] = sentences(outputs[0])
    assert sentence.startswith("error: rank 1 of the 2 processes has ended without a word")
    codes, outputs = ended["asked"]
    assert codes == [130, 130] and not sentences(outputs[0]) and outputs[1] == "", outputs
    # Each goes on where it was, on one rank or two, and ends with the same.
    again = {}
    for name in faults:
        saved = sorted(path.name for path in (tmp_path / name / "checkpoints").iterdir())
        assert saved and not any(entry.startswith(".") for entry in saved), name
        config = replace(tiny(tmp_path, name), **{"run.resume": str(tmp_path / name)})
        if name == "asked":
            again[name] = Ranks(tmp_path / f"{name}-again", 2, train, config)
        else:
            again[name] = processes.Fork(tmp_path / f"{name}-again.log", train, config)
    for name, processes_of in again.items():
        processes_of.wait()
        assert content(tmp_path / name) == expected, name


def other_rate(config: Config) -> None:
    """`train` with another learning rate in rank 1."""
    if os.environ["RANK"] == "1":
        config = replace(config, **{"optim.lr": 0.5})
    train(config)


def other_versions(config: Config) -> None:
    """`train` with another torch in rank 1."""
    from flowgrpo import train as trainer

    here = trainer.versions()
    if os.environ["RANK"] == "1":
        trainer.versions = lambda: {**here, "torch": "1.0"}
    train(config)


def other_cpu(config: Config) -> None:
    """`train` with fast bfloat16 in rank 1 alone, so that "auto" is another type there."""
    import torch

    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        setattr(torch.cpu, name, lambda: os.environ["RANK"] == "1")
    train(config)


def elsewhere(config: Config, folders: list[Path]) -> None:
    """`train` in a working directory of each rank's own."""
    os.chdir(folders[int(os.environ["RANK"])])
    train(config)


@pytest.mark.slow
def test_ranks_that_are_not_alike_are_refused_and_the_field_is_named(tmp_path):
    folders = [tmp_path / "here", tmp_path / "there"]
    for folder, word in zip(folders, ("two", "one"), strict=True):
        folder.mkdir()
        (folder / "prompts.txt").write_text(f"a red circle\n{word} circle\nthree square\n")
    config = tiny(tmp_path, "run")
    # The same path, and for each process another file.
    of_each = replace(config, **{"sample.prompts": "/proc/self/cwd/prompts.txt"})
    cases = {
        "optim.lr is 0.01 in rank 0 and 0.5 in rank 1": (other_rate, config),
        "the version of torch is": (other_versions, config),
        "the dtype is 'torch.float32' in rank 0 and 'torch.bfloat16' in rank 1": (
            other_cpu,
            replace(config, **{"policy.dtype": "auto"}),
        ),
        "training is": (elsewhere, of_each, folders),
    }
    started = {
        words: Ranks(tmp_path / f"logs-{number}", 2, *case)
        for number, (words, case) in enumerate(cases.items())
    }
    for words, ranks in started.items():
        with ranks:
            outputs = ranks.wait(2)
        [sentence] = sentences(outputs[0])
        assert words in sentence and outputs[1] == "", outputs
    assert not (tmp_path / "run").exists()
