"""The folder of a comparison: its runs' configurations, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from flowgrpo.comparison.folder import (
    FREE,
    Attempt,
    Folder,
    attempts,
    failure,
    plan_runs,
    read_study,
)
from flowgrpo.config import ConfigError, from_json, replace
from support import comparisons

ATTEMPT = Attempt("A-seed0", 1, False, "error: no", 1, 2, "cpu", "6", "abc", "now", 5)


@pytest.fixture
def base(tmp_path):
    return comparisons.recipe(tmp_path)


def test_a_run_gets_what_seeds_budget_and_folder_decide(tmp_path, base):
    study = comparisons.study(images=100, seconds=30.0, evaluations=5)
    runs = comparisons.plan(study, base, (3, 1), tmp_path / "out")
    assert [(run.arm, run.seed) for run in runs] == [("A", 3), ("B", 3), ("A", 1), ("B", 1)]
    run = runs[1].config.run
    # 8 images an iteration: 13 of them are the first with 100 images.
    assert (run.seed, run.steps, run.eval_every, run.min_seconds) == (3, 13, 3, 30.0)
    assert (run.eval_seconds, run.checkpoint_every, run.threads) == (6.0, 1, 1)
    assert runs[1].folder == tmp_path / "out" / "runs" / "B-seed3"
    assert runs[1].config.policy.lora_rank == 2


def test_a_budget_of_seconds_alone_has_no_iterations(tmp_path, base):
    study = comparisons.study(images=0, seconds=8.0)
    [run, *_] = comparisons.plan(study, base, (0,), tmp_path / "out")
    assert (run.config.run.steps, run.config.run.eval_every) == (1, 0)
    assert (run.config.run.min_seconds, run.config.run.eval_seconds) == (8.0, 4.0)
    only = comparisons.study(images=32)
    [run, *_] = comparisons.plan(only, base, (0,), tmp_path / "other")
    assert (run.config.run.min_seconds, run.config.run.eval_seconds) == (0.0, 0.0)


def test_threads_of_the_configuration_come_before_the_share(tmp_path, base):
    study = comparisons.study()
    configs = comparisons.configs(study, replace(base, **{"run.threads": 3}))
    assert plan_runs(study, configs, (0,), tmp_path, 1)[0].config.run.threads == 3


def test_begin_writes_a_run_that_train_can_go_on_with(tmp_path, base):
    study = comparisons.study()
    out = tmp_path / "out"
    [run, *_] = comparisons.plan(study, base, (0,), out)
    with Folder.open(out, study, comparisons.configs(study, base)) as folder:
        folder.begin(run)
        assert from_json((run.folder / "config.json").read_text()) == run.config
        # What is there stays: the run may have begun by it.
        (run.folder / "config.json").write_text("{}")
        folder.begin(run)
    assert (run.folder / "config.json").read_text() == "{}"
    assert not run.finished


def test_only_a_run_that_ended_at_its_budget_is_finished(tmp_path, base):
    first, second = comparisons.plan(comparisons.study(), base, (0,), tmp_path / "out")
    lines = [comparisons.evaluation(0, 0.0, [1, 0, 1, 0, 1, 0])]
    comparisons.write_run(first, lines)
    comparisons.write_run(second, lines, interrupted=True)
    assert first.finished and not second.finished
    (first.folder / "summary.json").write_text("{")
    assert not first.finished


@pytest.mark.parametrize(
    ("change", "override", "message"),
    [
        ({"images": 64}, {}, "images of the study is 64, but the comparison in"),
        ({"seconds": 5.0}, {}, "seconds of the study is 5.0"),
        ({"evaluations": 3}, {}, "evaluations of the study is 3"),
        ({"name": "other"}, {}, "name of the study is 'other'"),
        ({"arms": {"A": {}, "C": {"optim.lr": 1.0}}}, {}, "the list of arms is ['A', 'C']"),
        ({"arms": {"A": {}, "B": {"policy.lora_rank": 3}}}, {}, "policy.lora_rank of the arm 'B'"),
        ({}, {"optim.lr": 1.0}, "optim.lr of the arm 'A' is 1.0, but"),
        ({}, {"run.eval_samples": 3}, "run.eval_samples of the arm 'A' is 3"),
    ],
)
def test_a_changed_study_is_refused_with_the_difference(tmp_path, base, change, override, message):
    out, study = tmp_path / "out", comparisons.study()
    comparisons.plan(study, base, (0,), out)
    before = (out / "study.json").read_text()
    study = dataclasses.replace(study, **change)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        comparisons.plan(study, replace(base, **override), (0,), out)
    assert "leave it as it was, or choose another --out" in str(error.value)
    assert (out / "study.json").read_text() == before


def test_what_changes_no_number_may_change(tmp_path, base):
    out, study = tmp_path / "out", comparisons.study()
    comparisons.plan(study, base, (0,), out)
    other = replace(base, **{"run.threads": 7, "run.wandb": "project", "run.progress": "none"})
    comparisons.plan(study, other, (0, 1), out)
    comparisons.plan(dataclasses.replace(study, question="Why?", panels=("kl",)), base, (5,), out)
    assert {"run.threads", "run.wandb"} <= set(FREE)


def test_a_study_of_a_version_without_a_field_goes_on(tmp_path, base):
    out, study = tmp_path / "out", comparisons.study()
    comparisons.plan(study, base, (0,), out)
    values = json.loads((out / "study.json").read_text())
    for fields in values["arms"].values():
        del fields["optim.guard"]
    (out / "study.json").write_text(json.dumps(values))
    runs = comparisons.plan(study, base, (0,), out)
    assert [run.name for run in runs] == [f"{label}-seed0" for label in study.arms]


def test_other_folders_are_refused_and_left_alone(tmp_path, base):
    study = comparisons.study()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match="is not empty and holds no comparison"):
        comparisons.plan(study, base, (0,), other)
    assert [path.name for path in other.iterdir()] == ["thesis.tex"]
    with pytest.raises(ConfigError, match="cannot be written"):
        comparisons.plan(study, base, (0,), other / "thesis.tex" / "out")
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"study\.json cannot be read as flowgrpo-comparison-1"):
        comparisons.plan(study, base, (0,), damaged)


def test_one_process_at_a_time_has_the_folder(tmp_path, base):
    out, study = tmp_path / "out", comparisons.study()
    configs = comparisons.configs(study, base)
    with (
        Folder.open(out, study, configs),
        pytest.raises(ConfigError, match=r"in use by another process.* choose another --out"),
    ):
        Folder.open(out, study, configs)
    Folder.open(out, study, configs).close()
    assert read_study(out)["arms"]["B"]["policy.lora_rank"] == 2


def test_processes_are_remembered_and_a_torn_line_is_none(tmp_path, base):
    out, study = tmp_path / "out", comparisons.study()
    later = dataclasses.replace(ATTEMPT, exit=0, error="")
    with Folder.open(out, study, comparisons.configs(study, base)) as folder:
        folder.note(ATTEMPT)
        folder.note(dataclasses.replace(ATTEMPT, run="B-seed0"))
        folder.note(later)
    with open(out / "processes.jsonl", "a") as file:
        file.write('{"run": "A-seed0", "ex')
    assert attempts(out) == {
        "A-seed0": [ATTEMPT, later],
        "B-seed0": [dataclasses.replace(ATTEMPT, run="B-seed0")],
    }
    assert attempts(tmp_path) == {}


def test_what_counts_as_a_failure(tmp_path, base):
    run, other = comparisons.plan(comparisons.study(), base, (0,), tmp_path / "out")
    assert failure(run, []) == ""
    assert failure(run, [ATTEMPT]) == "error: no"
    assert failure(run, [dataclasses.replace(ATTEMPT, exit=-9, error="")]) == "exit code -9"
    assert failure(run, [dataclasses.replace(ATTEMPT, exit=130, stopped=True)]) == ""
    comparisons.write_run(other, [comparisons.evaluation(0, 0.0, [1] * 6)])
    assert failure(other, [ATTEMPT]) == ""
