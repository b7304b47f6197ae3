"""Rewards that pass a gradient on to the pixels.

A reward says that it is one by a function `of_pixels` of its own, differentiable in the pixels: an
attribute of the function that is called for images.

    of_pixels(pixels float32 [B, 3, H, W] in 0 ... 255, prompts, metadata) -> B scores

It is to score as the reward does, but for the rounding of pixels to whole numbers. Of videos it is
given what the reward is (frames.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from flowgrpo.config import RewardConfig
from flowgrpo.rewards.frames import as_asked
from flowgrpo.rewards.interface import RewardError
from flowgrpo.rewards.table import load, on_device, options_of

OfPixels = Callable[[Tensor, list[str], list[dict[str, Any]]], Tensor]
"""Pixels float32 [B, 3, H, W] in 0 ... 255, or of videos [B, F, 3, H, W], prompts, metadata -> B
scores, differentiable."""


def differentiable_rewards(config: RewardConfig) -> list[tuple[float, OfPixels]]:
    """List the rewards of `reward.weights`: the weight and `of_pixels` of each.

    Raises:
        RewardError: one of them passes no gradient on.
    """
    options = options_of(config.options, dict.fromkeys((*config.weights, *config.report)))
    functions = []
    for name, weight in config.weights.items():
        reward = load(name, on_device(name, options.get(name, {}), config.devices))
        function = reward.build() if hasattr(reward, "build") else reward
        of_pixels = getattr(function, "of_pixels", None)
        if of_pixels is None:
            raise RewardError(
                f"reward {name!r} passes no gradient on to the pixels, but optim.objective refl "
                "learns by that gradient; take pickscore, clipscore, imagereward or, for nano, "
                "nano_classifier, or give your function an attribute of_pixels "
                "(flowgrpo/rewards/differentiable.py)."
            )
        functions.append((weight, partial(_score, reward, of_pixels, config.frames)))
    return functions


def _score(
    reward: Any,
    of_pixels: OfPixels,
    count: int,
    pixels: Tensor,
    prompts: list[str],
    metadata: list[dict[str, Any]],
) -> Tensor:
    """Score images, or videos by `count` frames of each where the reward is one of images, [B]."""
    pictures, frames = as_asked(reward, pixels, count)
    texts = [text for text in prompts for _ in range(frames)]
    entries = [entry for entry in metadata for _ in range(frames)]
    return of_pixels(pictures, texts, entries).view(-1, frames).mean(dim=1)
