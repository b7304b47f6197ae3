"""One comparison from its study to its tables, with processes that are shell scripts."""

from __future__ import annotations

import dataclasses
import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from flowgrpo import plan
from flowgrpo.comparison import compare, machine, running
from flowgrpo.comparison.compare import Comparison, expected_bytes, run
from flowgrpo.comparison.folder import Attempt, Folder
from flowgrpo.config import ConfigError, replace
from support import comparisons

SD3 = "stabilityai/stable-diffusion-3.5-medium"
ATTEMPT = Attempt("A-seed0", 0, False, "", 1, 2, "cpu", "6", "abc", "now", 3 << 30)


def script(text: str):
    """Launch a shell script in place of a run; %s is the run directory."""

    def launch(command, log, env):
        folder = Path(command[command.index("--run.resume") + 1])
        words = ["sh", "-c", text.replace("%s", shlex.quote(str(folder)))]
        return running.start_process(words, log, env)

    return launch


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "POLL", 0.01)
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    study = comparisons.study()
    return Comparison(
        study=study,
        configs=comparisons.configs(study, comparisons.recipe(tmp_path)),
        arms=("A", "B"),
        seeds=(0,),
        out=tmp_path / "out",
        jobs=2,
        command="flowgrpo compare ranks.yaml",
    )


def go(comparison, launch) -> tuple[int, str]:
    console = Console(file=io.StringIO(), width=200)
    return run(comparison, console, launch), console.file.getvalue()


@pytest.mark.slow
def test_runs_that_fail_are_told_and_leave_a_table(comparison):
    code, shown = go(comparison, script("echo loading; echo 'error: no weights'; exit 2"))
    assert code == 1
    assert "A-seed0 failed with exit code 2: error: no weights (" in shown
    assert "B-seed0 failed: error: no weights" in shown.splitlines()
    text = (comparison.out / "table.md").read_text()
    assert "| A | failed |" in text and "| B | failed |" in text
    assert not (comparison.out / "comparison.png").exists()


def test_a_report_alone_starts_nothing(comparison):
    def launch(*arguments):
        raise AssertionError("--report trains nothing")

    asked = dataclasses.replace(comparison, report_only=True)
    code, shown = go(asked, launch)
    assert code == 1 and "1 of 1 runs not finished" in shown
    # Nor does it need the objectives, which another version may have had.
    configs = {arm: _objective(config) for arm, config in comparison.configs.items()}
    asked = dataclasses.replace(asked, configs=configs, out=comparison.out.with_name("other"))
    assert go(asked, launch)[0] == 1
    with pytest.raises(ConfigError, match="arm 'A' of the study ranks cannot be trained"):
        go(dataclasses.replace(asked, report_only=False), launch)


def test_an_arm_that_needs_a_gradient_of_the_reward(comparison):
    """nano's rewards have none: said before anything is trained."""
    nano = {"reward.weights": {"nano_strict": 1.0}, "reward.report": ()}
    configs = {
        arm: replace(_objective(config, "refl"), **nano)
        for arm, config in comparison.configs.items()
    }
    with pytest.raises(ConfigError, match=r"cannot be trained: reward .* passes no gradient on"):
        go(dataclasses.replace(comparison, configs=configs), None)


def _objective(config, name="of another version"):
    return replace(config, **{"optim.objective": name, "sample.shared_noise": False})


@pytest.mark.slow
def test_memory_is_measured_or_else_expected_by_the_model(comparison, monkeypatch):
    config = comparison.configs["A"]
    assert expected_bytes(config) == 0
    large = replace(config, **{"policy.model": SD3})
    assert 6 * plan.GIB < expected_bytes(large) < 80 * plan.GIB
    assert expected_bytes(replace(large, **{"policy.adapter": "full"})) == 0
    needs = []
    original = compare.Runner

    def note(folder, runs, slots, need, *rest):
        needs.append(need)
        return original(folder, runs, slots, need, *rest)

    monkeypatch.setattr(compare, "Runner", note)
    go(comparison, script("exit 1"))
    with Folder.open(comparison.out, comparison.study, comparison.configs) as folder:
        folder.note(ATTEMPT)
    go(comparison, script("exit 1"))
    assert needs[0] == 0 and needs[1] == 3 << 30
