"""The drill of ranks: cases that hold are told from those that do not."""

from __future__ import annotations

import json

import pytest

from experiments import ranks_drill


@pytest.mark.slow
def test_two_ranks_that_differ_and_a_loss_that_is_seen(tmp_path):
    """The drill's own eyes; what it finds out about many ranks is its record's."""
    made = ranks_drill.drill(0, 1, tmp_path, only="other")
    assert made.losses == [] and {row["case"] for row in made.rows} == {
        "other configuration",
        "other versions",
        "other prompts",
    }
    # A case that expects something else is lost.
    made.run("wrong", lambda: made.not_alike("wrong", "optim.beta is", {"optim.lr": 0.5}))
    assert "optim.beta" in made.losses[0] and made.rows[-2]["value"] == 1.0


def test_lines_and_complaints(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    assert ranks_drill.lines_of(metrics, "train") == 0
    lines = [{"iteration": 0, "kind": "eval"}, {"iteration": 1, "kind": "train"}]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "train"')
    assert ranks_drill.lines_of(metrics, "train") == 1
    text = "error: one\nTraceback (most recent call last):\n  error: no\nSaved\n"
    assert len(ranks_drill.complaints(text)) == 2
