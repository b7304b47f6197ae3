"""Checks of one argument: a number, Python's or NumPy's (which is not imported), or a tensor."""

from __future__ import annotations

import math
import numbers
import operator

import torch
from torch import Tensor

# Kernels take every number as a float32.
LARGEST = torch.finfo(torch.float32).max
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def check_tensor(name: str, value) -> None:
    """Checks that a value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got {value.layout}")


def flag(name: str, value) -> bool:
    """Checks a bool, Python's or NumPy's, or 0 or 1, and returns it as a bool."""
    kind = type(value)
    if kind is bool:
        return value
    if kind is int and value in (0, 1):
        return bool(value)
    if kind.__module__ == "numpy" and kind.__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name} must be a bool, got {kind.__name__}")


def number(name: str, value) -> float:
    """Checks a number and returns it as a float, maybe NaN or infinite.

    A tensor is none: on a GPU it would be read back at each call.
    """
    kind = type(value)
    if kind is float or kind is torch.SymFloat or kind is torch.SymInt:
        return value
    if kind is not int and (isinstance(value, bool) or not isinstance(value, numbers.Real)):
        raise TypeError(f"{name} must be a number, got {kind.__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number within float64, got more") from None


def finite(name: str, value) -> float:
    """Checks a number that is finite in float32 and returns it as a float."""
    result = number(name, value)
    if not -LARGEST <= result <= LARGEST:
        raise ValueError(f"{name} must be finite in float32, got {value}")
    return result


def positive(name: str, value) -> float:
    """Checks a number that is positive, finite and no subnormal in float32; returns it as float."""
    result = finite(name, value)
    if not result >= SMALLEST_NORMAL:
        raise ValueError(f"{name} must be > 0 (a normal number in float32), got {value}")
    return result


def bound(name: str, value) -> float:
    """Checks a number and returns it as a float, infinite where it is beyond float32."""
    result = number(name, value)
    return math.copysign(math.inf, result) if abs(result) > LARGEST else result


def integer(name: str, value) -> int:
    """Checks an integer and returns it as an int."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, (bool, Tensor)):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be an int, got {type(value).__name__}")
