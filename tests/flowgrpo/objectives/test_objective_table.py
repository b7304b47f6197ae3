"""The table of objectives, and one that is added to it by this file alone.

The added one has no ratio and looks at no step of the sampler: it matches re-noised results,
weighted by their rewards. With x_0 the result of a row, s a noise level and eps ~ N(0, I):

    x_s = (1 - s) x_0 + s eps        v* = eps - x_0
    loss = mean over rows and levels of w mean (v(x_s, s) - v*)^2,    w = exp(advantage)

The kernels score it as a transition with mean 0 x_s + 1 v and k = 1; C is 1, because a row without
noise has log_prob 0.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo import nano, objectives, train
from flowgrpo.config import ConfigError, replace
from flowgrpo.objectives import OBJECTIVES, Loss, Objective
from flowgrpo.objectives.advantages import advantages
from flowgrpo.records import Batch
from flowgrpo.sampling.rollout import chunks
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import Transitions, initial_noise, log_prob
from flowgrpo_kernels.transitions import COLUMNS
from support import setups

LEVELS = (0.25, 0.6, 0.9)


def weigh(rewards, config):
    gains, weights = advantages(rewards, config)
    return gains, weights * gains.exp()


def micro_steps(config, rows):
    return [
        (chunk, range(level, level + 1))
        for chunk in chunks(rows, config.sample.batch_size)
        for level in range(len(LEVELS))
    ]


def prepare(policy, schedule, experience, config):
    """Noise levels and a table of their own, and the conditioning for these."""
    table = torch.zeros(len(LEVELS), len(COLUMNS))
    table[:, [COLUMNS.index(name) for name in ("B", "C", "k")]] = 1.0
    levels = Schedule(
        sigmas=torch.tensor([*LEVELS, 0.0]),
        transitions=Transitions.from_table(table, None, ["cps"] * len(LEVELS)),
        weights=torch.ones(len(LEVELS)),
    )
    return levels, objectives.with_prepared_conditioning(policy, levels, experience)


def gather(schedule, experience, rows, numbers):
    trajectory, [level] = experience.trajectory, numbers
    index = torch.arange(rows.start, rows.stop)
    result, sigma = trajectory.latents[-1, index], schedule.sigmas[level]
    # Seeds of their own: those of the rollout have drawn its noise.
    noise = initial_noise(trajectory.seeds[index] + 1 + level, result.shape[1:])
    step = torch.full_like(index, level)
    return Batch(
        sample=(1 - sigma) * result + sigma * noise,
        prev_sample=noise - result,
        sigma=sigma.expand(len(index)),
        transitions=schedule.transitions,
        table_row=step,
        conditioning=experience.conditioning.rows_at(trajectory.groups[index], step),
        uncond=None,
        advantages=experience.advantages[index],
        weights=experience.weights[index],
    )


def matching(policy, batch, config):
    velocity = policy.velocity(batch.sample, batch.sigma, batch.conditioning)
    arguments = (batch.sample, batch.prev_sample, batch.transitions, batch.table_row)
    error = -log_prob(velocity, *arguments)
    loss = (batch.weights * error).mean()
    return Loss(loss, {"loss": loss.detach(), "error": error.detach().mean()}, None)


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    """The objective `toy` in the table, inside a test."""
    row = Objective(weigh, micro_steps, prepare, gather, matching)
    monkeypatch.setitem(OBJECTIVES, "toy", row)


def config(folder: Path, **changes):
    """Two short iterations of the embedded model with the objective `toy`."""
    small = {
        "sample.prompts_per_iteration": 3,
        "sample.group_size": 4,
        "sample.batch_size": 3,
        "sample.steps": 4,
        "sample.eval_steps": 3,
        "policy.device": "cpu",
        "policy.dtype": "float32",
        "optim.objective": "toy",
        "optim.advantage_std": "group",
        "out": str(folder / "run"),
        "steps": 2,
        "eval_every": 0,
        "eval_prompts": 2,
        "eval_samples": 1,
        "eval_guidance": 1.0,
        "checkpoint_every": 1,
        "threads": 1,
        "progress": "none",
    }
    return nano.recipe(**{**small, **changes})


def matching_errors(model, experience, rows: torch.Tensor, level: int) -> torch.Tensor:
    """The matching errors of rows at one level, by the transformer alone, in float64."""
    trajectory, sigma = experience.trajectory, LEVELS[level]
    results = trajectory.latents[-1, rows].double()
    noise = initial_noise(trajectory.seeds[rows] + 1 + level, results.shape[1:]).double()
    text = experience.conditioning.rows(trajectory.groups[rows])
    velocity = model(
        hidden_states=(1 - sigma) * results + sigma * noise,
        timestep=torch.full((len(rows),), 1000 * sigma, dtype=torch.float64),
        encoder_hidden_states=text.embeds.double(),
        pooled_projections=text.pooled.double(),
        return_dict=False,
    )[0]
    return (velocity - (noise - results)).square().mean((1, 2, 3))


@pytest.mark.slow
def test_loss_and_gradients_of_an_update(tmp_path, monkeypatch):
    """Both optimizer steps' gradients, with a dropped group, by plain autograd in float64."""
    settings = config(tmp_path)
    components = setups.parts(settings)
    experience = setups.experience(components, settings)
    rewards = torch.tensor(
        [[0.0, 1.0, 0.5, 0.25], [math.nan, 1.0, 0.0, 1.0], [0.75, 0.75, 0.75, 1.0]],
        dtype=torch.float64,
    )
    gains, weights = components.objective.weigh(rewards, settings.optim)
    experience = train.Experience(**{**vars(experience), "advantages": gains, "weights": weights})
    model, _ = setups.double_copies(components)
    gradients = []

    def record(state):
        gradients.append({name: p.grad.clone() for name, p in state.parameters.items()})
        state.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    monkeypatch.setattr(type(components.state), "step", record)
    metrics = setups.update(components, experience, settings)
    assert list(metrics) == ["loss", "error", "grad_norm", "max_ratio_error"]
    assert metrics["max_ratio_error"] == 0.0 and len(gradients) == 2

    centred = rewards - rewards.mean(dim=1, keepdim=True)
    expected_weights = (centred / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-4)).exp()
    # Two groups of three are left, so their weights are scaled up by 3 / 2.
    expected_weights = expected_weights.nan_to_num(0.0).flatten() * 1.5
    losses = []
    for number, actual in enumerate(gradients):
        model.zero_grad()
        rows = torch.arange(6 * number, 6 * number + 6)
        terms = [
            expected_weights[rows] * matching_errors(model, experience, rows, level)
            for level in range(len(LEVELS))
        ]
        loss = torch.cat(terms).mean()
        loss.backward()
        losses.append(loss.item())
        expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        ours, theirs = (
            torch.cat([values[name].double().flatten() for name in expected])
            for values in (actual, expected)
        )
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 1e-4 * theirs.norm()
    assert metrics["loss"] == pytest.approx(sum(losses) / 2, rel=1e-5)


