"""The baselines compute what the trainer computes: images, losses, gradients from equal noise."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from flowgrpo import update
from flowgrpo.records import Experience
from flowgrpo_kernels import initial_noise
from flowgrpo_kernels.philox import normals

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import cases
    import family
    import models
    import ours
finally:
    sys.path.remove(str(BENCHMARKS))

EXACT = family.Setting(torch.float32, None, torch.float32)
CASES = {
    "sd3 guided": cases.Case(models.TINY_SD3, 2, 4, 4.5, window=3, beta=0.04, chunks=2),
    "flux": cases.Case(models.TINY_FLUX, 2, 3, window=2, beta=0.04),
}


@pytest.fixture(scope="module", params=CASES)
def pair(request):
    """(case, ours, the family), in float32 with the same adapters, moved away from the base."""
    case = CASES[request.param]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        mine = ours.Ours(case, "cpu", **{"policy.dtype": "float32"})
    theirs = family.Family(case.model, EXACT, "cpu")
    theirs.prepare(case)
    generator = torch.Generator().manual_seed(3)
    adapters = dict(theirs.trained.base_model.model.named_parameters())
    with torch.no_grad():
        for name, parameter in mine.parts.state.parameters.items():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
            adapters[name].copy_(parameter)
    return case, mine, theirs


def noise_of(trajectory):
    """The normals that our rollout has used, as the family's rollout asks for them."""
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
    experience = Experience(trajectory, mine.conditioning, mine.parts.uncond, gains, weights)
    before = {n: p.detach().clone() for n, p in mine.parts.state.parameters.items()}
    metrics = update.update(mine.parts, experience, mine.config)
    with torch.no_grad():
        for name, parameter in mine.parts.state.parameters.items():
            assert not torch.equal(parameter, before[name])
            parameter.copy_(before[name])
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-3, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(sum(losses) / count, rel=1e-3, abs=1e-5)
    assert metrics["kl"] == pytest.approx(sum(kl) / count, rel=1e-3) and metrics["kl"] > 1e-4
    assert metrics["grad_norm"] == [pytest.approx(norm, rel=2e-3)]
    assert metrics["max_ratio_error"] == 0.0


def test_an_update_trains_and_merging_follows_it(pair):
    """`compile` without its compiler: merged weights are those of base and adapters together."""
    case, _, _ = pair
    setting = family.Setting(torch.float32, None, torch.float32, compiled=False)
    theirs = family.Family(case.model, setting, "cpu")
    theirs.prepare(case)
    rollouts = theirs.rollout()
    assert theirs.update(rollouts) <= 1e-6
    adapted = theirs.trained
    theirs.serving = models.transformer(case.model, "cpu", torch.float32)
    theirs._merge()
    merged = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    theirs.serving = adapted
    additive = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    a, b = merged[0].latents[-1], additive[0].latents[-1]
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    theirs.serving = models.transformer(case.model, "cpu", torch.float32)
    base = theirs.rollout(lambda rows, i: torch.ones_like(rollouts[0].latents[0]))
    assert (base[0].latents[-1] - b).abs().max() > 10 * (a - b).abs().max()


def test_settings_are_the_familys():
    sd3, flux = models.SD35_MEDIUM, models.FLUX_DEV
    eager = family.setting("eager", sd3, "cuda")
    assert eager == family.Setting(torch.float32, torch.float16, torch.float32, tf32=True)
    assert family.setting("eager", flux, "cuda").autocast == torch.bfloat16
    best = family.setting("compile", sd3, "cuda")
    assert best == family.Setting(torch.bfloat16, None, torch.bfloat16, compiled=True)
