"""Schemas and fakes of the blocks' ops; see ../_ops.py for how a backend is chosen."""

from __future__ import annotations

import torch
from torch import Tensor

from .._ops import define, op
from . import reference

__all__ = ["op"]

_PARTS = "Tensor first, Tensor? second, Tensor? weight, Tensor? weight2, Tensor? cos, Tensor? sin"


def _new(x: Tensor, shape, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or x.dtype, device=x.device)


def _norm_modulate(x, scale, shift, scale2, shift2, eps, stats):
    dtype, rows = reference.compute_dtype(x), x.shape[:2] if stats else (0,)
    y2 = _new(x, (0,) if scale2 is None else x.shape)
    return _new(x, x.shape), y2, _new(x, rows, dtype), _new(x, rows, dtype)


def _norm_modulate_backward(dy, dy2, x, scale, scale2, mean, rstd):
    return _new(x, x.shape)


def _gated_residual(x, gate, y, gate2, y2):
    return _new(x, x.shape)


def _gated_residual_backward(grad, gate, gate2, dtype):
    return _new(grad, grad.shape, dtype), _new(grad, (0,) if gate2 is None else grad.shape, dtype)


def _joint_heads(first, second, weight, weight2, cos, sin, heads, eps):
    batch, count, width = first.shape
    count += 0 if second is None else second.shape[1]
    return _new(first, (batch, count, heads, width // heads))


def _joint_heads_backward(grad, first, second, weight, weight2, cos, sin, eps):
    return _new(first, first.shape), _new(first, (0,) if second is None else second.shape)


define(
    "norm_modulate",
    "(Tensor x, Tensor scale, Tensor shift, Tensor? scale2, Tensor? shift2, float eps, bool stats)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    reference.norm_modulate,
    _norm_modulate,
)
define(
    "norm_modulate_backward",
    "(Tensor dy, Tensor? dy2, Tensor x, Tensor scale, Tensor? scale2, Tensor mean, Tensor rstd)"
    " -> Tensor",
    reference.norm_modulate_backward,
    _norm_modulate_backward,
)
define(
    "gated_residual",
    "(Tensor x, Tensor gate, Tensor y, Tensor? gate2, Tensor? y2) -> Tensor",
    reference.gated_residual,
    _gated_residual,
)
define(
    "gated_residual_backward",
    "(Tensor grad, Tensor gate, Tensor? gate2, ScalarType dtype) -> (Tensor, Tensor)",
    reference.gated_residual_backward,
    _gated_residual_backward,
)
define(
    "joint_heads",
    f"({_PARTS}, int heads, float eps) -> Tensor",
    reference.joint_heads,
    _joint_heads,
)
define(
    "joint_heads_backward",
    f"(Tensor grad, {_PARTS}, float eps) -> (Tensor, Tensor)",
    reference.joint_heads_backward,
    _joint_heads_backward,
)
