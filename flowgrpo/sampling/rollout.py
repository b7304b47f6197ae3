"""Sampling: noise -> T steps of the transition -> latents.

Step i is x_{i+1} = A_i x_i + B_i v(x_i, sigma_i) + C_i eps (flowgrpo_kernels.transitions). Which
row of the transition table a row of the batch uses at step i is data: the table holds the
stochastic steps and, below them, the deterministic ones, so rows with different windows go through
one forward.

    window of group k = [start_k, start_k + W): stochastic and trained; elsewhere the ODE step

Rows are sampled in chunks of a fixed size, in order. The update uses the same chunks: kernels of
matrix products may depend on the number of rows, and the on-policy ratio shall be exactly 1.

What the transformer computes from prompts and times alone, such as the modulation of its blocks, is
computed once for all prompts and steps (`Policy.prepare`) and looked up in every forward, here and
in the update, unless it depends on trained weights.

`denoise` is the algorithm for one chunk. With `policy.graphs` (cuda_graphs.py) training, which
stores all states, replays it as one CUDA graph; evaluation, which needs the result alone, replays
one step at a time (`step_function`), with a graph that serves any number of steps. Initial noise,
windows and noise levels are inputs of a graph: seeds, rows of the table, and the table.

shared_prefix.py has another rollout, of fewer rows, for groups that share the steps before their
window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrpo.policies import Conditioning, Policy
from flowgrpo.policies.guidance import guide, kernel_scale, velocities
from flowgrpo.records import Trajectory
from flowgrpo.sampling import finite
from flowgrpo.sampling.schedule import Schedule, ode_schedule
from flowgrpo_kernels import Transitions, initial_noise, sde_step

DETERMINISTIC = "the deterministic sampler"


def chunks(rows: int, batch_size: int) -> list[slice]:
    """Split the rows 0 to `rows` - 1 into those of each forward, in order."""
    return [slice(i, min(i + batch_size, rows)) for i in range(0, rows, batch_size)]


def prepare_both(
    policy: Policy, schedule: Schedule, conditioning: Conditioning, uncond: Conditioning | None
) -> tuple[Conditioning, Conditioning | None]:
    """Apply `Policy.prepare`, for the steps of `schedule`, to both; idempotent."""
    if uncond is not None:
        uncond = policy.prepare(uncond, schedule.sigmas)
    return policy.prepare(conditioning, schedule.sigmas), uncond


@dataclass(frozen=True)
class Chunk:
    """Inputs for sampling b rows; tensors, so one captured rollout serves every chunk."""

    conditioning: Conditioning
    """b rows."""
    uncond: Conditioning | None
    """One row, for guidance."""
    sigmas: Tensor
    """float32 [T+1]."""
    transitions: Transitions
    table_rows: Tensor
    """int64 [T, b]: the row of the transition table that each step takes."""
    seeds: Tensor
    """int64 [b]: seeds of the steps' noise."""
    noise_seeds: Tensor
    """int64 [b]: seeds of the initial noise."""


