"""Checks of the blocks' arguments on the host: types, shapes, devices. None synchronises."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import check_tensor, finite
from ..checks import FLOAT_DTYPES


def check_float(name: str, value, like: Tensor | None = None, like_name: str = "x") -> None:
    """Checks a float tensor on the device of `like`; float64 exactly when `like` is."""
    check_tensor(name, value)
    dtype = value.dtype
    if dtype not in FLOAT_DTYPES and dtype != torch.float64:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {dtype}")
    if like is None:
        return
    if dtype != like.dtype and torch.float64 in (dtype, like.dtype):
        raise TypeError(
            f"{name} is {dtype} but {like_name} is {like.dtype}: float64 is for checks and needs "
            "every tensor in float64"
        )
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {value.device}")


def check_tokens(name: str, value) -> None:
    """Checks a float tensor [B, N, D] with D > 0."""
    check_float(name, value)
    if value.ndim != 3 or value.shape[2] == 0:
        raise ValueError(f"{name} must be [B, N, D] with D > 0, got {list(value.shape)}")


def check_same(name: str, value, x: Tensor) -> None:
    """Checks a float tensor of the shape of x."""
    check_float(name, value, x)
    if value.shape != x.shape:
        raise ValueError(
            f"{name} must have the shape of x {list(x.shape)}, got {list(value.shape)}"
        )


def check_row(name: str, value, x: Tensor) -> None:
    """Checks a float tensor [B, D], one row for all tokens of a sample."""
    check_float(name, value, x)
    if value.shape != (x.shape[0], x.shape[2]):
        raise ValueError(
            f"{name} must be [B, D] = {[x.shape[0], x.shape[2]]}, got {list(value.shape)}"
        )


def pair(name: str, value, meaning: str) -> tuple:
    """Returns the two values of an optional pair; (None, None) without one."""
    if value is None:
        return None, None
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{name} must be None or {meaning}, got {type(value).__name__}")
    return tuple(value)


def positive(name: str, value) -> float:
    """Checks a positive number, finite in float32, and returns it as a float."""
    result = finite(name, value)
    if not result > 0:
        raise ValueError(f"{name} must be positive, got {value}")
    return result


def needs_grad(*values: Tensor | None) -> bool:
    """Tells whether a backward will come through one of the tensors."""
    return torch.is_grad_enabled() and any(v is not None and v.requires_grad for v in values)
