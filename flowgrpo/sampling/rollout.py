"""Sampling: noise -> T steps of the transition -> latents, all states kept.

Step i is x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps (flowgrpo_kernels.transitions). Which
row of the transition table a row of the batch uses at step i is data: the table holds the
stochastic steps and, below them, the deterministic ones, so rows with different windows go through
one forward.

    window of group k = [start_k, start_k + W): stochastic and trained; elsewhere the ODE step

Rows are processed in chunks of a fixed number, in order. The update uses the same chunks: kernels
of matrix products may depend on the number of rows, and the on-policy ratio shall be exactly 1.

What the transformer makes of prompts and times alone, such as the modulation of its blocks, is made
once for all prompts and steps (`Policy.prepare`) and looked up in every forward, here and in the
update, unless it depends on what is trained.

`denoise` is the whole algorithm for one chunk. With `policy.graphs` (capture.py) it is replayed as
one CUDA graph where all states are kept, which is training, and step by step (`stepping`), with a
graph that serves any number of steps, where only the result is, which is evaluation. Initial noise,
windows and noise levels are data in it: seeds, rows of the table, and the table. prefix.py has
another rollout, of fewer rows, for groups that have the steps before their window in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds as random
from flowgrpo.config import Config, ConfigError, SampleConfig
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
    count, number = high - low - length + 1, np.arange(groups)
    start = low + random.below(count, config.run.seed, random.WINDOW, iteration, number)
    start = torch.from_numpy(start).repeat_interleave(config.sample.group_size)
    return start[None, :] + torch.arange(length)[:, None]


def table_rows(positions: Tensor, steps: int) -> Tensor:
    """int64 [T, B]: the table row of each step, stochastic at `positions` [W, B], else ODE.

    Raises:
        ConfigError: a position is no step of the schedule.
    """
    if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < steps:
        raise ConfigError(
            f"a window covers the steps {int(positions.min())} to {int(positions.max())}, but the "
            f"schedule has the steps 0 to {steps - 1}; change sample.window_range or sample.steps."
        )
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


def guided(conditional: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """The velocity that a step is made by."""
    if uncond is None:
        return conditional
    # In float32 and in the order of the kernels: GRPO-Guard compares it bit for bit.
    uncond = uncond.float()
    return uncond + (conditional.float() - uncond) * guidance_scale


def chunks(rows: int, batch_size: int) -> list[slice]:
    """The rows of each forward, in order."""
    return [slice(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]


def prepared(
    policy: Policy, plan: Schedule, conditioning: Conditioning, uncond: Conditioning | None
) -> tuple[Conditioning, Conditioning | None]:
    """Both by `Policy.prepare`, for the steps of `plan`; what is prepared already stays."""
    without = None if uncond is None else policy.prepare(uncond, plan.sigmas)
    return policy.prepare(conditioning, plan.sigmas), without


@dataclass(frozen=True)
class Chunk:
    """What the sampling of b rows starts from; all of it is data to a captured rollout."""

    conditioning: Conditioning
    """b rows."""
    uncond: Conditioning | None
    """One row, for guidance."""
    sigmas: Tensor
    """float32 [T+1]."""
    transitions: Transitions
    steps: Tensor
    """int64 [T, b]: rows of the table."""
    seeds: Tensor
    """int64 [b]: of the steps' noise."""
    noise_seeds: Tensor
    """int64 [b]: of the initial noise."""


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
    done: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row.

    Args:
        conditioning: of the prompts; `groups` [B] says which one a row has.
        plan: sigmas and transition table.
        steps: int64 [T, B], the table row of each step and row.
        seeds: int64 [B], of the steps' noise; `noise_seeds` of the initial one (default: the same).
        batch_size: rows of one forward.
        uncond: embeddings of the empty prompt, for guidance.
        positions: int64 [W, B], the trained steps, recorded in the result.
        keep: keep all states; otherwise `latents` has two, of which latents[-1] is the result.
        keep_velocities: keep the (guided) velocities too.
        done: called with the results [b, C, H, W] of each chunk as soon as it is launched.
    """
    device, rows = policy.device, seeds.numel()
    sample_chunk = _form(policy, keep)
    seeds, groups, steps = seeds.to(device), groups.to(device), steps.to(device)
    noise_seeds = seeds if noise_seeds is None else noise_seeds.to(device)
    found = buffers(policy, len(steps), rows, uncond is not None, keep, keep_velocities)
    if keep:
        # Of all prompts at once, as the update does; an evaluation may have too many for that.
        conditioning, uncond = prepared(policy, plan, conditioning, uncond)
    whole = torch.arange(min(batch_size, rows), device=device)
    for part in chunks(rows, batch_size):
        # A short last chunk repeats its last row, also without a graph: fewer may mean other bits.
        place = (whole + part.start).clamp(max=rows - 1)
        chunk = Chunk(
            *prepared(policy, plan, conditioning.rows(groups[place]), uncond),
            plan.sigmas,
            plan.transitions,
            steps[:, place],
            seeds[place],
            noise_seeds[place],
        )
        made = sample_chunk(policy, chunk, guidance_scale, keep, keep_velocities)
        for into, value in zip(found, made, strict=True):
            if into is not None:
                into[:, part] = value[:, : part.stop - part.start]
        if done is not None:
            done(found[0][-1, part])
    return trajectory(found, steps, positions, groups, seeds)


def trajectory(
    found: tuple[Tensor, Tensor, Tensor | None],
    steps: Tensor,
    positions: Tensor | None,
    groups: Tensor,
    seeds: Tensor,
) -> Trajectory:
    """The record of what is in the `buffers`, with the table rows of the trained steps."""
    if positions is None:
        positions = torch.empty(0, steps.shape[1], dtype=torch.int64)
    positions = positions.to(steps.device)
    trained = steps.gather(0, positions)
    return Trajectory(*found[:2], trained, positions, groups, seeds, found[2])


def buffers(
    policy: Policy, steps: int, rows: int, guidance: bool, keep: bool, keep_velocities: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Uninitialised latents [T+1 or 2, rows, ...], log_probs [T, rows], velocities or None."""
    shape, device = (rows, *policy.latent_shape), policy.device
    velocities = None
    if keep_velocities:
        dtype = torch.float32 if guidance else policy.dtype
        velocities = torch.empty(steps, *shape, dtype=dtype, device=device)
    latents = torch.empty(steps + 1 if keep else 2, *shape, device=device)
    return latents, torch.empty(steps, rows, device=device), velocities


