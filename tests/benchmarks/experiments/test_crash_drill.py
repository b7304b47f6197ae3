"""The crash drill: runs that are killed end as one that is not; a run that does not is told."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest

from experiments import crash_drill


@pytest.mark.slow
def test_five_kills(tmp_path):
    tally = crash_drill.drill(5, 1, tmp_path)
    assert tally.kills.total() == 5 and tally.losses == []
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