class Buffers(NamedTuple):
    """Memory that a rollout writes to, for b rows."""

    latents: Tensor
    """float32 [T+1, b, C, H, W]: every state; or [2, b, ...], of which the last is the result."""
    log_probs: Tensor
    """float32 [T, b]."""
    velocities: Tensor | None
    """[T, b, C, H, W], after guidance; None unless they are stored."""


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
    keep_states: bool = True,
    keep_velocities: bool = False,
    on_chunk: Callable[[Tensor], None] | None = None,
) -> Trajectory:
    """Sample one latent for each row.

    Args:
        conditioning: embeddings of the K prompts; `groups` [B] says which one a row has.
        schedule: sigmas and transition table.
        table_rows: int64 [T, B], the row of the transition table that each step of a row takes.
        seeds: int64 [B], seeds of the steps' noise.
        noise_seeds: int64 [B], seeds of the initial noise; default: `seeds`.
        batch_size: rows of one forward, also of a chunk that has fewer.
        uncond: embeddings of the empty prompt, for guidance.
        trained_steps: int64 [W, B], the trained steps, recorded in the result.
        keep_states: store all states; otherwise `latents` has two, and latents[-1] is the result.
        keep_velocities: store the velocities too, after guidance.
        on_chunk: called with the results [b, C, H, W] of each chunk as soon as it is launched.
    """
    device, total = policy.device, seeds.numel()
    sample_chunk = chunk_sampler(policy, keep_states)
    seeds, groups, table_rows = seeds.to(device), groups.to(device), table_rows.to(device)
    noise_seeds = seeds if noise_seeds is None else noise_seeds.to(device)
    buffers = make_buffers(
        policy, len(table_rows), total, uncond is not None, keep_states, keep_velocities
    )
    if keep_states:
        # Of all prompts at once, as the update does; an evaluation may have too many for that.
        conditioning, uncond = prepare_both(policy, schedule, conditioning, uncond)
    offsets = torch.arange(batch_size, device=device)
    for rows in chunks(total, batch_size):
        # A short chunk repeats its last row, also without a graph: fewer may mean other bits.
        index = (offsets + rows.start).clamp(max=total - 1)
        chunk = Chunk(
            *prepare_both(policy, schedule, conditioning.rows(groups[index]), uncond),
            schedule.sigmas,
            schedule.transitions,
            table_rows[:, index],
            seeds[index],
            noise_seeds[index],
        )
        result = sample_chunk(policy, chunk, guidance_scale, keep_states, keep_velocities)
        for buffer, values in zip(buffers, result, strict=True):
            if buffer is not None:
                buffer[:, rows] = values[:, : rows.stop - rows.start]
        if on_chunk is not None:
            on_chunk(buffers.latents[-1, rows])
    return make_trajectory(buffers, table_rows, trained_steps, groups, seeds)


def make_trajectory(
    buffers: Buffers,
    table_rows: Tensor,
    trained_steps: Tensor | None,
    groups: Tensor,
    seeds: Tensor,
) -> Trajectory:
    """Build the record of a rollout from its buffers; arguments as for `rollout`."""
    if trained_steps is None:
        trained_steps = torch.empty(0, table_rows.shape[1], dtype=torch.int64)
    trained_steps = trained_steps.to(table_rows.device)
    return Trajectory(
        latents=buffers.latents,
        log_probs=buffers.log_probs,
        table_rows=table_rows.gather(0, trained_steps),
        trained_steps=trained_steps,
        groups=groups,
        seeds=seeds,
        velocities=buffers.velocities,
    )


def make_buffers(
    policy: Policy, steps: int, rows: int, guidance: bool, keep_states: bool, keep_velocities: bool
) -> Buffers:
    """Allocate the buffers of a rollout of `steps` steps, uninitialised, on the policy's device."""
    shape, device = (rows, *policy.latent_shape), policy.device
    velocities = None
    if keep_velocities:
        # Guidance is computed in float32; without it a velocity is what the model returned.
        dtype = torch.float32 if guidance else policy.dtype
        velocities = torch.empty(steps, *shape, dtype=dtype, device=device)
    latents = torch.empty(steps + 1 if keep_states else 2, *shape, device=device)
    return Buffers(latents, torch.empty(steps, rows, device=device), velocities)


