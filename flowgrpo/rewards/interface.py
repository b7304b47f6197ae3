"""A reward: its type, its error, and the line of the user's code that an error came through."""

from __future__ import annotations

import inspect
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from flowgrpo.config import ConfigError

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""f(images uint8 [B, 3, H, W], prompts, metadata) -> B scores; one with an attribute `frames` that
is True is given videos, uint8 [B, F, 3, H, W] (frames.py)."""


class RewardError(ConfigError):
    """A reward cannot be used: it is unknown, misbehaves, or failed for every group."""


class RemoteError(RuntimeError):
    """A server did not answer, or not with what it should; another time it may."""


class ReplyError(RemoteError):
    """A server's answer is none of the protocol; another server may be at the address.

    `reason`: what it did, "answered '...'".
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


def check_arguments(reward: Any, name: str) -> None:
    """Raise RewardError unless `reward` can be called with images, prompts and metadata."""
    try:
        signature = inspect.signature(reward)
    # A function of C may have none.
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None, None)
    except TypeError as error:
        raise RewardError(
            f"reward {name!r} takes the arguments {signature}, but it is called with images, "
            f"prompts and metadata, in this order ({error}); change its arguments."
        ) from error


def describe_error(error: BaseException) -> str:
    """Describe an error on one line, with the last line of the user's code in its traceback."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    return f"{text}, {frames[-1].filename} line {frames[-1].lineno}" if frames else text


def _is_users(frame: traceback.FrameSummary) -> bool:
    """Tell a frame of the user's code from those of libraries, Python and this package."""
    path, paths = Path(frame.filename), sysconfig.get_paths()
    libraries = {Path(paths[name]) for name in ("stdlib", "purelib", "platlib")}
    return path.is_file() and not {*libraries, Path(__file__).parents[1]} & {*path.parents}
