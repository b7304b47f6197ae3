"""The KL of paths: 0 without training, and by hand with it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from flowgrpo.evaluation import kl
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.evaluation.kl import STEPS, path_kl
from flowgrpo.policies.load import load_policy
from flowgrpo_kernels import flow_sde, initial_noise, sde_step
from support import processes


def move(policy, scale: float) -> None:
    """Trained weights at random, away from the base."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.transformer.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "lora_" not in name):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def prepared(tmp_path, **changes):
    config = processes.make(tmp_path, **{"policy.dtype": "float32", **changes})
    return load_policy(config), load_evaluation_set(config)


def by_hand(policy, evaluation_set, noise_level: float, guidance: float = 1.0) -> float:
    """The formula of the module, step by step, all rows at once, sums in float64."""
    texts = list(evaluation_set.prompts.texts)
    seeds = evaluation_set.seeds[:: evaluation_set.samples]
    conditioning, empty = (
        policy.encode(texts),
        policy.encode([""]).rows(torch.zeros(len(texts), dtype=int)),
    )
    sigmas = policy.sigmas(STEPS)
    transitions = flow_sde(sigmas, noise_level)

    def velocity(sample, sigma):
        conditional = policy.velocity(sample, sigma, conditioning)
        if guidance == 1:
            return conditional
        unconditional = policy.velocity(sample, sigma, empty)
        return unconditional + guidance * (conditional - unconditional)

    sample, total = initial_noise(seeds, policy.latent_shape), 0.0
    with torch.no_grad():
        for i in range(STEPS - 1):
            s, after = float(sigmas[i]), float(sigmas[i + 1])
            sigma = sigmas[i].float().expand(len(texts))
            trained = velocity(sample, sigma)
            with policy.reference():
                reference = velocity(sample, sigma)
            # Flow-GRPO, equation 9: the sigma of the next step stands in for a first one of 1.
            std = noise_level * math.sqrt(s / (1 - (s if s < 1 else after)))
            weight = (1 + std**2 * (1 - s) / (2 * s)) * (after - s)
            variance = std**2 * (s - after)
            squares = (trained.double() - reference.double()).square().mean()
            total += weight**2 * float(squares) / (2 * variance)
            sample, _ = sde_step(trained, sample, transitions, i, seeds=seeds)
    return total


@pytest.mark.slow
def test_the_kl_is_that_of_the_formula(tmp_path):
    policy, evaluation_set = prepared(tmp_path)
    # Adapters that have not moved change no bit.
    assert path_kl(policy, evaluation_set, 0.7, 4) == 0.0
    move(policy, 0.1)
    expected = by_hand(policy, evaluation_set, 0.7)
    assert expected > 1e-4
    assert path_kl(policy, evaluation_set, 0.7, 6) == pytest.approx(expected, rel=1e-4)
    # Four rows and two: the last forward is filled up.
    assert path_kl(policy, evaluation_set, 0.7, 4) == pytest.approx(expected, rel=1e-4)
    guided = by_hand(policy, evaluation_set, 0.3, 2.0)
    assert path_kl(policy, evaluation_set, 0.3, 6, 2.0) == pytest.approx(guided, rel=1e-4)
    assert guided != pytest.approx(expected, rel=0.1)


@pytest.mark.slow
def test_all_weights_need_a_copy_of_the_base(tmp_path):
    """Also where training has no KL, and would not keep one."""
    changes = {"policy.adapter": "full", "optim.beta": 0.0, "run.eval_kl": 0.7}
    policy, evaluation_set = prepared(tmp_path, **changes)
    assert path_kl(policy, evaluation_set, 0.7, 6) == 0.0
    move(policy, 0.02)
    expected = by_hand(policy, evaluation_set, 0.7)
    assert path_kl(policy, evaluation_set, 0.7, 6) == pytest.approx(expected, rel=1e-4) != 0.0


@pytest.mark.slow
def test_so_many_prompts_and_no_more(tmp_path, monkeypatch):
    policy, evaluation_set = prepared(tmp_path)
    move(policy, 0.1)
    monkeypatch.setattr(kl, "ROWS", 2)
    few = dataclasses.replace(
        evaluation_set, prompts=evaluation_set.prompts.take([0, 1]), seeds=evaluation_set.seeds[:4]
    )
    assert path_kl(policy, evaluation_set, 0.7, 4) == path_kl(policy, few, 0.7, 4)
