"""`run.resume` auto: a new run, or the one that lies in the run directory."""

from __future__ import annotations

import signal

import pytest

from flowgrpo.cli.train import parse_train
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.runs import checkpoints, directory
from support import processes, rank_processes


def config_for(folder, **changes) -> Config:
    return replace(Config(), **{"run.out": str(folder), "run.resume": "auto", **changes})


def checkpoint(config: Config) -> None:
    checkpoints.save(config.out_dir / "checkpoints", 3, {}, {"score": None})


def test_a_new_run(tmp_path):
    config = config_for(tmp_path / "run")
    assert config.out_dir == tmp_path / "run"
    settled = directory.settle_resume(config)
    assert settled == replace(config, **{"run.resume": None})
    # One that has no checkpoint yet has nothing to go on from, and its directory is used again.
    directory.RunDirectory.open(settled).close()
    assert directory.settle_resume(config) == settled
    directory.RunDirectory.open(settled).close()


def test_a_run_that_has_begun(tmp_path):
    config = config_for(tmp_path / "run")
    directory.RunDirectory.open(directory.settle_resume(config)).close()
    checkpoint(config)
    settled = directory.settle_resume(config)
    assert settled.run.resume == str(tmp_path / "run")
    with directory.RunDirectory.open(settled) as run:
        assert checkpoints.read_state(run.checkpoint)["iteration"] == 3
    # The command is the same, or says what it may not change.
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.5, but the run in .* was started"):
        directory.RunDirectory.open(replace(settled, **{"optim.lr": 0.5}))


def test_a_checkpoint_that_was_being_replaced_counts(tmp_path):
    """Killed between two renames, a process leaves the only checkpoint set aside."""
    config = config_for(tmp_path / "run")
    directory.RunDirectory.open(directory.settle_resume(config)).close()
    checkpoint(config)
    folder = config.out_dir / "checkpoints"
    (folder / "step-000003").rename(folder / f".step-000003.{'0' * 32}.old")
    with directory.RunDirectory.open(directory.settle_resume(config)) as run:
        assert run.checkpoint == folder / "step-000003"


def test_other_files_are_no_run(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    settled = directory.settle_resume(config_for(tmp_path))
    assert settled.run.resume is None
    with pytest.raises(ConfigError, match="is not empty"):
        directory.check_directory(settled)


def test_any_other_value_stays(tmp_path):
    for value in (None, str(tmp_path)):
        config = config_for(tmp_path, **{"run.resume": value})
        assert directory.settle_resume(config) is config


def test_the_command_line_takes_it(tmp_path):
    options = ["nano", "--run.resume", "auto", "--run.out", str(tmp_path), "--run.steps", "3"]
    config = parse_train(options)
    assert (config.run.resume, config.run.steps, config.out_dir) == ("auto", 3, tmp_path)


@pytest.mark.slow
def test_the_same_command_again_after_a_kill(tmp_path):
    """Two processes, killed in the middle, and started again by the same command: the metrics of a
    run that nobody disturbed."""
    changes = {"run.resume": "auto", "optim.updates_per_iteration": 1, "run.eval_every": 0}
    whole = processes.make(tmp_path, **changes, **{"run.out": str(tmp_path / "whole")})
    processes.Fork(tmp_path / "log", processes.run, whole).wait()
    config = replace(whole, **{"run.out": str(tmp_path / "run")})
    forks = rank_processes.start(tmp_path / "first", 2, processes.run, config)
    while len(checkpoints.list_checkpoints(config.out_dir / "checkpoints")) < 2:
        forks[0].process.join(0.05)
        assert forks[0].process.is_alive(), forks[0].log.read_text()
    for fork in forks:
        fork.kill(signal.SIGKILL)
        fork.process.join()
    rank_processes.run(tmp_path / "second", 2, processes.run, config)
    lines = [processes.untimed(c.out_dir / "metrics.jsonl") for c in (whole, config)]
    assert lines[0] == lines[1] and len(lines[0]) == 8
