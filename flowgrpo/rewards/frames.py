"""Videos for rewards: which get whole videos, and which pictures of them the others are given.

A video is uint8 [F, 3, H, W]. A reward that has an attribute `frames` that is True is given videos,
[B, F, 3, H, W]; images reach it as videos of one frame. Any other reward is one of images, and
judges n frames of a video at even distances, the middle one where n is 1 (`reward.frames`):

    score = mean_i reward(x_{t_i}, prompt),    t_i = floor((2 i + 1) F / 2 n),  i = 0 ... n - 1
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def takes_videos(reward: Any) -> bool:
    """Tell whether a reward is to be given videos and not images."""
    return getattr(reward, "frames", False) is True


def is_video(images: Tensor) -> bool:
    """Tell videos [B, F, 3, H, W] from images [B, 3, H, W]."""
    return images.ndim == 5


def positions(total: int, count: int) -> list[int]:
    """Find `count` of `total` frames at even distances; all of them where there are fewer."""
    count = min(count, total)
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def spread(videos: Tensor, count: int) -> Tensor:
    """Choose the frames at `positions` of videos [B, F, ...]: [B, min(count, F), ...]."""
    chosen = positions(videos.shape[1], count)
    # Slices, so that nothing is copied from host memory to a device.
    return torch.stack([videos[:, t] for t in chosen], dim=1)


def as_asked(reward: Any, images: Tensor, count: int) -> tuple[Tensor, int]:
    """Prepare images or videos [B, ...] for a reward.

    Args:
        count: frames of a video that a reward of images judges.

    Returns:
        What it is called with: videos [B, F, 3, H, W], or pictures [B n, 3, H, W], those of one
        video together; and n, 1 unless pictures are the frames of a video.
    """
    if takes_videos(reward):
        return (images if is_video(images) else images[:, None]), 1
    if not is_video(images):
        return images, 1
    frames = spread(images, count)
    return frames.flatten(0, 1), frames.shape[1]