def sampler_step(
    policy: Policy,
    sample: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None,
    transitions: Transitions,
    table_rows: Tensor,
    seeds: Tensor,
    guidance_scale: float,
    keep_velocity: bool = False,
    *,
    out: Tensor | None = None,
    log_prob_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Take one step of b rows, which may be at different steps of the schedule.

    Args:
        sample: float32 [b, C, H, W], the states.
        sigma: float32 [b], their noise levels.
        table_rows: int64 [b], the row of the transition table that each takes.
        seeds: int64 [b], seeds of the steps' noise.
        out, log_prob_out: memory for the first two results.

    Returns:
        The next states [b, C, H, W], their log-probabilities [b] and, with `keep_velocity`, the
        velocities after guidance [b, C, H, W].
    """
    conditional, unconditional = velocities(
        policy, sample, sigma, conditioning, uncond, guidance_scale
    )
    guided = guide(conditional, unconditional, guidance_scale) if keep_velocity else None
    prev_sample, log_prob = sde_step(
        conditional, sample, transitions, table_rows, seeds=seeds, uncond_velocity=unconditional,
        guidance_scale=kernel_scale(unconditional, guidance_scale), out=out,
        log_prob_out=log_prob_out,
    )  # fmt: skip
    return prev_sample, log_prob, guided


def step_function(policy: Policy) -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Return `sampler_step`, or with `policy.graphs` its replayed form.

    That has a graph for each number of rows, is to be called inside `Policy.frozen_weights`, and
    overwrites its result at the next call.
    """
    if policy.graphs is None:
        return sampler_step

    def step(
        policy, sample, sigma, conditioning, uncond, transitions, table_rows, *rest, **buffers
    ):
        # Row b of the table is what row b of the batch does: one shape for any number of steps.
        # Not by `from_table`, which reads the table on the host.
        index = torch.arange(len(table_rows), device=table_rows.device)
        kinds = tuple(dict.fromkeys(transitions.kinds))
        rows = Transitions(transitions.table[table_rows], None, kinds, index)
        inputs = (sample, sigma, conditioning, uncond, rows, index, *rest)
        result = policy.graphs(sampler_step, policy, *inputs)
        for name, value in zip(("out", "log_prob_out"), result, strict=False):
            if name in buffers:
                buffers[name].copy_(value)
        return result

    return step


def denoise(
    policy: Policy,
    chunk: Chunk,
    guidance_scale: float,
    keep_states: bool,
    keep_velocities: bool,
    step: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = sampler_step,
) -> Buffers:
    """Sample the b rows of one chunk: initial noise, then T steps."""
    num_steps, rows = chunk.table_rows.shape
    guidance = chunk.uncond is not None
    buffers = make_buffers(policy, num_steps, rows, guidance, keep_states, keep_velocities)
    latents, log_probs, velocities = buffers
    if keep_states:
        states = [latents[i] for i in range(num_steps + 1)]
    else:
        # Two latents in turn, counted from the end, where the result lies in latents[1].
        states = [latents[1 - (num_steps - i) % 2] for i in range(num_steps + 1)]
    states[0].copy_(initial_noise(chunk.noise_seeds, states[0].shape[1:]))
    with policy.frozen_weights():
        for i in range(num_steps):
            _, _, velocity = step(
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
            )
            if velocities is not None:
                velocities[i].copy_(velocity)
    return buffers


def chunk_sampler(policy: Policy, keep_states: bool) -> Callable[..., Buffers]:
    """Return `denoise`, or with `policy.graphs` its replayed form: whole, or step by step."""
    if policy.graphs is None:
        return denoise
    if keep_states:
        return partial(policy.graphs, denoise)
    return partial(denoise, step=step_function(policy))


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
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Sample images, uint8 [B, 3, H, W], by the deterministic sampler, as evaluation does; of a
    model of videos, these, uint8 [B, F, 3, H, W], in host memory.

    Arguments are those of `rollout`, and:
        steps: steps of the sampler.
        on_progress: called after each chunk with the number of images so far; on a GPU those that
            are launched.

    Raises:
        NotFiniteError: velocities, latents or pixels are no finite numbers.
    """
    schedule = ode_schedule(policy, steps)
    table_rows = torch.arange(steps)[:, None].expand(steps, seeds.numel())
    images: list[Tensor] = []
    arguments = {"batch_size": batch_size, "uncond": uncond, "guidance_scale": guidance_scale}

    def sample(rows: slice, **options: object) -> Trajectory:
        return rollout(
            policy,
            conditioning,
            schedule,
            table_rows[:, rows],
            groups=groups[rows],
            seeds=seeds[rows],
            **arguments,
            **options,
        )

    def explain() -> str | None:
        """Sample chunk by chunk once more, with all states, up to the one with the fault."""
        if policy.sharded:
            return finite.not_looked_for(DETERMINISTIC)
        # A graph of all these steps would be recorded for nothing.
        policy.graphs = None
        for rows in chunks(seeds.numel(), batch_size):
            latents = sample(rows).latents
            inputs = (latents, conditioning, uncond, schedule, groups[rows], guidance_scale)
            if fault := finite.explain(policy, *inputs, DETERMINISTIC):
                return fault
        return None

    def decode(latents: Tensor) -> None:
        images.append(policy.decode(latents))
        if policy.frames:
            # A clip is as large as a hundred images; those of an evaluation would fill a GPU.
            images[-1] = images[-1].cpu()
        if on_progress is not None:
            on_progress(sum(map(len, images)))
            # Whoever shows the progress has waited for the images.
            finite.raise_if_unsound(policy.decoded.read(), explain, DETERMINISTIC)

    policy.decoded.begin()
    sample(slice(None), keep_states=False, on_chunk=decode)
    if on_progress is None:
        finite.raise_if_unsound(policy.decoded.read(), explain, DETERMINISTIC)
    return torch.cat(images)
