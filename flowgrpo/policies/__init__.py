"""Models that can be trained: an abstract `Policy`, and a folder for each family of them."""

from __future__ import annotations

from importlib import import_module

_HOME = {"Conditioning": "conditioning", "Policy": "base"}
__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    """Import `Policy` or `Conditioning` when it is first asked for: the families' records, which
    the memory plan reads, come without torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
