"""Patch: replaces one function in other modules, and puts the original back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType


class Patch:
    """Replacement of a function, active from construction.

    `revert()`, or the end of a `with` block, restores every module. Patches nest: the one made last
    must be reverted first.
    """

    def __init__(self, name: str, function: Callable, modules: tuple[ModuleType, ...], options):
        if not modules:
            raise ValueError(f"give the modules whose {name} is to be replaced")
        for module in modules:
            if not callable(getattr(module, name, None)):
                raise ValueError(f"{getattr(module, '__name__', module)} has no function {name}")
        self._name = name
        self._replacement = functools.partial(function, **options) if options else function
        self._originals = [(module, getattr(module, name)) for module in modules]
        for module, _ in self._originals:
            setattr(module, name, self._replacement)

    def revert(self) -> None:
        """Puts the originals back; a second call does nothing."""
        for module, _ in self._originals:
            if getattr(module, self._name) is not self._replacement:
                raise RuntimeError(
                    f"{self._name} of {module.__name__} was replaced again after this patch; "
                    "revert the later patch first"
                )
        for module, original in self._originals:
            setattr(module, self._name, original)
        self._originals = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc) -> None:
        self.revert()
