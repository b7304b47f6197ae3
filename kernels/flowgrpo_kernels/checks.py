"""Checks of arguments on the host: shapes, dtypes, devices, step range. None of them synchronises.

A step outside the table that only the device knows gives a row of NaN. With FLOWGRPO_DEBUG=1 (read
once) it raises instead, at the price of a synchronisation.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .arguments import check_tensor, finite, flag, integer
from .autograd import readable
from .transitions import Transitions

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Latents that may not be None in an op that takes them.
REQUIRED = ("velocity", "prev_sample")
DEBUG = os.environ.get("FLOWGRPO_DEBUG", "0") == "1"


def check_latents(sample: Tensor, **others: Tensor | None) -> None:
    """Checks sample [B, ...] and others: same shape and device; float64 only when all are."""
    check_tensor("sample", sample)
    if sample.ndim < 2:
        raise ValueError(f"sample must be [B, ...] with at least 2 dims, got {list(sample.shape)}")
    if sample.dtype not in FLOAT_DTYPES and sample.dtype != torch.float64:
        raise TypeError(f"sample must be float32, bfloat16 or float16, got {sample.dtype}")
    # Read once: these checks are a visible share of a call's time on the host.
    dtype, shape, device = sample.dtype, sample.shape, sample.device
    for name, value in others.items():
        if value is None and name not in REQUIRED:
            continue
        check_tensor(name, value)
        other = value.dtype
        if other not in FLOAT_DTYPES and other != torch.float64:
            raise TypeError(f"{name} must be float32, bfloat16 or float16, got {other}")
        if other != dtype and torch.float64 in (other, dtype):
            raise TypeError(
                f"{name} is {other} but sample is {dtype}: float64 is for checks and needs every "
                "latent in float64"
            )
        if value.shape != shape:
            raise ValueError(
                f"{name} must have the shape of sample {list(shape)}, got {list(value.shape)}"
            )
        check_device(name, value, device)


def check_device(name: str, value: Tensor, device: torch.device, like: str = "sample") -> None:
    """Checks that a tensor is on the device of the sample, or of the argument `like`."""
    if value.device != device:
        raise ValueError(f"{name} must be on {device} like {like}, got {value.device}")


def check_rows(name: str, value, sample: Tensor) -> None:
    """Checks a float tensor [B] on the sample's device."""
    check_tensor(name, value)
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.shape != sample.shape[:1]:
        raise ValueError(f"{name} must be [{sample.shape[0]}], got {list(value.shape)}")
    check_device(name, value, sample.device)


def check_unit(name: str, value: Tensor, hint: str) -> None:
    """Checks values [B] within [0, 1], or NaN, where the host can read them."""
    if torch.compiler.is_compiling() or not readable(value):
        return
    if value.device.type != "cpu" and not (DEBUG and value.device.type == "cuda"):
        return
    for row, x in enumerate(value.tolist()):
        if x < 0 or x > 1:
            raise ValueError(f"{name} must be in [0, 1], got {x:g} in row {row} ({hint})")


def check_seeds(seeds: Tensor, sample: Tensor | None = None) -> None:
    """Checks int64 seeds [B], on the sample's device where there is a sample."""
    check_tensor("seeds", seeds)
    if seeds.dtype != torch.int64:
        raise TypeError(f"seeds must be int64, got {seeds.dtype}")
    if seeds.ndim != 1 or (sample is not None and seeds.shape[0] != sample.shape[0]):
        expected = "[B]" if sample is None else f"[{sample.shape[0]}]"
        raise ValueError(f"seeds must be {expected}, got {list(seeds.shape)}")
    if sample is not None:
        check_device("seeds", seeds, sample.device)


def check_transitions(transitions: Transitions, sample: Tensor) -> None:
    """Checks that the transitions are on the device of the sample."""
    if not isinstance(transitions, Transitions):
        raise TypeError(f"transitions must be Transitions, got {type(transitions).__name__}")
    if transitions.table.device != sample.device:
        raise ValueError(
            f"transitions must be on {sample.device} like sample, got {transitions.table.device}; "
            "call transitions.to(device) once"
        )


def guidance(uncond_velocity: Tensor | None, guidance_scale: float) -> float:
    """Returns the scale as a float; one other than 1 needs its unconditional velocity."""
    scale = finite("guidance_scale", guidance_scale)
    if uncond_velocity is None and scale != 1.0:
        raise ValueError(f"guidance_scale={guidance_scale} needs uncond_velocity")
    return scale


def resolve_step(
    step: int | Tensor, transitions: Transitions, sample: Tensor, name: str = "step"
) -> Tensor:
    """Expands an int, 0-dim or [B] int64 to [B] on the sample's device, a view if possible."""
    rows, batch = transitions.num_steps, sample.shape[0]
    if isinstance(step, Tensor):
        check_tensor(name, step)
        if step.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {step.dtype}")
        if step.ndim > 1 or (step.ndim == 1 and step.shape[0] != batch):
            raise ValueError(f"{name} must be an int, 0-dim or [{batch}], got {list(step.shape)}")
        on_host = step.device.type == "cpu" and not torch.compiler.is_compiling()
        if step.ndim == 0 and on_host and sample.device.type != "cpu":
            step = int(step)
        else:
            check_device(name, step, sample.device)
            if step.numel() and (on_host or (DEBUG and not torch.compiler.is_compiling())):
                # One transfer and Python's own minimum: a reduction for each costs more.
                values = step.reshape(-1).tolist()
                low, high = min(values), max(values)
                if low < 0 or high >= rows:
                    raise ValueError(
                        f"{name} must be in [0, {rows - 1}], got values from {low} to {high}"
                    )
            return step.expand(batch)
    step = integer(name, step)
    if step < 0 or step >= rows:
        raise ValueError(f"{name} must be in [0, {rows - 1}], got {step}")
    return transitions.row_numbers[step].expand(batch)


def check_constants(**latents: Tensor | None) -> None:
    """Checks that no gradient is asked for of latents that the op treats as constants."""
    if not torch.is_grad_enabled():
        return
    for name, value in latents.items():
        if value is not None and value.requires_grad:
            raise ValueError(f"{name} is a constant for this op but requires a gradient; detach it")


def uncond_half(uncond_velocity: Tensor | None, uncond_grad: bool) -> tuple[Tensor | None, bool]:
    """Detaches the unconditional half unless its gradient is asked for and needed."""
    uncond_grad = flag("uncond_grad", uncond_grad)
    if uncond_velocity is None:
        if uncond_grad:
            raise ValueError("uncond_grad=True needs uncond_velocity")
        return None, False
    needed = uncond_grad and uncond_velocity.requires_grad and torch.is_grad_enabled()
    return (uncond_velocity if needed else uncond_velocity.detach()), needed
