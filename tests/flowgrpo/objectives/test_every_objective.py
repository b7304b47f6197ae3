"""What every objective of the table keeps to: captured bits, no waiting, runs that resume."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo import cuda_graphs, train, update
from flowgrpo.config import replace
from flowgrpo.objectives import OBJECTIVES
from flowgrpo.runs.export import export
from support import setups
from support.cpu_graphs import Operations, Recorder

SMALL = {
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 4,
    "sample.batch_size": 4,
    "sample.steps": 4,
    "sample.share_prefix": False,
    "optim.lr": 1e-3,
}
RUN = {
    "sample.steps": 2,
    "sample.window_size": 1,
    "sample.eval_steps": 1,
    "run.steps": 2,
    "run.eval_every": 0,
    "run.eval_prompts": 1,
    "run.eval_samples": 1,
    "run.checkpoint_every": 1,
}
CASES = {
    **{name: {"optim.objective": name} for name in OBJECTIVES},
    "refl": {"optim.objective": "refl", "optim.refl_steps": 2},
    "awm normalized": {
        "optim.objective": "awm",
        "optim.updates_per_iteration": 1,
        "optim.level_weight": "normalized",
    },
    "awm, scouts": {"optim.objective": "awm", "sample.scouts": 6},
    "grpo, dppo": {"optim.objective": "grpo", "optim.dppo": True},
    "nft guidance": {
        "optim.objective": "nft",
        "sample.guidance_scale": 2.0,
        "optim.old_decay_rise": 0.2,
    },
}


def row_of(case):
    return OBJECTIVES[CASES[case]["optim.objective"]]


cases = pytest.mark.parametrize("case", CASES)


@pytest.fixture(scope="module")
def teacher(pixel_model, tmp_path_factory):
    """The adapter that opd learns from."""
    folder = tmp_path_factory.mktemp("teacher")
    config = setups.config(pixel_model, folder)
    parts = setups.parts(config, spread=0.2)
    export(parts.policy.transformer, parts.state.ema, config.policy, folder / "adapter")
    return folder / "adapter"


def changes_of(case, teacher):
    name = CASES[case]["optim.objective"]
    return {**SMALL, **CASES[case], **({"optim.teacher": str(teacher)} if name == "opd" else {})}


def components(model, folder, changes, record=False):
    """Components and config; with `record`, rollout and update are captured."""
    config = setups.config(model, folder, **changes)
    parts = setups.parts(config)
    if record:
        parts.policy.graphs = cuda_graphs.Graphs(parts.policy, Recorder())
        micro_step = update.MicroStep(parts.policy, parts.objective, parts.policy.graphs)
        parts = train.Components(**{**vars(parts), "micro_step": micro_step})
    return parts, config


# Rewards that a loss asks may wait for the device.
on_device = pytest.mark.parametrize(
    "case", [case for case in CASES if not row_of(case).differentiable]
)


@pytest.mark.slow
@on_device
def test_a_captured_update_has_the_eager_bits(pixel_model, tmp_path, case, teacher):
    """Over two iterations: figures, weights, and those of the old policy."""
    metrics = []
    changes = changes_of(case, teacher)
    both = [components(pixel_model, tmp_path, changes, record) for record in (False, True)]
    for parts, config in both:
        metrics.append([])
        for parts.state.iteration in range(2):
            experience = setups.experience(parts, config)
            metrics[-1].append(setups.update(parts, experience, config))
    (eager, _), (captured, _) = both
    assert metrics[0] == metrics[1] and metrics[0][0] != metrics[0][1]
    # Scouts have a graph of their own.
    assert captured.policy.graphs.recorder.captures == 2 + ("scouts" in case)
    for stem, tensors in eager.state.tensors().items():
        others = captured.state.tensors()[stem]
        assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items()), stem


@pytest.mark.slow
@on_device
def test_an_update_reads_the_device_once(pixel_model, tmp_path, case, teacher, monkeypatch):
    """From the first micro-step on; before it, levels are drawn on the host."""
    parts, config = components(pixel_model, tmp_path, changes_of(case, teacher))
    experience = setups.experience(parts, config)
    prepared = parts.objective.prepare(parts.policy, parts.schedule, experience, config)
    row = dataclasses.replace(parts.objective, prepare=lambda *_: prepared)
    monkeypatch.setattr(parts.micro_step, "objective", row)
    with Operations():
        metrics = setups.update(parts, experience, config)
    assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


def lines(config) -> list[dict]:
    """metrics.jsonl without times, and without an evaluation because a run ended."""
    text = Path(config.run.out, "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in parsed
        if not line.get("final")
    ]


@pytest.mark.slow
@cases
def test_a_run_resumes_bit_for_bit(pixel_model, tmp_path, case, teacher):
    """Two iterations at once, and one iteration, then another by a resumed run."""
    whole, halves = (
        setups.config(
            pixel_model,
            tmp_path,
            **{**changes_of(case, teacher), **RUN, "run.out": str(tmp_path / out)},
        )
        for out in ("whole", "halves")
    )
    train.run(whole)
    train.run(replace(halves, **{"run.steps": 1}))
    train.run(replace(halves, **{"run.resume": halves.run.out}))
    assert lines(whole) == lines(halves)
    steps = [line for line in lines(whole) if line["kind"] == "train"]
    assert [line["iteration"] for line in steps] == [1, 2]
    assert steps[0]["loss"] != steps[1]["loss"]
    one, other = (Path(c.run.out, "checkpoints", "step-000002") for c in (whole, halves))
    stems = sorted(path.name for path in one.glob("*.safetensors"))
    assert stems == sorted(path.name for path in other.glob("*.safetensors"))
    assert ("old.safetensors" in stems) == OBJECTIVES[whole.optim.objective].old_policy
    for name in stems:
        tensors, others = load_file(one / name), load_file(other / name)
        assert tensors.keys() == others.keys()
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
