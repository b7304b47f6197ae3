"""Sampling: noise -> T steps of the transition -> latents, all states kept.

Step i is x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps (flowgrpo_kernels.transitions). Which
row of the transition table a row of the batch uses at step i is data: the table holds the
stochastic steps and, below them, the deterministic ones, so rows with different windows go through
one forward.

    window of group k = [start_k, start_k + W): stochastic and trained; elsewhere the ODE step

Rows are processed in chunks of a fixed number, in order. The update uses the same chunks: kernels
of matrix products may depend on the number of rows, and the on-policy ratio shall be exactly 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds as random
from flowgrpo.config import Config, SampleConfig
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.records import Trajectory
from flowgrpo_kernels import Transitions, cps, dance_sde, flow_sde, initial_noise, ode, sde_step

TRANSITIONS = {"flow_sde": flow_sde, "dance_sde": dance_sde, "cps": cps}


@dataclass(frozen=True)
class Schedule:
    """The steps of a sampler, computed once in float64 and put on the device."""

    sigmas: Tensor
    """float32 [T+1]: what the model is told at each step."""
    transitions: Transitions
    """Row i: step i by the SDE; row T + i: step i by the ODE."""
    weights: Tensor
    """float32 [T]: C / |B| of the SDE's steps, see `step_weights`."""

    @property
    def steps(self) -> int:
        """T."""
        return self.sigmas.numel() - 1


def schedule(policy: Policy, sample: SampleConfig, kl: str = "std_dev") -> Schedule:
    """The training sampler of a policy."""
    sigmas = policy.sigmas(sample.steps)
    stochastic = TRANSITIONS[sample.transition](sigmas, sample.noise_level, kl=kl)
    both = Transitions.cat(stochastic, ode(sigmas))
    low, high = sample.window_bounds
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        both.to(policy.device),
        step_weights(stochastic, low, high).to(policy.device),
    )


def ode_schedule(policy: Policy, steps: int) -> Schedule:
    """The deterministic sampler of `steps` steps."""
    sigmas = policy.sigmas(steps)
    return Schedule(
        sigmas.to(policy.device, torch.float32),
        ode(sigmas).to(policy.device),
        torch.zeros(steps, device=policy.device),
    )


def step_weights(transitions: Transitions, low: int, high: int) -> Tensor:
    """float32 [T]: C / |B|, of mean 1 over the steps [low, high).

    The gradient of log_prob in the velocity is (B / C) eps / D, so these weights give every step
    the same scale of gradient.
    """
    table = transitions.table.to("cpu", torch.float64)
    weights = table[:, 2] / table[:, 1].abs()
    return (weights / weights[low:high].mean()).to(torch.float32)


def windows(groups: int, config: Config, iteration: int) -> Tensor:
    """int64 [W, B]: the trained steps of each row, the same for all rows of a group."""
    low, high = config.sample.window_bounds
    length = config.sample.trained_steps
    number = np.arange(groups)
    start = low + random.below(
        high - low - length + 1, config.run.seed, random.WINDOW, iteration, number
    )
    start = torch.from_numpy(start).repeat_interleave(config.sample.group_size)
    return start[None, :] + torch.arange(length)[:, None]


def table_rows(positions: Tensor, steps: int) -> Tensor:
    """int64 [T, B]: the table row of each step, stochastic at `positions` [W, B], else ODE."""
    rows = torch.arange(steps)[:, None].expand(steps, positions.shape[1]) + steps
    return rows.clone().scatter_(0, positions, positions)


