"""Patch: replaces functions of modules and methods of classes, and puts the originals back."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

_MISSING = object()


class Patch:
    """Replacement of functions, active from construction.

    `revert()`, or the end of a `with` block, restores all of them. Patches nest: the one made last
    must be reverted first.
    """

    def __init__(self, replacements: Iterable[tuple[Any, str, Callable]]):
        """replacements: (module or class, name, function in its place)."""
        # vars, not getattr: what a class inherits is not its own to put back.
        self._entries = [
            (owner, name, function, vars(owner).get(name, _MISSING))
            for owner, name, function in replacements
        ]
        for owner, name, function, _ in self._entries:
            setattr(owner, name, function)

    def revert(self) -> None:
        """Puts the originals back; a second call does nothing."""
        for owner, name, function, _ in self._entries:
            if vars(owner).get(name) is not function:
                raise RuntimeError(
                    f"{name} of {_name(owner)} was replaced again after this patch; "
                    "revert the later patch first"
                )
        for owner, name, _, original in self._entries:
            if original is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        self._entries = []

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exc) -> None:
        self.revert()


def replacement(owner: Any, name: str, ours: Callable, options: dict[str, Any]) -> Callable:
    """Makes what is put in place of owner.name: ours, with options fixed.

    Raises ValueError where owner has no such function or one with other arguments, TypeError for an
    option that ours does not have.
    """
    check_signature(owner, name, ours)
    parameters = inspect.signature(ours).parameters
    theirs = inspect.signature(getattr(owner, name), follow_wrapped=False).parameters
    known = [n for n, p in parameters.items() if p.kind is p.KEYWORD_ONLY and n not in theirs]
    for option in options:
        if option not in known:
            raise TypeError(f"patch has the options {known} for {name}, got {option}")
    if not options:
        return ours

    @functools.wraps(ours)
    def with_options(*args, **kwargs):
        return ours(*args, **{**options, **kwargs})

    return with_options


def check_signature(owner: Any, name: str, ours: Callable) -> None:
    """Checks that owner.name can be called with no arguments but those that ours takes."""
    theirs = getattr(owner, name, None)
    if not callable(theirs):
        raise ValueError(f"{_name(owner)} has no function {name}")
    if difference := differs(theirs, ours):
        raise ValueError(
            f"{name} of {_name(owner)} is not the one that this replaces: {difference}"
        )


def differs(theirs: Callable, ours: Callable) -> str:
    """Says how the arguments of theirs differ from what ours takes; empty where they do not."""
    try:
        parameters = list(inspect.signature(theirs).parameters.values())
    except (TypeError, ValueError):
        return "its signature cannot be read"
    mine = inspect.signature(ours).parameters
    places = [n for n, p in mine.items() if p.kind is not p.KEYWORD_ONLY]
    required = [n for n in places if mine[n].default is inspect.Parameter.empty]
    names = [p.name for p in parameters]
    for i, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return f"it takes {parameter}"
        if parameter.name not in mine:
            return f"its argument {parameter.name} is not known"
        expected = places[i] if i < len(places) else "none"
        if parameter.kind is not parameter.KEYWORD_ONLY and parameter.name != expected:
            return f"argument {i + 1} is {parameter.name}, expected {expected}"
    for name in required:
        if name not in names:
            return f"it has no argument {name}"
    return ""


def owners(modules: tuple, name: str) -> tuple:
    """Checks that there is something to patch."""
    if not modules:
        raise ValueError(f"give the modules whose {name} is to be replaced")
    return modules


def _name(owner: Any) -> str:
    return getattr(owner, "__name__", str(owner))
