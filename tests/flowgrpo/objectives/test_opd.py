"""On-policy distillation: the KL to a teacher in float64, and where the teacher's weights are."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import train
from flowgrpo.config import ConfigError
from flowgrpo.objectives import OBJECTIVES
from flowgrpo.runs.export import export
from support import setups
from support.forward_process import record_gradients, velocity_of

SMALL = {"sample.prompts_per_iteration": 2, "sample.group_size": 4, "sample.batch_size": 4}
WIDER = {"policy.lora_rank": 8, "policy.lora_targets": ("to_q", "ff.net.0.proj")}


def save_teacher(model, folder, **changes):
    """An adapter of another rank and other layers, and the model with it in float64."""
    folder.mkdir()
    config = setups.config(model, folder, **{**WIDER, **changes})
    components = setups.parts(config)
    export(components.policy.transformer, components.state.ema, config.policy, folder / "teacher")
    return folder / "teacher", setups.double_copies(components)[0]


@pytest.fixture(scope="module")
def teacher(pixel_model, tmp_path_factory):
    return save_teacher(pixel_model, tmp_path_factory.mktemp("teacher") / "run")


def distilled(model, tmp_path, folder, **changes):
    changes = {**SMALL, "optim.objective": "opd", "optim.teacher": str(folder), **changes}
    config = setups.config(model, tmp_path, **changes)
    return setups.parts(config), config


CASES = {
    "plain": {},
    "guidance, gaussian KL": {"sample.guidance_scale": 2.0, "optim.kl": "gaussian"},
    "full": {"policy.adapter": "full", "policy.dtype": "auto", "optim.beta": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(pixel_model, tmp_path, teacher, case, monkeypatch):
    """Both optimizer steps; every ratio of the first is 1, whatever the rewards were."""
    folder, expert = teacher
    components, config = distilled(pixel_model, tmp_path, folder, **CASES[case])
    experience = setups.experience(components, config)
    assert not experience.advantages.any() and (experience.weights == 1).all()
    model, _ = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    metrics = setups.update(components, experience, config)
    assert metrics["max_ratio_error"] == 0.0
    trajectory, scale = experience.trajectory, config.sample.guidance_scale
    table, sigmas = components.schedule.transitions.table.double(), components.schedule.sigmas
    losses = []
    for number, actual in enumerate(gradients):
        terms = []
        for row in range(4 * number, 4 * number + 4):
            for i in trajectory.trained_steps[:, row].tolist():
                sample = trajectory.latents[i, row : row + 1].double()
                arguments = (experience, sample, sigmas[i].double(), row, scale)
                with torch.no_grad():
                    target = velocity_of(expert, *arguments)
                distance = (velocity_of(model, *arguments) - target).square().mean()
                terms.append(table[i, 5] * table[i, 1] ** 2 * distance)
        model.zero_grad()
        loss = torch.stack(terms).mean()
        loss.backward()
        losses.append(loss.item())
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        ours, theirs = (
            torch.cat([values[name].double().flatten() for name in expected])
            for values in (actual, expected)
        )
        assert theirs.norm() > 0 and (ours - theirs).norm() < 3e-4 * theirs.norm()
    assert metrics["loss"] == metrics["teacher_kl"] == pytest.approx(sum(losses) / 2, rel=1e-4)


def test_where_the_teacher_s_weights_are(pixel_model, tmp_path, teacher):
    """With LoRA it reads the student's frozen weights; a student that is trained whole has its own.
    Nothing of the teacher is trained, and the student has nothing of its adapter."""
    folder, _ = teacher
    components, _ = distilled(pixel_model, tmp_path, folder)
    policy = components.policy
    student = {p.data_ptr() for p in policy.transformer.parameters()}
    own = [n for n, p in policy._teacher.named_parameters() if p.data_ptr() not in student]
    assert own and all(".lora_" in name for name in own)
    assert not any(p.requires_grad for p in policy._teacher.parameters())
    assert policy.pipeline.transformer is policy.transformer is not policy._teacher
    full = {"policy.adapter": "full", "policy.dtype": "auto"}
    policy = distilled(pixel_model, tmp_path, folder, **full)[0].policy
    trained = {p.data_ptr() for p in policy.parameters()}
    assert not trained & {p.data_ptr() for p in policy._teacher.parameters()}


@pytest.mark.slow
def test_the_student_comes_to_the_teacher(pixel_model, tmp_path, teacher):
    changes = {"optim.lr": 1e-2, "sample.steps": 5}
    components, config = distilled(pixel_model, tmp_path, teacher[0], **changes)
    kl = []
    for components.state.iteration in range(10):
        experience = setups.experience(components, config)
        kl.append(setups.update(components, experience, config)["teacher_kl"])
    assert kl[-1] < 0.5 * kl[0]


FLUX = {"policy.resolution": 16, "policy.max_sequence_length": 4, "policy.text_cache": ""}


@pytest.mark.slow
def test_flux(flux_model, tmp_path):
    targets = {"policy.lora_targets": ("to_q", "to_v")}
    folder, _ = save_teacher(flux_model, tmp_path / "run", **{**FLUX, **targets})
    components, config = distilled(flux_model, tmp_path, folder, **FLUX, **targets)
    metrics = setups.update(components, setups.experience(components, config), config)
    assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


def test_bad_teachers(pixel_model, tmp_path, teacher):
    with pytest.raises(ConfigError, match=r"optim\.teacher is empty with optim\.objective opd"):
        train.setup(setups.config("nowhere", tmp_path, **{"optim.objective": "opd"}))
    with pytest.raises(ConfigError, match=r"optim\.teacher is '.*' with optim\.objective grpo"):
        train.setup(setups.config("nowhere", tmp_path, **{"optim.teacher": "adapter"}))
    with pytest.raises(ConfigError, match=r"optim\.teacher: .* LoRA weights .* expected"):
        distilled(pixel_model, tmp_path, tmp_path / "nothing")
    assert OBJECTIVES["opd"].rollout == "stochastic"
