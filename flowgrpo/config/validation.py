"""Checks of configuration values: types, ranges, and the error that states the rule."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import types
import typing
from typing import Any, Literal, TypeVar

T = TypeVar("T")


class ConfigError(ValueError):
    """A value of the user's that cannot be used; the message says what to do, in one sentence.

    The command line prints it without a traceback and exits with code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise ConfigError(message) unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def shown(value: Any) -> str:
    """Write `value` for a message: on one line, and not more of it than helps."""
    try:
        text = repr(value)
    # Python writes no integer of thousands of digits.
    except ValueError:
        text = f"a {type(value).__name__} too long to be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def _is_a(value: Any, hint: Any) -> bool:
    """Check `value` against the type that the annotation `hint` of a config field states."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, argument) for argument in arguments)
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if arguments[-1] is Ellipsis:
            return all(_is_a(item, arguments[0]) for item in value)
        return len(value) == len(arguments) and all(map(_is_a, value, arguments))
    if origin is dict:
        pairs = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is_a(k, arguments[0]) and _is_a(v, arguments[1]) for k, v in pairs)
    if hint in (int, float):
        number = isinstance(value, int if hint is int else (int, float))
        return number and not isinstance(value, bool)
    return isinstance(value, hint)


def _expected(hint: Any) -> str:
    """Name the values that the annotation `hint` allows."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(hint)))
    # In Python 3.10 dict[str, float] counts as a type, whose name is dict.
    plain = isinstance(hint, type) and not typing.get_args(hint)
    return f"a value of type {hint.__name__ if plain else hint}"


def path_text(value: Any) -> Any:
    """Write a path as text, with the home directory in place of a leading ~; others as they are.

    A shell expands ~ only where a word begins with it, which `--run.out=~/runs` does not.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return os.path.expanduser(value) if isinstance(value, str) else value


def settle_paths(values: Any, *names: str) -> None:
    """Write the named fields of the frozen dataclass `values` as `path_text` does."""
    for name in names:
        path = path_text(getattr(values, name))
        # Otherwise a folder of that name would be made.
        unknown = isinstance(path, str) and path.startswith("~") and not os.path.lexists(path)
        require(
            not unknown,
            f"{name} is {path!r}, but the home directory of {str(path).partition('/')[0]} is not "
            "known; write the whole path.",
        )
        object.__setattr__(values, name, path)


def _is_long(value: Any) -> bool:
    """Tell whether `value` is or holds an integer that no 64-bit number holds."""
    if isinstance(value, dict):
        return any(map(_is_long, value.values()))
    if isinstance(value, tuple):
        return any(map(_is_long, value))
    return isinstance(value, int) and abs(value) >= 2**63


def _plain_number(value: Any) -> Any:
    """Write a number of NumPy or torch, also a 0-dim array or tensor, as Python's; others as they
    are."""
    # Neither library is imported for it.
    is_number = getattr(value, "shape", None) == () and hasattr(value, "item")
    return value.item() if is_number else value


def _plain(value: Any) -> Any:
    """Write the numbers of a field as `_plain_number` does, and a list as a tuple."""
    if isinstance(value, list | tuple):
        return tuple(map(_plain_number, value))
    if isinstance(value, dict):
        return {key: _plain_number(item) for key, item in value.items()}
    return _plain_number(value)


def check_types(section: str, values: Any) -> None:
    """Raise unless every field of the dataclass `values` has its annotated type, and integers are
    below 2^63. Fields are written as `_plain` does."""
    # Every change of a configuration comes here: sentences are written where they are needed.
    for name, hint in _hints(type(values)).items():
        value = _plain(getattr(values, name))
        object.__setattr__(values, name, value)
        if not _is_a(value, hint):
            raise ConfigError(
                f"{section}{name} is {shown(value)}, but {_expected(hint)} is expected; give such "
                "a value."
            )
        if _is_long(value):
            raise ConfigError(
                f"{section}{name} is {shown(value)}, but whole numbers must be below 2^63; lower "
                "it."
            )


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Read the annotations of a class as types, once."""
    return typing.get_type_hints(cls)


def check_positive(section: str, values: Any, *names: str, zero: bool = False) -> None:
    """Raise unless the named fields are finite and > 0 (>= 0 with `zero`)."""
    for name in names:
        value, rule = getattr(values, name), "at least 0" if zero else "greater than 0"
        # Written so that NaN fails it as well.
        good = 0 <= value < float("inf") if zero else 0 < value < float("inf")
        require(good, f"{section}.{name} is {value!r}, but it must be {rule}; change it.")


def similar(name: str, names: typing.Iterable[str]) -> str:
    """Suggest the closest of `names`, as " (did you mean ...?)", or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_fields(cls: type, names: typing.Iterable[str], prefix: str = "") -> None:
    """Raise unless all `names` are fields of the dataclass `cls`."""
    known = [f.name for f in dataclasses.fields(cls)]
    for name in names:
        if name not in known:
            word = name if name and name.isprintable() else repr(name)
            raise ConfigError(
                f"{prefix}{word} is no field of the configuration{similar(name, known)}, but one "
                f"of {', '.join(known)} is expected; correct the name."
            )


def build(cls: type, values: Any, prefix: str = "") -> Any:
    """Build the dataclass `cls` from nested dicts of JSON values; lists become tuples."""
    require(
        isinstance(values, dict),
        f"{prefix.rstrip('.') or 'the configuration'} is {shown(values)}, but an object with the "
        f"fields of {cls.__name__} is expected; correct it.",
    )
    check_fields(cls, values, prefix)
    hints, fields = _hints(cls), {}
    for name, value in values.items():
        if dataclasses.is_dataclass(hints[name]):
            value = build(hints[name], value, f"{prefix}{name}.")
        fields[name] = tuple(value) if isinstance(value, list) else value
    return cls(**fields)


def replace(config: T, **changes: Any) -> T:
    """Copy `config` with fields changed by dotted name: ``**{"sample.steps": 8}``.

    `config` is a dataclass whose fields are sections, dataclasses too, or plain values. Fields of
    one section change together, so only the result has to be valid.
    """
    top: dict[str, Any] = {}
    sections: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        section, dot, rest = name.partition(".")
        check_fields(type(config), [section])
        if not dot:
            top[section] = value
        else:
            require(
                dataclasses.is_dataclass(getattr(config, section)),
                f"{name} is no field of the configuration; set {section} itself.",
            )
            check_fields(type(getattr(config, section)), [rest], f"{section}.")
            sections.setdefault(section, {})[rest] = value
    for section, values in sections.items():
        value, cls = top.get(section, getattr(config, section)), type(getattr(config, section))
        require(
            isinstance(value, cls),
            f"{section} is {shown(value)}, but {_expected(cls)} is expected; give such a value.",
        )
        top[section] = dataclasses.replace(value, **values)
    return dataclasses.replace(config, **top)
