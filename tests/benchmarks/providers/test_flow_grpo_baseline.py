"""The baselines compute what the trainer computes: images, losses, gradients from equal noise."""

from __future__ import annotations

import math

import pytest
import torch

from flowgrpo import update
from flowgrpo.records import Experience
from flowgrpo_kernels import initial_noise
from flowgrpo_kernels.philox import normals
from models import cases, configurations, random_weights
from providers import flow_grpo, ours
from providers.flow_grpo import FlowGrpoBaseline

EXACT = flow_grpo.Setting(torch.float32, None, torch.float32)
CASES = {
    "sd3 guided": cases.Case(configurations.TINY_SD3, 2, 4, 4.5, window=3, beta=0.04, chunks=2),
    "flux": cases.Case(configurations.TINY_FLUX, 2, 3, window=2, beta=0.04),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(case, ours, flow_grpo), in float32 with the same adapters, moved away from the base."""
    case = CASES[request.param]
    mine = ours.Ours(case, "cpu", **{"policy.dtype": "float32"})
    theirs = FlowGrpoBaseline(case.model, EXACT, "cpu")
    theirs.prepare(case)
    generator = torch.Generator().manual_seed(3)
    adapters = dict(theirs.trained.base_model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in mine.components.state.parameters.items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            adapters[name].copy_(parameter)
    return case, mine, theirs


def noise_of(trajectory):
    """The normals that our rollout has used, as flow_grpo's rollout asks for them."""
    shape = trajectory.latents.shape[2:]

    def noise(rows, i):
        seeds = trajectory.seeds[rows]
        if i == 0:
            return initial_noise(seeds, shape)
        steps = torch.full((len(seeds),), i - 1)
        return normals(seeds, steps, shape.numel()).view(-1, *shape)

    return noise


def test_same_images_from_the_same_noise(pair):
    case, mine, theirs = pair
    trajectory = mine.rollout()
    rollouts = theirs.rollout(noise_of(trajectory))
    assert len(rollouts) == case.chunks
    for rollout in rollouts:
        states = torch.stack(rollout.latents)
        torch.testing.assert_close(
            trajectory.latents[:, rollout.rows], states, rtol=1e-3, atol=1e-4
        )
        for j in theirs.window:
            torch.testing.assert_close(
                trajectory.log_probs[j, rollout.rows], rollout.log_probs[j], rtol=1e-3, atol=1e-4
            )
        outside = rollout.log_probs[case.window :]
        assert all(lp.isnan().all() for lp in outside)
    images = mine.decode(trajectory).float() / 255
    torch.testing.assert_close(images, theirs.decode(rollouts), rtol=0, atol=0.6 / 255)
    assert images.std() > 0.05


@pytest.mark.slow
def test_same_losses_and_gradients(pair):
    case, mine, theirs = pair
    trajectory = mine.rollout()
    rollouts = theirs.rollout(noise_of(trajectory))
    total, losses, kl = 0.0, [], []
    for rollout in rollouts:
        for j in theirs.window:
            loss, metrics = theirs.micro_step(rollout, j)
            loss.backward()
            total, losses = total + loss.item(), [*losses, metrics["policy_loss"].item()]
            kl.append(metrics["kl_loss"].item())
    count = len(losses)
    trained = [p for p in theirs.trained.parameters() if p.requires_grad]
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in trained)) / count
    for parameter in trained:
        parameter.grad = None

    gains, weights = theirs.advantages, torch.ones(case.rows)
    experience = Experience(trajectory, mine.conditioning, mine.components.uncond, gains, weights)
    before = {n: p.detach().clone() for n, p in mine.components.state.parameters.items()}
    parts = mine.components
    schedule, state = parts.schedule, parts.state
    metrics = update.update(schedule, state, parts.micro_step, experience, mine.config)
    with torch.no_grad():
        for name, parameter in mine.components.state.parameters.items():
            assert not torch.equal(parameter, before[name])
            parameter.copy_(before[name])
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-3, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(sum(losses) / count, rel=1e-3, abs=1e-5)
    assert metrics["kl"] == pytest.approx(sum(kl) / count, rel=1e-3) and metrics["kl"] > 1e-4
    assert metrics["grad_norm"] == [pytest.approx(norm, rel=2e-3)]
    assert metrics["max_ratio_error"] == 0.0


@pytest.mark.slow
def test_an_update_trains_and_merging_follows_it(pair):
    """`compile` without its compiler: merged weights are those of base and adapters together."""
    case, _, _ = pair
    setting = flow_grpo.Setting(torch.float32, None, torch.float32, compiled=False)
    theirs = FlowGrpoBaseline(case.model, setting, "cpu")
    theirs.prepare(case)
    rollouts = theirs.rollout()
    assert theirs.update(rollouts) <= 1e-6
    adapted = theirs.trained
    theirs.serving = random_weights.transformer(case.model, "cpu", torch.float32)
    theirs._merge()
    merged = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    theirs.serving = adapted
    additive = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    a, b = merged[0].latents[-1], additive[0].latents[-1]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    theirs.serving = random_weights.transformer(case.model, "cpu", torch.float32)
    base = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    assert (base[0].latents[-1] - b).abs().max() > 10 * (a - b).abs().max()


def test_settings_are_flow_grpos():
    sd3, flux = configurations.SD35_MEDIUM, configurations.FLUX_DEV
    eager = flow_grpo.setting("eager", sd3, "cuda")
    assert eager == flow_grpo.Setting(torch.float32, torch.float16, torch.float32, tf32=True)
    assert flow_grpo.setting("eager", flux, "cuda").autocast == torch.bfloat16
    best = flow_grpo.setting("compile", sd3, "cuda")
    assert best == flow_grpo.Setting(torch.bfloat16, None, torch.bfloat16, compiled=True)