def velocity(
    policy: Policy,
    sample: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The conditional and, with `uncond`, the unconditional velocity, from one batch of 2B rows."""
    if uncond is None:
        return policy.velocity(sample, sigma, conditioning), None
    both = policy.velocity(
        torch.cat([sample, sample]),
        torch.cat([sigma, sigma]),
        uncond.expand(sample.shape[0]).then(conditioning),
    )
    unconditional, conditional = both.chunk(2)
    return conditional, unconditional


def chunks(rows: int, batch_size: int) -> list[slice]:
    """The rows of each forward, in order."""
    return [slice(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]


@torch.no_grad()
def rollout(
    policy: Policy,
    conditioning: Conditioning,
    plan: Schedule,
    steps: Tensor,
    *,
    groups: Tensor,
    seeds: Tensor,
    noise_seeds: Tensor | None = None,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    positions: Tensor | None = None,
    keep: bool = True,
    keep_velocities: bool = False,
) -> Trajectory:
    """Sample one latent for each row.

    Args:
        conditioning: of the prompts; `groups` [B] says which one a row has.
        plan: sigmas and transition table.
        steps: int64 [T, B], the table row of each step and row.
        seeds: int64 [B], for the noise of the steps; `noise_seeds` for the initial noise (default:
            the same).
        batch_size: rows of one forward.
        uncond: embeddings of the empty prompt, for guidance.
        positions: int64 [W, B], the trained steps, recorded in the result.
        keep: keep all states; otherwise `latents` has the last two only, of which latents[-1] is
            the result.
        keep_velocities: keep the (guided) velocities too.
    """
    total, rows = plan.steps, seeds.numel()
    device = policy.device
    seeds, groups, steps = seeds.to(device), groups.to(device), steps.to(device)
    noise_seeds = seeds if noise_seeds is None else noise_seeds.to(device)
    latents = torch.empty(total + 1 if keep else 2, rows, *policy.latent_shape, device=device)
    log_probs = torch.empty(total, rows, device=device)
    velocities = None
    if keep_velocities:
        dtype = policy.dtype if uncond is None else torch.float32
        velocities = torch.empty(total, *latents.shape[1:], dtype=dtype, device=device)
    for part in chunks(rows, batch_size):
        _denoise(
            policy,
            conditioning.rows(groups[part]),
            plan,
            steps[:, part],
            # Places counted so that the result is the last one, in a full buffer and in one of two.
            [latents[(i - total - 1) % len(latents), part] for i in range(total + 1)],
            log_probs[:, part],
            None if velocities is None else velocities[:, part],
            seeds[part],
            noise_seeds[part],
            uncond,
            guidance_scale,
        )
    if positions is None:
        positions = torch.empty(0, rows, dtype=torch.int64)
    positions = positions.to(device)
    return Trajectory(
        latents, log_probs, steps.gather(0, positions), positions, groups, seeds, velocities
    )


def _denoise(
    policy: Policy,
    conditioning: Conditioning,
    plan: Schedule,
    steps: Tensor,
    states: list[Tensor],
    log_probs: Tensor,
    velocities: Tensor | None,
    seeds: Tensor,
    noise_seeds: Tensor,
    uncond: Conditioning | None,
    guidance_scale: float,
) -> None:
    """The T steps of one chunk, written into `states`, `log_probs` and `velocities`."""
    states[0].copy_(initial_noise(noise_seeds, states[0].shape[1:]))
    for i in range(plan.steps):
        sigma = plan.sigmas[i].expand(len(seeds))
        conditional, unconditional = velocity(policy, states[i], sigma, conditioning, uncond)
        sde_step(
            conditional,
            states[i],
            plan.transitions,
            steps[i],
            seeds=seeds,
            uncond_velocity=unconditional,
            guidance_scale=guidance_scale,
            out=states[i + 1],
            log_prob_out=log_probs[i],
        )
        if velocities is not None and unconditional is None:
            velocities[i].copy_(conditional)
        elif velocities is not None:
            # In float32 and in the order of the kernels: GRPO-Guard compares it bit for bit.
            u = unconditional.float()
            velocities[i].copy_(u + (conditional.float() - u) * guidance_scale)


def sample(
    policy: Policy,
    conditioning: Conditioning,
    *,
    steps: int,
    groups: Tensor,
    seeds: Tensor,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """Images, uint8 [B, 3, H, W], by the deterministic sampler: what evaluation looks at."""
    plan = ode_schedule(policy, steps)
    table = torch.arange(steps)[:, None].expand(steps, seeds.numel())
    trajectory = rollout(
        policy,
        conditioning,
        plan,
        table,
        groups=groups,
        seeds=seeds,
        batch_size=batch_size,
        uncond=uncond,
        guidance_scale=guidance_scale,
        keep=False,
    )
    return decode(policy, trajectory.latents[-1], batch_size)


def decode(policy: Policy, latents: Tensor, batch_size: int) -> Tensor:
    """uint8 [B, 3, H, W] images of the latents, decoded in chunks."""
    return torch.cat([policy.decode(latents[part]) for part in chunks(len(latents), batch_size)])
