"""Statistics of an evaluation: means over tasks, bootstrap intervals, diversity."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def task_means(per_prompt: np.ndarray, tags: Sequence[str]) -> dict[str, float]:
    """Average each task's scores, in the order of first appearance, without prompts whose reward
    failed. Empty if the prompts have no tasks.

    Args:
        per_prompt: float64 [N], NaN where the reward failed.
        tags: the task of each entry.
    """
    names = list(dict.fromkeys(tags))
    if names == [""]:
        return {}
    task_of = np.asarray(tags)
    return {name: float(np.nanmean(per_prompt[task_of == name])) for name in names}


def balanced_mean(per_prompt: np.ndarray, tags: Sequence[str]) -> float:
    """Average the means of the tasks; the prompts themselves if there are no tasks."""
    means = task_means(per_prompt, tags)
    return float(np.nanmean(list(means.values()) if means else per_prompt))


def bootstrap(
    per_prompt: np.ndarray, tags: Sequence[str], indices: Tensor, draws: int = 2000
) -> tuple[float, float]:
    """Draw the 95 % percentile interval of `balanced_mean`: prompts anew within their tasks.

    Args:
        per_prompt: [N] scores of the entries; one that is not finite is left out.
        tags: the task of each entry.
        indices: int64 [N], the prompt of each entry. Entries that repeat a prompt are one unit, as
            they are not independent of each other.
        draws: number of resamples, from a fixed seed.
    """
    generator = np.random.default_rng(0)
    names, tags, prompts = dict.fromkeys(tags), np.asarray(tags), indices.numpy()
    means = []
    for name in names:
        rows = (tags == name) & np.isfinite(per_prompt)
        units, unit = np.unique(prompts[rows], return_inverse=True)
        if not len(units):
            continue
        sums = np.bincount(unit, weights=per_prompt[rows])
        counts = np.bincount(unit)
        drawn = generator.integers(len(units), size=(draws, len(units)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.percentile(np.mean(means, axis=0), [2.5, 97.5])
    return float(low), float(high)


def diversity(images: Tensor, samples: int) -> float:
    """Average the root-mean-square distance of two images of one prompt, for pixels in [0, 1].

    Args:
        images: uint8 [N * samples, 3, H, W], or frames of videos [N * samples, f, 3, H, W], those
            of one entry together.
        samples: images of each entry, at least 2.
    """
    pixels = images.view(-1, samples, images[0].numel()).float() / 255
    distances = torch.cdist(pixels, pixels) / pixels.shape[-1] ** 0.5
    return float(distances.sum() / (len(pixels) * samples * (samples - 1)))
