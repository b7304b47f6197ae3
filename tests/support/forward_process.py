"""Objectives on re-noised results, for tests: small set-ups, and the same in float64."""

from __future__ import annotations

import math

import torch

from flowgrpo.records import Experience
from flowgrpo_kernels import initial_noise
from support import setups

SMALL = {
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 6,
    "sample.batch_size": 3,
    "sample.steps": 4,
}


def prepared(name, model, folder, spread=0.1, **changes):
    """Components, config and one experience of the objective `name`."""
    config = setups.config(model, folder, **{"optim.objective": name, **SMALL, **changes})
    components = setups.parts(config, spread)
    return components, config, setups.experience(components, config)


def velocity_of(net, experience, sample, sigma, row, scale):
    """The velocity after guidance of one row by the transformer alone, in float64."""
    trajectory = experience.trajectory
    text = experience.conditioning.rows(trajectory.groups[row : row + 1])
    conditional, *uncond = (
        net(
            hidden_states=sample,
            timestep=(1000 * sigma).reshape(1),
            encoder_hidden_states=c.embeds.double(),
            pooled_projections=c.pooled.double(),
            return_dict=False,
        )[0]
        for c in (text, experience.uncond)
        if c is not None
    )
    if not uncond:
        return conditional
    return uncond[0].detach() + scale * (conditional - uncond[0].detach())


def noised(experience, draws, draw, row):
    """Level, input and target of one draw of a row, in float64."""
    result = experience.trajectory.latents[-1, row : row + 1].double()
    noise = initial_noise(draws.seeds[draw, row : row + 1], result.shape[1:]).double()
    sigma = draws.sigmas[draw, row].double()
    return sigma, (1 - sigma) * result + sigma * noise, noise - result


def record_gradients(monkeypatch, state):
    """Gradients of the optimizer steps, none of which is taken."""
    gradients = []

    def record(self):
        gradients.append({name: p.grad.clone() for name, p in state.parameters.items()})
        state.optimizer.zero_grad(set_to_none=True)
        return torch.zeros(())

    monkeypatch.setattr(type(state), "step", record)
    return gradients


def with_rewards(experience, objective, config):
    """Three groups, the second of which was dropped; the best of the others are rows 1 and 11."""
    rewards = torch.tensor(
        [[0.0, 1.0, 0.5, 0.25], [math.nan, 1.0, 0.0, 1.0], [0.75, 0.75, 0.5, 1.0]],
        dtype=torch.float64,
    )
    gains, weights = objective.weigh(rewards, config.optim)
    return Experience(**{**vars(experience), "advantages": gains, "weights": weights})
