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

import torch
from torch import Tensor

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import guide, velocities
from flowgrpo.records import Trajectory
from flowgrpo.sampling.schedule import Schedule, ode_schedule
from flowgrpo_kernels import Transitions, initial_noise, sde_step


def chunks(rows: int, batch_size: int) -> list[slice]:
    """The rows of each forward, in order."""
    return [slice(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]


def prepare_both(
    policy: Policy, schedule: Schedule, conditioning: Conditioning, uncond: Conditioning | None
) -> tuple[Conditioning, Conditioning | None]:
    """Both by `Policy.prepare`, for the steps of `schedule`; what is prepared already stays."""
    without = None if uncond is None else policy.prepare(uncond, schedule.sigmas)
    return policy.prepare(conditioning, schedule.sigmas), without


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
    table_rows: Tensor
    """int64 [T, b]: of the transition table."""
    seeds: Tensor
    """int64 [b]: of the steps' noise."""
    noise_seeds: Tensor
    """int64 [b]: of the initial noise."""


@torch.no_grad()
def rollout(
    policy: Policy,
    conditioning: Conditioning,
    schedule: Schedule,
    table_rows: Tensor,
    *,
    groups: Tensor,
    seeds: Tensor,
    noise_seeds: Tensor | None = None,
    batch_size: int,
    uncond: Conditioning | None = None,
    guidance_scale: float = 1.0,
    trained_steps: Tensor | None = None,
    keep: bool = True,
    keep_velocities: bool = False,
    on_chunk: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row.

    Args:
        conditioning: of the prompts; `groups` [B] says which one a row has.
        schedule: sigmas and transition table.
        table_rows: int64 [T, B], the row of the transition table that each step of a row takes.
        seeds: int64 [B], of the steps' noise; `noise_seeds` of the initial one (default: the same).
        batch_size: rows of one forward.
        uncond: embeddings of the empty prompt, for guidance.
        trained_steps: int64 [W, B], the trained steps, recorded in the result.
        keep: keep all states; otherwise `latents` has two, of which latents[-1] is the result.
        keep_velocities: keep the (guided) velocities too.
        on_chunk: called with the results [b, C, H, W] of each chunk as soon as it is launched.
    """
    device, rows = policy.device, seeds.numel()
    sample_chunk = chunk_sampler(policy, keep)
    seeds, groups, table_rows = seeds.to(device), groups.to(device), table_rows.to(device)
    noise_seeds = seeds if noise_seeds is None else noise_seeds.to(device)
    found = make_buffers(policy, len(table_rows), rows, uncond is not None, keep, keep_velocities)
    if keep:
        # Of all prompts at once, as the update does; an evaluation may have too many for that.
        conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
    whole = torch.arange(min(batch_size, rows), device=device)
    for part in chunks(rows, batch_size):
        # A short last chunk repeats its last row, also without a graph: fewer may mean other bits.
        place = (whole + part.start).clamp(max=rows - 1)
        chunk = Chunk(
            *prepare_both(policy, schedule, conditioning.rows(groups[place]), uncond),
            schedule.sigmas,
            schedule.transitions,
            table_rows[:, place],
            seeds[place],
            noise_seeds[place],
        )
        made = sample_chunk(policy, chunk, guidance_scale, keep, keep_velocities)
        for into, value in zip(found, made, strict=True):
            if into is not None:
                into[:, part] = value[:, : part.stop - part.start]
        if on_chunk is not None:
            on_chunk(found[0][-1, part])
    return make_trajectory(found, table_rows, trained_steps, groups, seeds)


def make_trajectory(
    found: tuple[Tensor, Tensor, Tensor | None],
    table_rows: Tensor,
    trained_steps: Tensor | None,
    groups: Tensor,
    seeds: Tensor,
) -> Trajectory:
    """The record of what is in the `buffers`, with the table rows of the trained steps."""
    if trained_steps is None:
        trained_steps = torch.empty(0, table_rows.shape[1], dtype=torch.int64)
    trained_steps = trained_steps.to(table_rows.device)
    trained = table_rows.gather(0, trained_steps)
    return Trajectory(*found[:2], trained, trained_steps, groups, seeds, found[2])


def make_buffers(
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


def sampler_step(
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
    conditional, unconditional = velocities(policy, sample, sigma, conditioning, uncond)
    used = guide(conditional, unconditional, guidance_scale) if keep_velocity else None
    made = sde_step(
        conditional, sample, transitions, steps, seeds=seeds, uncond_velocity=unconditional,
        guidance_scale=guidance_scale, out=out, log_prob_out=log_prob_out,
    )  # fmt: skip
    return *made, used


def step_function(policy: Policy) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Return `sampler_step`, or with `policy.graphs` its replayed form: a graph for each number of
    rows, to be used inside `Policy.frozen_weights`, whose result the next call overwrites."""
    if policy.graphs is None:
        return sampler_step

    def step(policy, sample, sigma, conditioning, uncond, transitions, steps, *rest, **buffers):
        # Row b of the table is what row b of the batch does: one shape for any number of steps.
        # Not by `from_table`, which reads the table on the host.
        index = torch.arange(len(steps), device=steps.device)
        kinds = tuple(dict.fromkeys(transitions.kinds))
        rows = Transitions(transitions.table[steps], None, kinds, index)
        inputs = (sample, sigma, conditioning, uncond, rows, index, *rest)
        found = policy.graphs(sampler_step, policy, *inputs)
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
    step: Callable[..., object] = sampler_step,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Latents, log_probs and velocities of the rows of one chunk, as `buffers` describes them."""
    total, rows = chunk.table_rows.shape
    guidance = chunk.uncond is not None
    latents, log_probs, velocities = make_buffers(
        policy, total, rows, guidance, keep, keep_velocities
    )
    # Places counted so that the result is the last one, in a full buffer and in one of two.
    states = [latents[(i - total - 1) % len(latents)] for i in range(total + 1)]
    states[0].copy_(initial_noise(chunk.noise_seeds, states[0].shape[1:]))
    with policy.frozen_weights():
        for i in range(total):
            used = step(
                policy,
                states[i],
                chunk.sigmas[i].expand(rows),
                chunk.conditioning.at(i),
                None if chunk.uncond is None else chunk.uncond.at(i),
                chunk.transitions,
                chunk.table_rows[i],
                chunk.seeds,
                guidance_scale,
                keep_velocities,
                out=states[i + 1],
                log_prob_out=log_probs[i],
            )[2]
            if velocities is not None:
                velocities[i].copy_(used)
    return latents, log_probs, velocities


def chunk_sampler(policy: Policy, keep: bool) -> Callable[..., tuple]:
    """`denoise`, or the form of it that replays graphs."""
    if policy.graphs is None:
        return denoise
    return partial(policy.graphs, denoise) if keep else partial(denoise, step=step_function(policy))


def sample_images(
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
    schedule = ode_schedule(policy, steps)
    table = torch.arange(steps)[:, None].expand(steps, seeds.numel())
    images: list[Tensor] = []

    def on_chunk(latents: Tensor) -> None:
        images.append(policy.decode(latents))
        if watch is not None:
            watch(sum(map(len, images)))

    rollout(
        policy,
        conditioning,
        schedule,
        table,
        groups=groups,
        seeds=seeds,
        batch_size=batch_size,
        uncond=uncond,
        guidance_scale=guidance_scale,
        keep=False,
        on_chunk=on_chunk,
    )
    return torch.cat(images)
