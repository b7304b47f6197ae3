"""Run directories that an earlier version wrote: they resume, and they evaluate."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from flowgrpo import files
from flowgrpo.cli import main
from flowgrpo.cli.evaluate import evaluate_run
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.config import Config, to_dict
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.policies.load import load_policy
from flowgrpo.runs import checkpoints, directory
from flowgrpo.runs.state import State

GOLDEN = Path(__file__).parents[2] / "golden" / "run_before"


@pytest.fixture
def run_before(tmp_path, pixel_model) -> Path:
    """A copy of the earlier version's run, with paths of this machine."""
    folder, prompts = tmp_path / "run", tmp_path / "prompts.txt"
    shutil.copytree(GOLDEN, folder)
    prompts.write_text("a red circle\na blue square\na green triangle\ntwo circle\n")
    config = json.loads((folder / "config.json").read_text())
    config["policy"]["model"], config["sample"]["prompts"] = str(pixel_model), str(prompts)
    config["run"]["out"] = str(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def test_a_configuration_without_an_objective_is_that_of_grpo(run_before):
    written = json.loads((run_before / "config.json").read_text())
    assert "objective" not in written["optim"]
    fields, defaults = to_dict(directory.resume_config(run_before)), to_dict(Config())
    assert fields["optim"]["objective"] == "grpo"
    fields["run"]["resume"] = None
    for section, values in defaults.items():
        # Fields that came later have their defaults.
        for name in values.keys() - written[section].keys() if section != "recipe" else ():
            assert fields[section].pop(name) == values[name]
    assert fields == written


def test_the_state_is_restored_to_the_bit(run_before):
    config = directory.resume_config(run_before)
    checkpoint = checkpoints.latest(run_before)
    state = State.create(load_policy(config).transformer, config.optim)
    state.restore(checkpoint)
    assert (state.iteration, state.updates, state.ema.updates) == (2, 4, 4)
    assert set(state.totals) == {"seconds", "max_ratio_error", "dropped_groups"}
    for stem, tensors in state.tensors().items():
        stored = files.read_tensors(checkpoint / f"{stem}.safetensors")
        assert tensors.keys() == stored.keys() and len(stored) > 0
        assert all(torch.equal(tensors[name], stored[name]) for name in stored)


@pytest.mark.slow
def test_it_goes_on_and_writes_what_it_wrote_before(run_before):
    config = (run_before / "config.json").read_bytes()
    metrics = (run_before / "metrics.jsonl").read_bytes().splitlines()
    # The evaluation at the end, which a longer run does not have.
    assert json.loads(metrics[-1])["final"]
    assert main.main(["train", "--run.resume", str(run_before), "--run.steps", "3"]) == 0
    assert (run_before / "config.json").read_bytes() == config
    lines = (run_before / "metrics.jsonl").read_bytes().splitlines()
    assert lines[: len(metrics) - 1] == metrics[:-1]
    before, now = ([json.loads(line) for line in file] for file in (metrics, lines))
    kinds = [(line["iteration"], line["kind"]) for line in now]
    assert kinds == [(0, "eval"), (1, "train"), (2, "train"), (3, "train"), (3, "eval")]
    # Evaluations also say the size of their images since.
    assert now[3].keys() == before[2].keys() and now[4].keys() - {"size"} == before[3].keys()
    assert now[3]["max_ratio_error"] == 0
    old, new = (
        checkpoints.read_state(run_before / "checkpoints" / f"step-{n:06d}") for n in (2, 3)
    )
    assert new["format"] == old["format"] and new["sha256"].keys() == old["sha256"].keys()
    assert new["record"].keys() == old["record"].keys() and new["record"]["updates"] == 6
    summary = json.loads((run_before / "summary.json").read_text())
    # The evaluation before training is read, not repeated.
    first = Evaluation.load(run_before / "evaluations" / "step-000000")
    assert summary["before"] == json.loads(json.dumps(first.to_dict()))
    assert summary["iterations"] == 3 and summary["images"] == 24


def test_it_is_evaluated(run_before, tmp_path):
    options = EvaluateOptions(target=str(run_before), out=str(tmp_path / "out"), device="cpu")
    report = evaluate_run(options)
    assert list(report["reports"]) == ["base", "iteration 2"]
    assert report["checkpoint"] == str(run_before / "checkpoints" / "step-000002")
    assert (
        report["change"]["accuracy"] == report["change"]["scores"]["jpeg_compressibility"]["change"]
    )
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == files.plain(report)