SHORT = {
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 2,
    "sample.batch_size": 2,
    "sample.steps": 2,
    "sample.eval_steps": 1,
    "eval_prompts": 1,
}
"""The smallest run of two optimizer steps an iteration."""


def lines(settings) -> list[dict]:
    """metrics.jsonl without times, and without an evaluation because a run ended."""
    text = Path(settings.run.out, "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in parsed
        if not line.get("final")
    ]


@pytest.mark.slow
def test_it_trains_and_resumes_bit_for_bit(tmp_path):
    """Two iterations at once, and one iteration, then another by a resumed run."""
    whole, halves = (config(tmp_path / name, **SHORT) for name in ("whole", "halves"))
    train.run(whole)
    train.run(replace(halves, **{"run.steps": 1}))
    train.run(replace(halves, **{"run.resume": halves.run.out}))
    assert lines(whole) == lines(halves)
    steps = [line for line in lines(whole) if line["kind"] == "train"]
    assert [line["iteration"] for line in steps] == [1, 2]
    assert all(min(line["grad_norm"]) > 0 and line["error"] > 0 for line in steps)
    assert "clip_fraction" not in steps[0] and steps[0]["loss"] != steps[1]["loss"]
    for stem in ("weights", "optimizer", "ema"):
        one, other = (
            load_file(Path(settings.run.out, "checkpoints", "step-000002", f"{stem}.safetensors"))
            for settings in (whole, halves)
        )
        assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)
    first = load_file(Path(whole.run.out, "checkpoints", "step-000001", "weights.safetensors"))
    last = load_file(Path(whole.run.out, "checkpoints", "step-000002", "weights.safetensors"))
    assert any(not torch.equal(first[name], tensor) for name, tensor in last.items())


@pytest.mark.slow
def test_each_objective_is_another_run(tmp_path):
    """The table decides: the same images in the first iteration, another loss."""
    toy, grpo = (
        config(tmp_path / name, **{**SHORT, "optim.objective": name, "steps": 1})
        for name in ("toy", "grpo")
    )
    for settings in (toy, grpo):
        train.run(settings)
    one, other = (lines(settings)[1] for settings in (toy, grpo))
    assert one["rewards"] == other["rewards"] and one["equal_groups"] == other["equal_groups"]
    assert one["loss"] != other["loss"] and "policy_loss" in other and "policy_loss" not in one


@pytest.mark.parametrize("name", ["tyo", "GRPO", ""])
def test_unknown_names(tmp_path, name):
    """Before a model is loaded, with the whole list."""
    with pytest.raises(ConfigError, match=r"one of grpo, .*toy is expected") as raised:
        train.run(config(tmp_path, **{"optim.objective": name}))
    assert repr(name) in str(raised.value) and not (tmp_path / "run").exists()