def advance(
    policy: Policy,
    sample: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    transitions: Transitions,
    steps: Tensor,
    seeds: Tensor,
    guidance_scale: float,
    keep_velocity: bool = False,
    *,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The next states of rows that may be at different steps, their log-probabilities and, with
    `keep_velocity`, the (guided) velocities.

    sigma [b] and steps [b], rows of the table, belong to the rows of `sample`.
    """
    conditional, unconditional = velocity(policy, sample, sigma, conditioning, uncond)
    used = guided(conditional, unconditional, guidance_scale) if keep_velocity else None
    made = sde_step(
        conditional, sample, transitions, steps, seeds=seeds, uncond_velocity=unconditional,
        guidance_scale=guidance_scale, out=out, log_prob_out=log_prob_out,
    )  # fmt: skip
    return *made, used


def stepping(policy: Policy) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """`advance`, or with `policy.graphs` its replayed form: a graph for each number of rows, to be
    used inside `Policy.steady`, whose result the next call overwrites."""
    if policy.graphs is None:
        return advance

    def step(policy, sample, sigma, conditioning, uncond, transitions, steps, *rest, **buffers):
        # Row b of the table is what row b of the batch does: one shape for any number of steps.
        # Not by `from_table`, which reads the table on the host.
        index = torch.arange(len(steps), device=steps.device)
        kinds = tuple(dict.fromkeys(transitions.kinds))
        rows = Transitions(transitions.table[steps], None, kinds, index)
        inputs = (sample, sigma, conditioning, uncond, rows, index, *rest)
        found = policy.graphs(advance, policy, *inputs)
        for name, value in zip(("out", "log_prob_out"), found, strict=False):
            if name in buffers:
                buffers[name].copy_(value)
        return found

    return step


def denoise(
    policy: Policy,
    chunk: Chunk,
    guidance_scale: float,
    keep: bool,
    keep_velocities: bool,
    step: Callable[..., object] = advance,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, log_probs and velocities of the rows of one chunk, as `buffers` describes them."""
    total, rows = chunk.steps.shape
    guidance = chunk.uncond is not None
    latents, log_probs, velocities = buffers(policy, total, rows, guidance, keep, keep_velocities)
    # Places counted so that the result is the last one, in a full buffer and in one of two.
    states = [latents[(i - total - 1) % len(latents)] for i in range(total + 1)]
    states[0].copy_(initial_noise(chunk.noise_seeds, states[0].shape[1:]))
    with policy.steady():
        for i in range(total):
            used = step(
                policy,
                states[i],
                chunk.sigmas[i].expand(rows),
                chunk.conditioning.at(i),
                None if chunk.uncond is None else chunk.uncond.at(i),
                chunk.transitions,
                chunk.steps[i],
                chunk.seeds,
                guidance_scale,
                keep_velocities,
                out=states[i + 1],
                log_prob_out=log_probs[i],
            )[2]
            if velocities is not None:
                velocities[i].copy_(used)
    return latents, log_probs, velocities


def _form(policy: Policy, keep: bool) -> Callable[..., tuple]:
    """`denoise`, or the form of it that replays graphs."""
    if policy.graphs is None:
        return denoise
    return partial(policy.graphs, denoise) if keep else partial(denoise, step=stepping(policy))


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
    watch: Callable[[int], None] | None = None,
) -> Tensor:
    """Images, uint8 [B, 3, H, W], by the deterministic sampler: what evaluation looks at.

    watch: told after each chunk how many images there are, or on a GPU will be.
    """
    plan = ode_schedule(policy, steps)
    table = torch.arange(steps)[:, None].expand(steps, seeds.numel())
    images: list[Tensor] = []

    def done(latents: Tensor) -> None:
        images.append(policy.decode(latents))
        if watch is not None:
            watch(sum(map(len, images)))

    rollout(
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
        done=done,
    )
    return torch.cat(images)
