"""The error of a reward, and the place in the user's own code that it came through."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

from flowgrpo.config import ConfigError


class RewardError(ConfigError):
    """A reward cannot be used: it is unknown, misbehaves, or failed for every group."""


def describe_error(error: Exception) -> str:
    """An error on one line, with the place in the user's own code that it came through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame)]
    return f"{text}, {places[-1].filename} line {places[-1].lineno}" if places else text


def _is_users(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is neither of an installed library, nor of Python, nor of this package."""
    path, known = Path(frame.filename), sysconfig.get_paths()
    theirs = {Path(known[name]) for name in ("stdlib", "purelib", "platlib")}
    return path.is_file() and not {*theirs, Path(__file__).parents[1]} & {*path.parents}
