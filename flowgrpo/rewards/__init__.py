"""Rewards are functions: images, prompts, metadata -> one score an image.

    fn(images uint8 [B, 3, H, W], prompts list[str], metadata list[dict]) -> B scores

A name is one of `REWARDS`, or "package.module:function" of the user's own. The import happens in
`load`, so no reward's dependencies are needed for another's.

`Scorer` is the weighted sum of several. A reward that raises or returns scores that are not finite
is asked again, group by group; a group that fails every time is dropped and counted, never scored 0
in silence. A wrong number of scores is a mistake that no repetition mends, and raises.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo.config import ConfigError
from flowgrpo.records import Prompts, Scores

log = logging.getLogger("flowgrpo")

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]

REWARDS = {
    "nano_strict": "flowgrpo.rewards.nano:strict",
    "nano_partial": "flowgrpo.rewards.nano:partial",
    "aesthetic": "flowgrpo.rewards.aesthetic:score",
    "clipscore": "flowgrpo.rewards.clipscore:score",
    "deqa": "flowgrpo.rewards.judges:deqa",
    "geneval": "flowgrpo.rewards.geneval:partial",
    "geneval_strict": "flowgrpo.rewards.geneval:strict",
    "hpsv2": "flowgrpo.rewards.hpsv2:score",
    "http": "flowgrpo.rewards.http:score",
    "imagereward": "flowgrpo.rewards.imagereward:score",
    "jpeg_compressibility": "flowgrpo.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowgrpo.rewards.jpeg:incompressibility",
    "ocr": "flowgrpo.rewards.ocr:score",
    "pickscore": "flowgrpo.rewards.pickscore:score",
    "unifiedreward": "flowgrpo.rewards.judges:unifiedreward",
}
"""Reward name -> "module:function"."""


class RewardError(ConfigError):
    """A reward cannot be used: it is unknown, misbehaves, or failed for every group."""


def load(name: str) -> Reward:
    """The reward called `name`; an http:// or https:// address is a remote one."""
    if name.startswith(("http://", "https://")):
        from flowgrpo.rewards.http import score

        return score.configured(url=name)
    target = REWARDS.get(name, name)
    module, _, function = target.partition(":")
    if not module or not function:
        raise RewardError(
            f"reward {name!r} is unknown, but one of {', '.join(sorted(REWARDS))} or "
            "package.module:function is expected; name one of these."
        )
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RewardError(
            f"reward {name!r} cannot be loaded from {target} ({error}); check the name, or install "
            "what it needs."
        ) from error
    if not callable(found):
        raise RewardError(f"reward {name!r} is {type(found).__name__}, but a function is expected.")
    return found


class Scorer:
    """The weighted sum of rewards over K groups of images."""

    def __init__(self, weights: Mapping[str, float], retries: int = 2) -> None:
        self.weights = dict(weights)
        self.retries = retries
        self.rewards = {name: load(name) for name in self.weights}
        self.problems: dict[str, str] = {}
        """Why each reward failed last."""

    def __call__(self, images: Tensor, prompts: Prompts, group_size: int) -> Scores:
        """Score K * G images, G for each of the K prompts in turn.

        Raises:
            RewardError: a reward returned a wrong number of scores, or failed for every group.
        """
        return self.combine(self.parts(images, prompts, group_size), group_size)

    def parts(self, images: Tensor, prompts: Prompts, group_size: int) -> dict[str, Tensor]:
        """float64 scores of each reward for some of the groups, NaN in those that failed.

        Raises:
            RewardError: a reward returned a wrong number of scores.
        """
        return {name: self._all_groups(name, images, prompts, group_size) for name in self.weights}

    def combine(self, parts: dict[str, Tensor], group_size: int) -> Scores:
        """The weighted sum over all groups, from what `parts` returned for them in turn.

        Raises:
            RewardError: a reward failed for every group.
        """
        for name, scores in parts.items():
            if len(_failed(scores, group_size)) * group_size == len(scores):
                raise RewardError(
                    f"reward {name!r} failed for all {len(scores) // group_size} groups after "
                    f"{self.retries} retries ({self.problems[name]}), but {len(scores)} finite "
                    "scores are expected; mend it."
                )
        total = sum(weight * parts[name] for name, weight in self.weights.items())
        dropped = total.isnan().view(-1, group_size).any(dim=1)
        total = total.masked_fill(dropped.repeat_interleave(group_size), torch.nan)
        return Scores(total, parts, dropped)

    def _all_groups(self, name: str, images: Tensor, prompts: Prompts, group_size: int) -> Tensor:
        """float64 [B] scores of one reward, NaN in the groups that failed every attempt."""
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        problems = ["it returned scores that are not finite"]

        def attempt(rows: slice, these: Prompts) -> None:
            try:
                scores[rows] = _call(self.rewards[name], name, images[rows], these, group_size)
            except RewardError:
                raise
            # A reward is the user's code or a remote service: anything may come out of it.
            except Exception as error:
                problems.append(f"{type(error).__name__}: {error}")

        attempt(slice(None), prompts)
        for _ in range(self.retries):
            for group in _failed(scores, group_size):
                rows = slice(group * group_size, (group + 1) * group_size)
                attempt(rows, prompts.take([group]))
        failed = _failed(scores, group_size)
        if failed:
            self.problems[name] = problems[-1]
            message = "reward %r failed for %d of %d groups, which are dropped (%s)"
            log.warning(message, name, len(failed), len(prompts), problems[-1])
        for group in failed:
            scores[group * group_size : (group + 1) * group_size] = torch.nan
        return scores


def _failed(scores: Tensor, group_size: int) -> list[int]:
    """The groups with a score that is not finite."""
    bad = ~scores.isfinite().view(-1, group_size).all(dim=1)
    return bad.nonzero()[:, 0].tolist()


def _call(reward: Reward, name: str, images: Tensor, prompts: Prompts, group_size: int) -> Tensor:
    """float64 scores of `images` on the CPU; the count is checked."""
    texts = [text for text in prompts.texts for _ in range(group_size)]
    metadata = [entry for entry in prompts.metadata for _ in range(group_size)]
    out = reward(images, texts, metadata)
    if isinstance(out, Tensor):
        out = out.detach().to("cpu", torch.float64).numpy()
    elif isinstance(out, list | tuple):
        # Of numbers of any library, 0-dim tensors among them.
        out = [float(score) for score in out]
    scores = torch.from_numpy(np.array(out, dtype=np.float64))
    if scores.shape != (len(images),):
        raise RewardError(
            f"reward {name!r} returned scores of shape {tuple(scores.shape)} for {len(images)} "
            f"images, but one score an image, shape ({len(images)},), is expected; correct it."
        )
    return scores
