"""Images and pairs of a curated set, as the results of an iteration.

A set is what ``flowgrpo curate`` wrote (flowgrpo/curation). Its images or pairs are shuffled once
an epoch by a hash of (seed, purpose, epoch) and taken in turn, B of them an iteration, or B / 2
pairs; an epoch may end inside an iteration. Each image is encoded when its turn comes: the VAE's
mean. A resumed run takes the same.

Rows of an iteration are images, each with its own prompt; of pairs, the better ones and then the
worse. Advantages and weights are 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowgrpo import seeds
from flowgrpo.config import Config
from flowgrpo.config.validation import require
from flowgrpo.curation.dataset import CuratedSet, Pairs, load_pairs
from flowgrpo.objectives import matching
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.records import Batch, Experience, Trajectory
from flowgrpo.sampling.rollout import chunks
from flowgrpo.sampling.schedule import Schedule

PURPOSES = (seeds.CURATED_LEVEL, seeds.CURATED_NOISE)
"""Purposes of the levels and the noise of the supervised part of a mixture."""


def load(config: Config, pairs: bool) -> CuratedSet | Pairs:
    """Load the training images of `sample.curated`, or its pairs.

    Raises:
        ConfigError: the folder is none of a finished set, or there are none in it.
    """
    folder = config.sample.curated
    return load_pairs(folder) if pairs else CuratedSet.load(folder, "train")


def numbers_of(total: int, config: Config, iteration: int, count: int) -> np.ndarray:
    """Draw the positions of `count` of `total` entries for an iteration, int64 [count]."""
    turns = iteration * count + np.arange(count)
    epochs = np.unique(turns // total)
    orders = [seeds.permutation(total, config.run.seed, seeds.CURATED, int(e)) for e in epochs]
    return np.concatenate(orders)[turns - epochs[0] * total]


@dataclass(frozen=True)
class Curated:
    """A curated set that a policy learns from."""

    policy: Policy
    records: CuratedSet | Pairs
    uncond: Conditioning | None
    """Embeddings of the empty prompt; None without guidance."""

    def __post_init__(self) -> None:
        height, width = self.records.resolution
        policy = self.policy
        require(
            not policy.frames,
            f"sample.curated {str(self.records.folder)!r} is a set of images, but {policy.name} "
            "makes videos; leave sample.curated empty, or choose a model of images.",
        )
        require(
            (height, width) == (policy.height, policy.width),
            f"sample.curated {str(self.records.folder)!r} has images of {width} x {height} pixels, "
            f"but the model makes {policy.width} x {policy.height}; curate to that size, or set "
            "policy.height and policy.width to the set's.",
        )

    def experience(
        self, config: Config, iteration: int, chosen: Tensor | None = None
    ) -> Experience:
        """Take the images or pairs of an iteration, as many as a rollout has images; with `chosen`,
        int64 [b], only these of the images."""
        return self.take(config, iteration, config.sample.rows, chosen)

    def supervision(self, config: Config, iteration: int) -> Supervision:
        """Take the images of the supervised part of a mixture: a micro-step of `sample.batch_size`
        for each optimizer step."""
        count = config.sample.batch_size * config.optim.updates_per_iteration
        experience = self.take(config, iteration, count)
        schedule, experience = matching.prepare(
            self.policy, None, experience, config, purposes=PURPOSES
        )
        return Supervision(schedule, experience, config.sample.batch_size)

    def take(
        self, config: Config, iteration: int, rows: int, chosen: Tensor | None = None
    ) -> Experience:
        """Take the next `rows` images, or `rows` // 2 pairs, of the set; with `chosen`, int64 [b],
        only these of the images, whole chunks of `sample.batch_size`."""
        pairs = isinstance(self.records, Pairs)
        count = rows // 2 if pairs else rows
        numbers = numbers_of(len(self.records), config, iteration, count)
        if chosen is not None:
            numbers = numbers[chosen.numpy()]
        texts = [self.records.texts[n] for n in numbers] * (2 if pairs else 1)
        # One prompt has one row of embeddings, however many images it has.
        unique = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        groups = torch.tensor([unique[text] for text in texts])
        latents, device = self.encode(numbers, config.sample.batch_size), self.policy.device
        ones = torch.ones(len(latents), device=device)
        return Experience(
            results(latents, groups.to(device)),
            self.policy.encode(list(unique)),
            self.uncond,
            ones,
            ones,
            iteration,
            rows=chosen,
        )

    def encode(self, numbers: np.ndarray, batch_size: int) -> Tensor:
        """Encode the images at these positions, float32 [B, C, H, W]; of pairs all better ones,
        then all worse."""
        encoded: list[list[Tensor]] = [[], []]
        for rows in chunks(len(numbers), batch_size):
            images = self.records.images(numbers[rows].tolist())
            for side, batch in enumerate(images if isinstance(images, tuple) else (images,)):
                encoded[side].append(self.policy.encode_images(batch))
        return torch.cat([latents for side in encoded for latents in side])


@dataclass(frozen=True)
class Supervision:
    """Supervised micro-steps of an iteration, one for each optimizer step."""

    schedule: Schedule
    experience: Experience
    rows: int
    """Images of a micro-step."""

    def batch(self, update: int) -> Batch:
        """Re-noise the images of the optimizer step number `update`, from 0."""
        rows = slice(update * self.rows, (update + 1) * self.rows)
        return matching.gather(self.schedule, self.experience, rows, range(1))


def results(latents: Tensor, groups: Tensor) -> Trajectory:
    """Make the record of a rollout that has the results `latents` [B, C, H, W] and no steps."""
    rows, device = len(latents), latents.device
    steps = torch.empty(0, rows, dtype=torch.int64, device=device)
    return Trajectory(
        latents=latents[None],
        log_probs=torch.empty(0, rows, device=device),
        table_rows=steps,
        trained_steps=steps,
        groups=groups,
        seeds=torch.zeros(rows, dtype=torch.int64, device=device),
    )
