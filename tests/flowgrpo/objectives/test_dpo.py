"""Flow-DPO: pairs, its loss by hand and in float64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from flowgrpo.config import Config, OptimConfig, replace
from flowgrpo.objectives import dpo, matching
from flowgrpo_kernels import Transitions
from flowgrpo_kernels import matching as matching_rows
from support import setups
from support.forward_process import noised, prepared, record_gradients, velocity_of, with_rewards

THREE = {
    "sample.prompts_per_iteration": 3,
    "sample.group_size": 4,
    "sample.batch_size": 6,
    "optim.updates_per_iteration": 1,
}


def test_loss_and_gradient_by_hand():
    """One pair of one element: v is 2 and 1, v_ref 1 and 3, v* 0 and 1. Errors 4 and 0, of the
    reference 1 and 4: the better is 3 worse matched, the worse 4 better. At b 1/7 the margin is
    -(1/14) (3 + 4) = -1/2."""
    velocity = torch.tensor([[2.0], [1.0]], requires_grad=True)
    outputs = [torch.tensor([[1.0], [3.0]]), velocity]

    class Fixed(SimpleNamespace):
        def reference(self):
            import contextlib

            return contextlib.nullcontext()

    policy = Fixed(velocity=lambda sample, sigma, conditioning: outputs.pop(0))
    table = Transitions.cat(matching_rows([0.5]), matching_rows([0.5]))
    batch = SimpleNamespace(
        sample=torch.zeros(2, 1), prev_sample=torch.tensor([[0.0], [1.0]]), transitions=table,
        table_row=torch.tensor([0, 0]), sigma=torch.tensor([0.5, 0.5]), conditioning=None,
        uncond=None, old_log_prob=None, weights=torch.tensor([1.0, 1.0]),
    )  # fmt: skip
    config = replace(Config(), **{"optim.dpo_beta": 1 / 7, "optim.beta": 0.0})
    out = dpo.loss(policy, batch, config)
    assert out.loss.item() == pytest.approx(math.log(1 + math.exp(0.5)))
    assert out.metrics["margin"].item() == pytest.approx(-0.5)
    assert out.metrics["pair_accuracy"] == 0 and out.ratio is None
    out.loss.backward()
    # -sigmoid(1/2) d margin / d v, with d margin / d v = -(1/14) 2 (v - v*) and its negative.
    slope = 1 / (1 + math.exp(-0.5)) / 7
    assert velocity.grad.flatten().tolist() == pytest.approx([slope * 2, 0.0])


def test_weights():
    """Groups without a worse image, or with one that failed, have no pair."""
    rewards = torch.tensor([[0.0, 1.0, 0.5], [0.5, 0.5, 0.5], [math.nan, 2.0, 1.0]]).double()
    relative, weights = dpo.weigh(rewards, OptimConfig())
    assert weights.tolist() == [3.0] * 3 + [0.0] * 6
    assert (relative[:3].argmin(), relative[:3].argmax()) == (0, 1)
    _, none = dpo.weigh(torch.ones(2, 3), OptimConfig())
    assert not none.any()


def test_pairs_share_level_and_noise(pixel_model, tmp_path):
    components, config, experience = prepared("dpo", pixel_model, tmp_path, **THREE)
    experience = with_rewards(experience, components.objective, config)
    prepare = components.objective.prepare
    schedule, experience = prepare(components.policy, components.schedule, experience, config)
    batch = dpo.gather(schedule, experience, slice(0, 3), range(1))
    best, worst = (1, 4, 11), (0, 4, 10)
    for m in range(3):
        sigma, sample, target = noised(experience, experience.draws, 0, best[m])
        torch.testing.assert_close(batch.sample[m : m + 1].double(), sample)
        loser = experience.trajectory.latents[-1, worst[m]].double()
        noise = target + experience.trajectory.latents[-1, best[m] : best[m] + 1].double()
        expected = (1 - sigma) * loser + sigma * noise
        torch.testing.assert_close(batch.sample[3 + m : 4 + m].double(), expected)
        torch.testing.assert_close(batch.prev_sample[3 + m : 4 + m].double(), noise - loser)
    assert torch.equal(batch.sigma[:3], batch.sigma[3:])
    assert batch.weights.tolist() == [1.5, 0.0, 1.5] * 2


CASES = {
    "plain": {"optim.beta": 0.3},
    "beta 0, two levels": {"optim.beta": 0.0, "optim.levels": 2, "optim.dpo_beta": 30.0},
    "guidance, normalized": {
        "sample.guidance_scale": 2.5,
        "optim.level_weight": "normalized",
        "optim.beta": 0.1,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(pixel_model, tmp_path, case, monkeypatch):
    """Of a whole update with a dropped group, in float64."""
    components, config, experience = prepared(
        "dpo", pixel_model, tmp_path, **{**THREE, **CASES[case]}
    )
    experience = with_rewards(experience, components.objective, config)
    model, base = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    metrics = setups.update(components, experience, config)
    draws = matching.draw_levels(components.policy, config, experience.iteration)
    optim, scale = config.optim, config.sample.guidance_scale
    terms = []
    for draw in range(optim.levels):
        for best, worst in ((1, 0), (4, 4), (11, 10)):
            sigma, _, target = noised(experience, draws, draw, best)
            results = experience.trajectory.latents[-1].double()
            noise = target + results[best : best + 1]
            gaps, distances = [], []
            for row in (best, worst):
                x0 = results[row : row + 1]
                arguments = (experience, (1 - sigma) * x0 + sigma * noise, sigma, row, scale)
                v = velocity_of(model, *arguments)
                with torch.no_grad():
                    v_ref = velocity_of(base, *arguments)
                error, error_ref = ((u - (noise - x0)).square().mean() for u in (v, v_ref))
                w = 1.0
                if optim.level_weight == "normalized":
                    w = sigma / (v_ref - (noise - x0)).abs().mean()
                gaps.append(w * (error - error_ref))
                distances.append((v - v_ref).square().mean())
            margin = -optim.dpo_beta / 2 * (gaps[0] - gaps[1])
            preference = -torch.nn.functional.logsigmoid(margin)
            weight = experience.weights[best].double()
            terms.append(weight * (preference + optim.beta * sum(distances) / 2))
    loss = torch.stack(terms).mean()
    loss.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    ours, theirs = (
        torch.cat([values[name].double().flatten() for name in expected])
        for values in (gradients[0], expected)
    )
    assert theirs.norm() > 0 and (ours - theirs).norm() < 3e-4 * theirs.norm()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)


def test_full_fine_tuning_keeps_its_reference_without_a_kl(pixel_model, tmp_path):
    changes = {"policy.adapter": "full", "policy.dtype": "auto", "optim.beta": 0.0}
    components, config, experience = prepared("dpo", pixel_model, tmp_path, **changes)
    metrics = setups.update(components, experience, config)
    assert min(metrics["grad_norm"]) > 0 and metrics["margin"] != 0 and metrics["kl"] == 0


FLUX = {"policy.resolution": 16, "policy.max_sequence_length": 4, "policy.text_cache": ""}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "changes"), [("latent_model", {"policy.dtype": "bfloat16"}), ("flux_model", FLUX)]
)
def test_other_families(request, tmp_path, model, changes):
    targets = {"policy.lora_targets": ("to_q", "to_v")}
    folder = request.getfixturevalue(model)
    components, config, experience = prepared("dpo", folder, tmp_path, **targets, **changes)
    assert min(setups.update(components, experience, config)["grad_norm"]) > 0
