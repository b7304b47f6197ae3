"""The script that made nano's weights, for two steps."""

import json

import pytest
import torch

from flowgrpo.nano.pretrain import Pretraining, run, schedule
from flowgrpo.policies import Policy

TINY = {"steps": 2, "batch_size": 4, "evaluate_every": 1, "eval_images": 6}


@pytest.mark.slow
def test_pretraining_writes_its_log_and_a_model_that_the_next_run_and_the_trainer_load(tmp_path):
    first = run(Pretraining(tmp_path / "first", warmup=1, **TINY))
    lines = [json.loads(line) for line in (tmp_path / "first/pretrain.jsonl").open()]
    assert [line.get("step") for line in lines] == [1, 2, None]
    assert lines[-1] == first and first["config"]["steps"] == 2
    assert set(first["heldout, 40 steps"]) == {"guidance 1.0", "guidance 2.0", "guidance 3.5"}
    assert all(0 < line["loss"] < 10 for line in lines[:2])

    # At a rate of 0 the second run ends with the weights that it began with.
    still = {"muon_lr": 0.0, "adam_lr": 0.0, "incomplete": 1.0, "seed": 1}
    run(Pretraining(tmp_path / "second", init=tmp_path / "first/float32", **still, **TINY))
    policies = [
        Policy.load(str(tmp_path / name / "model"), device="cpu", dtype="float32")
        for name in ("first", "second")
    ]
    old, new = (policy.transformer.state_dict() for policy in policies)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert policies[0].encode(["a red circle"]).embeds.isfinite().all()


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    config = Pretraining(tmp_path, steps=100, warmup=10, anneal=0.4)
    assert schedule(0, config) == 0.1
    assert schedule(9, config) == schedule(60, config) == 1
    assert schedule(80, config) == 0.5
    assert schedule(100, config) == 0
