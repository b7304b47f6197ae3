"""Timing of one case: the providers that are compared and how each is made ready.

The suites hand these to pytest-benchmark (conftest.py) and to the comparison of two commits
(compare.py). Who measures decides how often, and whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from measuring.timers import Timed


def matches(name: str, patterns: str) -> bool:
    """Test whether a name contains one of some comma-separated texts; without any it does. Blanks
    count: "b1 " is not in "b16"."""
    words = [word for word in patterns.split(",") if word.strip()]
    return not words or any(word in name for word in words)


class Options(NamedTuple):
    """Choices that decide which cases there are."""

    device: str
    """"cpu" or "cuda"."""
    smoke: bool = False
    """Tiny sizes, which say nothing about speed."""
    compiled: bool = False
    """With the providers that torch.compile makes, which take minutes."""


class Timing(NamedTuple):
    """A case and the providers that are timed beside each other."""

    case: str
    providers: tuple[str, ...]
    ready: Callable[[Sequence[str]], dict[str, Timed]]
    """Makes some of the providers and warms them up; one more round of each."""
    threads: int | None = None
    """Threads of torch; None: those of the process."""
    limit: float = float("inf")
    """Seconds after which a provider has had enough rounds."""
    together: bool = True
    """False where the memory holds one of the providers at a time."""
