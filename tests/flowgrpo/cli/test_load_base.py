"""The model of a run, as `evaluate` and `sample` load it."""

from __future__ import annotations

from flowgrpo.cli.targets import load_base
from support import setups


def test_a_run_that_demanded_graphs_is_loaded_where_there_are_none(pixel_model, tmp_path):
    changes = {"sample.capture": "on", "optim.capture": "on"}
    policy = load_base(setups.config(pixel_model, tmp_path, **changes))
    assert policy.device.type == "cpu" and policy.graphs is None
