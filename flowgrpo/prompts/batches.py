"""The prompts of an iteration, K of a set, and the seeds of their K x G samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config, ConfigError
from flowgrpo.records import Prompts


def check_count(prompts: Prompts, count: int) -> None:
    """Raise unless the set has the `count` prompts of an iteration."""
    if count > len(prompts):
        raise ConfigError(
            f"sample.prompts_per_iteration is {count}, but the prompt set has only {len(prompts)} "
            "prompts; lower it or add prompts."
        )


def prompt_batch(prompts: Prompts, config: Config, iteration: int) -> Prompts:
    """Draw the K prompts of an iteration, all different.

    The set is shuffled once per epoch and cut into batches; what is left over at the end of an
    epoch waits for the next shuffle.
    """
    count = config.sample.prompts_per_iteration
    check_count(prompts, count)
    epoch, number = divmod(iteration, len(prompts) // count)
    order = seeds.permutation(len(prompts), config.run.seed, seeds.PROMPTS, epoch)
    return prompts.take(order[number * count : (number + 1) * count])


def row_seeds(count: int, config: Config, iteration: int) -> tuple[Tensor, Tensor]:
    """Draw the seeds of `count` groups: of the steps' noise and of the initial noise, int64 [B];
    with `sample.scouts` those of all candidates, int64 [K N].

    With `sample.shared_noise` the rows of one group start from the same latent.
    """
    size = config.sample.scouts or config.sample.group_size
    rows = np.arange(count * size)
    step_seeds = seeds.sample_seeds(config.run.seed, seeds.ROW, iteration, rows)
    if not config.sample.shared_noise:
        return torch.from_numpy(step_seeds), torch.from_numpy(step_seeds)
    groups = rows // size
    group_seeds = seeds.sample_seeds(config.run.seed, seeds.GROUP, iteration, groups)
    return torch.from_numpy(step_seeds), torch.from_numpy(group_seeds)
