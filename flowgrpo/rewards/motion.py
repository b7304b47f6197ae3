"""Smoothness of a video's motion, by differences of its frames: no model, no download.

    score = 1 - mean_t mean_pixels |x_t - (x_{t-1} + x_{t+1}) / 2| / 255,    t = 1 ... F - 2

The middle of three frames is compared with the mean of its neighbours, as VBench's motion
smoothness (https://arxiv.org/abs/2311.17982) compares it with a frame that a network interpolates.
1 is a picture that changes evenly, flicker and jumps score lower. A video in which nothing moves is
perfectly smooth: train for it only beside a reward of what is shown, or report it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowgrpo.rewards.images import check_videos
from flowgrpo.rewards.interface import RewardError


def smoothness(videos: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    """Score the motion of each video, uint8 [B, F, 3, H, W], by a number in [0, 1].

    Raises:
        RewardError: there are fewer than three frames.
    """
    check_videos(videos, prompts, metadata)
    if videos.shape[1] < 3:
        raise RewardError(
            f"reward 'motion_smoothness' was given {videos.shape[1]} frames, but it compares three "
            "or more; make videos by policy.frames, with a model of videos, or leave it out."
        )
    return [_smoothness(video) for video in videos]


smoothness.frames = True


def _smoothness(video: Tensor) -> float:
    """Score one video, uint8 [F, 3, H, W], three frames at a time in memory."""
    total = torch.zeros((), dtype=torch.float64, device=video.device)
    for before, here, after in zip(video, video[1:], video[2:], strict=False):
        # Whole numbers, so that the sum is the same on any device.
        twice = (2 * here.int() - before.int() - after.int()).abs()
        total += twice.sum(dtype=torch.int64)
    return 1 - float(total) / (2 * 255 * (len(video) - 2) * video[0].numel())
