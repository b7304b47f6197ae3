"""Prompts and seeds of an evaluation: the same for every run, checkpoint and guidance."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config
from flowgrpo.prompts.load import load_prompts
from flowgrpo.records import Prompts


@dataclass(frozen=True)
class EvaluationSet:
    """Prompts that training never sees, each with its seeds."""

    prompts: Prompts
    """N entries; a task with few prompts repeats them with other seeds."""
    seeds: Tensor
    """int64 [N * samples]: image n * samples + s is sample s of entry n."""
    samples: int
    """Images for each entry."""

    @property
    def tags(self) -> list[str]:
        """Task of each entry ("" where the prompt set has no tasks)."""
        return [str(entry.get("tag") or "") for entry in self.prompts.metadata]


def load_evaluation_set(config: Config, split: str = "heldout") -> EvaluationSet:
    """Load what `config` evaluates: `run.eval_prompts` prompts of the set's split, with seeds.

    The tasks take turns, so each has the same number of entries.
    """
    prompts = select(load_prompts(config.sample.prompts, split), config.run.eval_prompts)
    return seeded(prompts, config.run.eval_samples)


def seeded(prompts: Prompts, samples: int) -> EvaluationSet:
    """Draw the seeds of `samples` images for each entry; entries that repeat a prompt, as
    `prompts.indices` has it, get other ones."""
    indices, repeats = prompts.indices.numpy(), np.zeros(len(prompts), dtype=np.int64)
    counts: dict[int, int] = {}
    for entry, index in enumerate(indices.tolist()):
        repeats[entry] = counts.get(index, 0)
        counts[index] = counts.get(index, 0) + 1
    number = repeats[:, None] * samples + np.arange(samples)
    drawn = seeds.sample_seeds(0, seeds.EVALUATION, indices[:, None], number)
    return EvaluationSet(prompts, torch.from_numpy(drawn.reshape(-1)), samples)


def select(prompts: Prompts, count: int) -> Prompts:
    """Take `count` entries of a prompt set, its tasks in turn; 0, or too many without tasks: all.

    A task's prompts are taken at even distances, and again from the front when they are used up.
    """
    if count == 0:
        return prompts
    tasks: dict[str, list[int]] = {}
    for index, entry in enumerate(prompts.metadata):
        tasks.setdefault(str(entry.get("tag") or ""), []).append(index)
    count = min(count, len(prompts)) if len(tasks) == 1 else count
    # Entries of one task, rounded up.
    share = -(-count // len(tasks))
    chosen = []
    for number in range(count):
        indices = list(tasks.values())[number % len(tasks)]
        turn = number // len(tasks)
        stride = max(len(indices) // share, 1)
        chosen.append(indices[(turn * stride) % len(indices)])
    return prompts.take(chosen)
