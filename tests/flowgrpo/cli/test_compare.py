"""flowgrpo compare: mistakes in one sentence; real studies, also one whose process is killed."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from flowgrpo.cli import main
from flowgrpo.comparison import compare as comparing
from flowgrpo.comparison.studies import find_study
from support import processes

STUDY = """
question: Which rate?
recipe: support.processes:small
images: 32
evaluations: 2
common:
  policy.model: MODEL
  sample.prompts: PROMPTS
  reward.weights: {support.processes:red_until_killed: 1}
arms:
  fast: {optim.lr: 1e-2}
  slow: {optim.lr: 1e-4}
"""

EMBEDDED = """
recipe: nano
images: 100000
common:
  sample.prompts_per_iteration: 2
  sample.group_size: 4
  sample.batch_size: 4
  sample.steps: 2
  sample.eval_steps: 2
  run.eval_prompts: 2
  optim.decay: 0
arms:
  fast: {optim.lr: 1e-2}
  slow: {optim.lr: 1e-4}
"""

MISTAKES = [
    ("compare", "no study was given, but one of methods, kl, steps"),
    ("compare --seeds 0", "no study was given"),
    ("compare method", "did you mean 'methods'?"),
    ("compare no.yaml", "the study 'no.yaml' cannot be read"),
    ("compare steps --seeds 0 1 0", "--seeds has 0 twice"),
    ("compare steps --images 0", "--images is 0, but it must be greater than 0"),
    ("compare steps --seconds nan", "--seconds is nan"),
    ("compare steps --jobs 0", "--jobs is 0, but auto or at least 1"),
    ("compare steps --arms T", "but arms of the study steps are 'T=5', 'T=10'"),
    ("compare steps --run.seed 1", "sets run.seed, but a comparison sets it by itself"),
    ("compare steps --sample.steps 5", "arm 'T=10' of the study steps repeats arm 'T=5'"),
    ("compare kl --optim.beta 0.04", "repeats arm 'beta 0'"),
    ("compare steps --sample.batch_size 7", "divides"),
    ("compare steps --optim.objective nosuch", "arm 'T=5' of the study steps cannot be trained"),
    ("compare steps --out /proc/x --report", "--out '/proc/x' cannot be written"),
]


@pytest.mark.parametrize(("line", "words"), MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing(line, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main.main(line.split()) == 2
    shown = capsys.readouterr()
    assert words in shown.err and shown.out == ""
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_objective_that_is_not_there_is_named_and_the_others_can_be_chosen(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    study = EMBEDDED.replace("slow: {optim.lr: 1e-4}", "slow: {optim.objective: nosuch}")
    Path("s.yaml").write_text(study)
    assert main.main(["compare", "s.yaml"]) == 2
    assert (
        "arm 'slow' of the study s cannot be trained: optim.objective is 'nosuch', but one of "
        in (capsys.readouterr().err)
    )
    started = []
    monkeypatch.setattr(comparing, "_train", lambda folder, runs, *rest: started.extend(runs) or 0)
    assert main.main(["compare", "s.yaml", "--arms", "fast"]) == 1
    assert [run.arm for run in started] == ["fast"] * 3


def test_help_lists_studies_and_options(capsys):
    assert main.main(["compare", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("methods", "kl", "steps", ".yaml"))
    with pytest.raises(SystemExit) as stop:
        main.main(["compare", "steps", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--seeds" in shown and "--jobs" in shown and "--optim.lr" in shown


def test_the_command_line_makes_the_comparison(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr(comparing, "run", lambda comparison: asked.append(comparison) or 0)
    line = "compare steps --seeds 4 2 --images 960 --jobs 3 --optim.lr 0.5 --run.eval-samples 3"
    assert main.main(line.split()) == 0
    [comparison] = asked
    assert (comparison.seeds, comparison.jobs, comparison.study.images) == ((4, 2), 3, 960)
    assert comparison.study.seconds == 0 and comparison.out == Path("runs/compare-steps")
    assert {config.optim.lr for config in comparison.configs.values()} == {0.5}
    assert {config.run.eval_samples for config in comparison.configs.values()} == {3}
    assert comparison.command == f"flowgrpo {line}"


def compare(study: Path, out: Path, *seeds: int, launch=processes.launch) -> tuple[int, str]:
    """A comparison in this process, whose runs are forked."""
    found = find_study(str(study)).with_budget(None, None)
    console = Console(file=io.StringIO(), width=200)
    comparison = comparing.Comparison(
        study=found,
        configs=found.configs(),
        arms=tuple(found.arms),
        seeds=seeds,
        out=out,
        jobs=2,
        command="flowgrpo compare s.yaml",
    )
    code = comparing.run(comparison, console, launch)
    return code, console.file.getvalue()


def without_times(out: Path, *seeds: int) -> dict:
    """What comparison.json says of these seeds at equal images; equal for equal runs."""
    values = json.loads((out / "comparison.json").read_text())
    names = ("images", "accuracy", "scores", "quality", "kl")
    curves = {
        run: [{name: point[name] for name in names} for point in points]
        for run, points in values["curves"].items()
        if values["runs"][run]["seed"] in seeds
    }
    rows = [
        (row["provider"], row["seed"], row["value"])
        for row in values["rows"]
        if row["case"] == "images" and row.get("seed") in seeds
    ]
    return {"curves": curves, "rows": rows}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    inputs = processes.save_inputs(folder)
    text = STUDY.replace("MODEL", inputs["policy.model"])
    (folder / "s.yaml").write_text(text.replace("PROMPTS", inputs["sample.prompts"]))
    return folder / "s.yaml"


@pytest.fixture(scope="module")
def whole(study):
    """Two arms x two seeds at four iterations, undisturbed."""
    out = study.parent / "whole"
    return out, *compare(study, out, 0, 1)


@pytest.mark.slow
def test_a_study_of_two_arms_and_two_seeds(whole):
    out, code, shown = whole
    assert code == 0
    assert shown.count(" finished (") == 4 and "4 runs, 0 of them finished; up to 2 at" in shown
    values = json.loads((out / "comparison.json").read_text())
    assert values["complete"] and len(values["runs"]) == 4
    for run, entry in values["runs"].items():
        assert (entry["state"], entry["iterations"], entry["images"]) == ("finished", 4, 32)
        assert entry["max_ratio_error"] == 0.0 and entry["peak_bytes"] > 1 << 27
        # An ordinary run directory, as `flowgrpo evaluate` and `--run.resume` take it.
        assert (out / run / "adapter").is_dir() and (out / run / "content.json").exists()
        # Before, on the way, and at the budget.
        assert [point["images"] for point in values["curves"][run]] == [0, 16, 32]
        assert [point["kl"] > 0 for point in values["curves"][run]] == [False, True, True]
        # The reading at the budget is the run's own last evaluation.
        summary = json.loads((out / run / "summary.json").read_text())
        [row] = [
            row
            for row in values["rows"]
            if row["case"] == "images" and row["runs"] == [run] and row.get("seed") is not None
        ]
        assert row["value"] == summary["after"]["accuracy"]
    # A rate that is a hundred times higher goes further from the base.
    fast, slow = (values["curves"][f"runs/{arm}-seed0"][-1]["kl"] for arm in ("fast", "slow"))
    assert fast > 10 * slow > 0
    [seconds] = {entry["value"] for name, entry in values["budgets"].items() if name == "seconds"}
    ends = [points[-1]["seconds"] for points in values["curves"].values()]
    assert seconds == min(ends)
    assert (out / "comparison.png").stat().st_size > 10_000
    assert "| fast |" in (out / "table.md").read_text()


@pytest.mark.slow
def test_finished_runs_are_not_run_again(whole, study):
    out, _, _ = whole

    def launch(*arguments):
        raise AssertionError("all runs are finished")

    before = without_times(out, 0, 1)
    code, shown = compare(study, out, 0, 1, launch=launch)
    assert code == 0 and " begins" not in shown and "Equal images: after 32 images" in shown
    assert without_times(out, 0, 1) == before


@pytest.mark.slow
def test_a_killed_process_is_resumed_to_the_same_numbers(whole, study, monkeypatch):
    """One of the processes is killed by a signal on its way."""
    out = study.parent / "killed"
    monkeypatch.setenv("FLOWGRPO_TEST_KILL", str(out / "runs" / "fast-seed0"))
    code, shown = compare(study, out, 0)
    assert code == 1, shown
    assert "fast-seed0 failed with exit code -9" in shown
    assert "slow-seed0 finished (1/2)" in shown
    values = json.loads((out / "comparison.json").read_text())
    assert values["runs"]["runs/fast-seed0"]["state"] == "failed"
    assert not [row for row in values["rows"] if row["provider"] == "fast"]
    text = (out / "table.md").read_text()
    assert "| fast | failed |" in text and "fast-seed0 failed: " in text
    code, shown = compare(study, out, 0)
    assert code == 0, shown
    assert "goes on after 2 iterations" in shown and "slow-seed0 begins" not in shown
    assert json.loads((out / "comparison.json").read_text())["complete"]
    # The same study, undisturbed.
    undisturbed = without_times(whole[0], 0)
    assert without_times(out, 0) == undisturbed and len(undisturbed["rows"]) == 2


@pytest.mark.slow
def test_ctrl_c_stops_the_runs_and_says_how_to_go_on(study, tmp_path):
    """The command line, whose run is a real process that ends no sooner."""
    out, long = tmp_path / "out", tmp_path / "long.yaml"
    long.write_text(study.read_text().replace("images: 32", "images: 100000"))
    words = ["compare", str(long), "--out", str(out), "--seeds", "0"]
    words += ["--jobs", "1", "--run.threads", "1"]
    fork = processes.Fork(tmp_path / "log", _main, words, processes.environment())
    metrics = out / "runs" / "fast-seed0" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (metrics.exists() and '"kind": "train"' in metrics.read_text()):
        assert time.monotonic() < deadline and fork.process.is_alive(), fork.log.read_text()
        time.sleep(0.1)
    fork.kill(signal.SIGINT)
    shown = fork.wait(130)
    assert "fast-seed0 stopped after" in shown and "Finishing this iteration" in shown
    assert f"Stopped; go on with: flowgrpo {' '.join(words)}" in shown
    # It saved, and nothing was called a failure.
    assert json.loads((out / "runs" / "fast-seed0" / "summary.json").read_text())["interrupted"]
    values = json.loads((out / "comparison.json").read_text())
    assert {run["state"] for run in values["runs"].values()} == {"unfinished"}
    assert list((out / "runs" / "fast-seed0" / "checkpoints").iterdir())


def _main(words: list[str], environment: dict[str, str]) -> None:
    # Its own children look for the tests' modules; the server that it is forked from may be older.
    os.environ.update(environment)
    sys.exit(main.main(words))
