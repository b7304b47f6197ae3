"""Re-noised results: what objectives of the forward process look at in place of sampler steps.

With x_0 the result of a row, s a noise level, eps ~ N(0, I) and v the velocity after guidance, the
one that a step of the sampler is made by:

    x_s = (1 - s) x_0 + s eps        v* = eps - x_0        e = mean (v(x_s, s) - v*)^2

e is the matching error of conditional flow matching (Lipman et al., arXiv 2210.02747, equation 9).
The kernels score it as a row of a transition table (flowgrpo_kernels.matching): with v* as
prev_sample, log_prob is -w e and the KL is mean (v - v_ref)^2.

Levels. `optim.levels` = L of them for each result. Draw j of image g of its group has the share
u = (j G + rank + U) / (L G) of the way through the model's own schedule, rank being the place of g
in a random order of the group and U uniform in [0, 1): an image has one draw in each of L equal
stretches, and a group's draws are spread evenly over each. Levels and noise are hashes of (seed,
purpose, iteration, row, draw), so a resumed run draws the same.

Weights w (`optim.level_weight`):

    uniform      1
    sigma        s
    normalized   s / mean |v - v*|, without a gradient: the normaliser of DiffusionNFT (arXiv
                 2509.16117), |x_0' - x_0|^2 / mean |x_0' - x_0|, written in velocities

Conditioning is not prepared for these levels (`Policy.prepare`): every sample has its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config
from flowgrpo.policies import Policy
from flowgrpo.policies.guidance import guide, kernel_scale, velocities
from flowgrpo.records import Batch, Draws, Experience
from flowgrpo.sampling.rollout import chunks
from flowgrpo.sampling.schedule import Schedule
from flowgrpo_kernels import Transitions, initial_noise, log_prob, matching
from flowgrpo_kernels.transitions import COLUMNS

STEPS = 1000
"""Steps of the model's schedule that noise levels are read from, linearly between them."""
WEIGHT = COLUMNS.index("k")
PURPOSES = (seeds.LEVEL, seeds.LEVEL_NOISE)
"""Purposes of the draws of levels and of noise."""


def chunks_by_levels(config: Config, rows: int) -> list[tuple[slice, range]]:
    """Pair the rollout's chunks of rows, in its order, with each of the draws 0 to L - 1."""
    return [
        (chunk, range(draw, draw + 1))
        for chunk in chunks(rows, config.sample.batch_size)
        for draw in range(config.optim.levels)
    ]


