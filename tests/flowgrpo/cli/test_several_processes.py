"""`evaluate` and `sample` on several processes give what one gives; other commands are one."""

from __future__ import annotations

import json
import os

import pytest

from flowgrpo.cli.main import main
from support import processes
from support.ranks import Ranks, flowgrpo


@pytest.mark.slow
def test_evaluate_and_sample_on_three_ranks_are_those_of_one(tmp_path):
    config = processes.make(tmp_path, **{"run.steps": 1, "run.eval_every": 0})
    processes.Fork(tmp_path / "train.log", processes.run, config).wait()
    run = str(tmp_path / "run")
    evaluate = ("evaluate", run, "--samples", "3", "--guidance", "2.0", "--batch-size", "4")
    sample = ("sample", "a red circle", "two circle", "--run", run, "--count", "3", "--steps", "2")
    started = {}
    for size in (1, 3):
        for name, words in (("evaluate", evaluate), ("sample", sample)):
            out = tmp_path / f"{name}-{size}"
            words = (*words, "--out", str(out if name == "evaluate" else out / "picture.png"))
            started[name, size] = Ranks(tmp_path / f"logs-{name}-{size}", size, flowgrpo, *words)
    for (name, size), ranks in started.items():
        with ranks:
            outputs = ranks.wait()
        assert "Writ" in outputs[0] and outputs[1:] == [""] * (size - 1), (name, outputs)
    folders = [tmp_path / f"evaluate-{size}" for size in (1, 3)]
    alone, shared = (json.loads((folder / "report.json").read_text()) for folder in folders)
    assert alone == shared and set(alone["reports"]) == {"base", "base, CFG 2", "iteration 1"}
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(path.name for path in folders[1].iterdir())
    for name in ("grid.png", "table.md"):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    pictures = [tmp_path / f"sample-{size}" / "picture.png" for size in (1, 3)]
    assert pictures[0].read_bytes() == pictures[1].read_bytes()


def sample_differently(out: str) -> None:
    """`flowgrpo sample` with another seed in rank 1."""
    flowgrpo("sample", "a red circle", "--seed", os.environ["RANK"], "--out", out)


def evaluate_a_missing_run(run: str) -> None:
    flowgrpo("evaluate", run)


@pytest.mark.slow
def test_mistakes_are_one_sentence_of_rank_0(tmp_path):
    out = tmp_path / "picture.png"
    with Ranks(tmp_path / "seeds", 2, sample_differently, str(out)) as ranks:
        outputs = ranks.wait(2)
    [sentence] = outputs[0].splitlines()
    assert sentence.startswith("error: the command is not the same in all 2 processes: --seed is 0")
    assert outputs[1] == "" and not out.exists()
    with Ranks(tmp_path / "missing", 2, evaluate_a_missing_run, str(tmp_path / "none")) as ranks:
        outputs = ranks.wait(2)
    assert len(outputs[0].splitlines()) == 1 and outputs[1] == ""


@pytest.mark.parametrize(
    "words",
    [
        ("doctor",),
        ("serve-reward", "jpeg_compressibility"),
        ("curate", "pictures", "--out", "set"),
        ("evaluate", "--table", "a", "b"),
    ],
)
def test_commands_of_one_process_refuse_several(words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert main(list(words)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "WORLD_SIZE is 2" in said and f"flowgrpo {words[0]}" in said
    # Once, not by each.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(list(words)) == 2 and capsys.readouterr().err == ""
    assert not list(tmp_path.iterdir())
