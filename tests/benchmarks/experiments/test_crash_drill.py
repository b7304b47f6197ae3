"""The crash drill: runs that are killed end as one that is not; a run that does not is told."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter

import pytest

from experiments import crash_drill
from flowgrpo.config import replace
from support import processes


@pytest.mark.slow
def test_five_kills(tmp_path):
    """Runs of a model that is smaller than the embedded one, which the drill itself takes."""
    shared = processes.save_inputs(tmp_path)
    changes = {"run.steps": 2, "run.checkpoint_every": 1, "run.progress": "plain"}

    def configure(folder):
        return replace(processes.small(), **shared, **changes, **{"run.out": str(folder / "run")})

    tally = crash_drill.drill(5, 1, tmp_path, each=1, configure=configure)
    assert tally.kills.total() >= 5 and tally.losses == []
    stages = {stage for stage, _ in tally.kills}
    assert {*crash_drill.STRATA} <= stages
    # What would be lost: the drill sees each of these.
    whole = tmp_path / "whole" / "run"
    expected = crash_drill.contents(whole)
    assert crash_drill.difference(whole, expected) == ""
    for number, (change, words) in enumerate(
        [
            (lambda run: (run / "adapter" / f".README.md.{'0a' * 16}").touch(), "is left behind"),
            (lambda run: shutil.rmtree(run / "checkpoints" / "step-000002"), "differs"),
            (lambda run: (run / "samples" / "step-000000.png").write_bytes(b"x"), "step-000000"),
            (change_metric, "metrics.jsonl differs"),
        ]
    ):
        run = shutil.copytree(whole, tmp_path / f"changed-{number}")
        change(run)
        assert words in crash_drill.difference(run, expected)


def change_metric(run):
    path = run / "metrics.jsonl"
    *lines, last = path.read_text().splitlines()
    values = json.loads(last)
    values["accuracy"] += 1e-9
    path.write_text("\n".join([*lines, json.dumps(values)]) + "\n")


def test_rows_count_each_kill_once_by_stage_and_once_by_aim():
    tally = crash_drill.Tally(runs=2)
    tally.kills = Counter({("export", "moment"): 2, ("update", "moment"): 1})
    tally.lost = Counter({("export", "moment"): 1})
    rows = {(row["case"], row["metric"]): row["value"] for row in tally.rows()}
    assert rows == {
        ("all", "kills"): 3,
        ("all", "lost"): 1,
        ("all", "runs"): 2,
        ("stage export", "kills"): 2,
        ("stage export", "lost"): 1,
        ("stage update", "kills"): 1,
        ("stage update", "lost"): 0,
        ("aim moment", "kills"): 3,
        ("aim moment", "lost"): 1,
    }


def test_the_drills_own_run_is_of_the_embedded_model(tmp_path):
    config = crash_drill.tiny(tmp_path)
    assert config.policy.model == "nano" and config.run.steps == 3
    assert config.run.checkpoint_every == 1 and config.out_dir == tmp_path / "run"


def test_aims_go_where_kills_are_missing():
    """Without processes: each hit counts as one of the stage that it was aimed at."""
    drill = crash_drill.Drill.__new__(crash_drill.Drill)
    drill.random, drill.each, drill.hits = random.Random(0), 3, Counter()
    drill.seconds, drill.whole = 2.0, crash_drill.Marks()
    for stage in crash_drill.AIMED:
        with drill.whole.inside(stage):
            drill.whole.count_operation()
    aims = drill.aims()
    kinds = Counter()
    for _ in range(3 * len(crash_drill.STRATA)):
        aim = next(aims)
        drill.hits[aim.stage] += 1
        kinds[aim.kind] += 1
    assert drill.hits == dict.fromkeys(crash_drill.STRATA, 3) and drill.missing() == 0
    assert set(kinds) == {"moment in a stage", "file operation"} and min(kinds.values()) >= 7
    later = [next(aims) for _ in range(3 * len(crash_drill.AIMED))]
    assert {aim.stage for aim in later} == {"", *crash_drill.AIMED}
    assert {aim.kind for aim in later} == {"moment", *kinds}