def groups_by_levels(config: Config, groups: int, rows_of_group: int) -> list[tuple[slice, range]]:
    """Pair chunks of `groups` groups, of each of which a number of rows is looked at, with each of
    the draws 0 to L - 1.

    All chunks of an iteration have the same number of groups, the largest that divides those of an
    optimizer step and gives no more than `sample.batch_size` rows.
    """
    share = max(groups // config.optim.updates_per_iteration, 1)
    limit = max(config.sample.batch_size // rows_of_group, 1)
    size = max(n for n in range(1, share + 1) if share % n == 0 and n <= limit)
    return [
        (rows, range(draw, draw + 1))
        for rows in chunks(groups, size)
        for draw in range(config.optim.levels)
    ]


def draw_shares(config: Config, iteration: int, purpose: int = seeds.LEVEL) -> np.ndarray:
    """Draw the share u of the schedule's way for each draw of each row, float64 [L, B]."""
    group_size, levels = config.sample.group_size, config.optim.levels
    rows, draws = np.arange(config.sample.rows)[None], np.arange(levels)[:, None]
    place = (config.run.seed, purpose, iteration, rows, draws)
    order = seeds.draw(*place, 0).reshape(levels, -1, group_size).argsort(axis=-1, kind="stable")
    ranks = order.argsort(axis=-1, kind="stable").reshape(levels, -1)
    return (draws * group_size + ranks + seeds.uniform(*place, 1)) / (levels * group_size)


def levels_at(policy: Policy, shares: np.ndarray) -> Tensor:
    """Look up the noise levels at these shares of the way through the model's schedule, float64 of
    the shape of `shares`: 1 at share 0, falling to 0 at share 1."""
    sigmas = policy.sigmas(STEPS).numpy()
    return torch.from_numpy(np.interp(shares * STEPS, np.arange(STEPS + 1), sigmas))


def draw_levels(
    policy: Policy, config: Config, iteration: int, purposes: tuple[int, int] = PURPOSES
) -> Draws:
    """Draw levels and noise of all rows of an iteration, on the CPU."""
    rows, draws = np.arange(config.sample.rows)[None], np.arange(config.optim.levels)[:, None]
    noise = seeds.sample_seeds(config.run.seed, purposes[1], iteration, rows, draws)
    sigmas = levels_at(policy, draw_shares(config, iteration, purposes[0])).clamp(max=1.0)
    return Draws(sigmas.to(torch.float32), torch.from_numpy(noise))


def prepare(
    policy: Policy,
    schedule: Schedule | None,
    experience: Experience,
    config: Config,
    purposes: tuple[int, int] = PURPOSES,
) -> tuple[Schedule, Experience]:
    """Give the experience its draws, and make the table that scores them, in place of `schedule`.

    Row l B + b of the table scores draw l of row b with its weight, and row L B + l B + b scores
    any other target of it, with weight 1. Weights of kind "normalized" are not known yet, and 1.
    """
    draws = draw_levels(policy, config, experience.iteration, purposes)
    if experience.rows is not None:
        draws = draws.take(experience.rows)
    device = policy.device
    sigmas = draws.sigmas.flatten()
    weight = sigmas if config.optim.level_weight == "sigma" else 1.0
    table = Transitions.cat(matching(sigmas, weight), matching(sigmas)).to(device)
    levels = Schedule(sigmas.to(device), table, torch.ones(len(sigmas), device=device))
    return levels, replace(experience, draws=draws.to(device))


def gather(schedule: Schedule, experience: Experience, rows: slice, numbers: range) -> Batch:
    """Re-noise the results of the chunk `rows`, at their draws `numbers`."""
    index = torch.arange(rows.start, rows.stop, device=experience.advantages.device)
    return renoise(schedule, experience, index, numbers)


def renoise(
    schedule: Schedule,
    experience: Experience,
    index: Tensor,
    numbers: range,
    noise_of: Tensor | None = None,
) -> Batch:
    """Re-noise the results of the rows `index`, int64 [N], at each of their draws `numbers`.

    Args:
        noise_of: int64 [N], the rows whose level and noise each takes; default: its own.
    """
    trajectory, draws = experience.trajectory, experience.draws
    index = index.repeat(len(numbers))
    noise_of = index if noise_of is None else noise_of.repeat(len(numbers))
    draw = torch.arange(numbers.start, numbers.stop, device=index.device)
    draw = draw.repeat_interleave(len(index) // len(numbers))
    result, sigma = trajectory.latents[-1, index], draws.sigmas[draw, noise_of]
    noise = initial_noise(draws.seeds[draw, noise_of], result.shape[1:])
    level = sigma.view(-1, *[1] * (result.ndim - 1))
    old, velocities_then = draws.log_probs, draws.velocities
    uncond = experience.uncond
    return Batch(
        sample=(1 - level) * result + level * noise,
        prev_sample=noise - result,
        sigma=sigma,
        transitions=schedule.transitions,
        table_row=draw * draws.sigmas.shape[1] + noise_of,
        conditioning=experience.conditioning.rows(trajectory.groups[index]),
        uncond=None if uncond is None else uncond.rows(torch.zeros_like(index)),
        advantages=experience.advantages[index],
        weights=experience.weights[index],
        old_log_prob=None if old is None else old[draw, index],
        old_velocity=None if velocities_then is None else velocities_then[draw, index],
    )


class Old(NamedTuple):
    """Values of a micro-step under the weights of the rollout."""

    rows: Tensor
    """int64 [M]: rows of the iteration."""
    draw: Tensor
    """int64 [M]: their draws."""
    batch: Batch
    velocity: Tensor
    uncond: Tensor | None


def old_forwards(
    policy: Policy,
    schedule: Schedule,
    experience: Experience,
    micro_steps: list[tuple[slice, range]],
    config: Config,
) -> Iterator[Old]:
    """Run the forwards of all micro-steps, chunks of rows, with the present weights."""
    for rows, numbers in micro_steps:
        batch = gather(schedule, experience, rows, numbers)
        # With gradients, which nothing uses: without them a forward may take other kernels.
        velocity, uncond = velocities(policy, *inputs_of(batch, config))
        index = torch.arange(rows.start, rows.stop, device=velocity.device)
        draw = torch.arange(numbers.start, numbers.stop, device=velocity.device)
        draw = draw.repeat_interleave(len(index))
        uncond = None if uncond is None else uncond.detach()
        yield Old(index.repeat(len(numbers)), draw, batch, velocity.detach(), uncond)


def inputs_of(batch: Batch, config: Config) -> tuple:
    """List the arguments of `velocities` for a micro-step."""
    scale = config.sample.guidance_scale
    return batch.sample, batch.sigma, batch.conditioning, batch.uncond, scale


def score(
    batch: Batch,
    velocity: Tensor,
    uncond: Tensor | None,
    config: Config,
    target: Tensor | None = None,
) -> Tensor:
    """Compute -w e of each sample, float32 [M], differentiable in the velocity.

    Args:
        velocity, uncond: what `velocities` returned; uncond None: the velocity after guidance.
        target: in place of v*, another velocity, scored with weight 1.
    """
    rows = batch.table_row
    if target is not None:
        rows = rows + batch.transitions.num_steps // 2
    return log_prob(
        velocity,
        batch.sample,
        batch.prev_sample if target is None else target,
        batch.transitions,
        rows,
        uncond_velocity=uncond,
        guidance_scale=kernel_scale(uncond, config.sample.guidance_scale),
    )


@torch.no_grad()
def normalizer(batch: Batch, velocity: Tensor, uncond: Tensor | None, config: Config) -> Tensor:
    """Compute s / mean |v - v*| of each sample, float32 [M], the weight of kind "normalized"."""
    guided = guide(velocity.detach(), uncond, config.sample.guidance_scale).float()
    # The error in x_0 is s times that in v, and its bound is the paper's.
    error = batch.sigma * (guided - batch.prev_sample).abs().flatten(1).mean(dim=1)
    return batch.sigma.square() / error.clamp(min=1e-5)


def with_weights(transitions: Transitions, rows: Tensor, weights: Tensor) -> Transitions:
    """Return the table with `weights`, float32 [M], in its rows `rows`, int64 [M]."""
    table = transitions.table.clone()
    # Not by `from_table`, which reads the table on the host.
    table[rows, WEIGHT] = weights
    return Transitions(table, None, transitions.kinds, transitions.row_numbers)


def weighted(batch: Batch, velocity: Tensor, uncond: Tensor | None, config: Config) -> Batch:
    """Return the batch with the weights of `optim.level_weight`, now that a velocity is known.

    Those of a batch with old values were set when these were computed.
    """
    if config.optim.level_weight != "normalized" or batch.old_log_prob is not None:
        return batch
    transitions, samples = batch.transitions, len(batch.sample)
    rows = transitions.table[batch.table_row]
    rows[:, WEIGHT] = normalizer(batch, velocity, uncond, config)
    others = transitions.table[batch.table_row + transitions.num_steps // 2]
    # Not by `from_table`, which reads the table on the host.
    number = torch.arange(2 * samples, device=rows.device)
    kinds = transitions.kinds[:1] * (2 * samples)
    table = Transitions(torch.cat([rows, others]), None, kinds, number)
    return replace(batch, transitions=table, table_row=number[:samples])


class Matching(NamedTuple):
    """Matching of one micro-step."""

    error: Tensor
    """float32 [M]: w e, differentiable."""
    kl: Tensor | None
    """float32 [M]: mean (v - v_ref)^2, differentiable; None where `optim.beta` is 0."""


def match(policy: Policy, batch: Batch, config: Config) -> Matching:
    """Run the forwards of a micro-step, that of the reference only if beta > 0."""
    reference = None
    if config.optim.beta > 0:
        reference = reference_velocity(policy, batch, config)
    velocity, uncond = velocities(policy, *inputs_of(batch, config))
    batch = weighted(batch, velocity, uncond, config)
    error = -score(batch, velocity, uncond, config)
    if reference is None:
        return Matching(error, None)
    return Matching(error, -score(batch, velocity, uncond, config, reference))


@torch.no_grad()
def reference_velocity(policy: Policy, batch: Batch, config: Config) -> Tensor:
    """Compute the velocity of the model before training, after guidance, float32 [M, C, H, W]."""
    with policy.reference():
        conditional, uncond = velocities(policy, *inputs_of(batch, config))
    return guide(conditional, uncond, config.sample.guidance_scale).float()
