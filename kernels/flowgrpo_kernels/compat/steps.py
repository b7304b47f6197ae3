"""The steps that every drop-in takes: sampling and scoring at rows of a table, one pass each."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..arguments import check_tensor
from ..autograd import check_transforms
from ..checks import check_device, check_seeds
from ..log_prob import score_and_mean
from ..sde_step import sde_step_op


class Step(NamedTuple):
    """One step: x' [B, ...], log_prob float32 [B], mean and x0 (or None) float32 [B, ...]."""

    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    x0: Tensor | None


# What peers call the velocity: the others are constants for the gradient.
_VELOCITIES = ("model_output", "mean_model_output", "noise_pred")


def latents(
    optional: str, *, constants: bool = True, **tensors: Tensor | None
) -> list[Tensor | None]:
    """Checks floating tensors [B, ...] of one shape and device; casts float64 to float32.

    The one named `optional` may be None. With `constants`, none but a velocity may require a
    gradient. Peers cast everything to float32; here 16-bit storage is rounded to and keeps its
    dtype.
    """
    first = like = None
    result = []
    constants = constants and torch.is_grad_enabled()
    for name, x in tensors.items():
        if x is None and name == optional:
            result.append(None)
            continue
        if (
            first is not None
            and type(x) is Tensor
            and x.dtype is torch.float32
            and x.shape == like.shape
            and x.device == like.device
            and x.layout is torch.strided
            and not (constants and x.requires_grad and name not in _VELOCITIES)
        ):
            # What nothing is to be said about.
            result.append(x)
            continue
        check_tensor(name, x)
        if not x.is_floating_point():
            raise TypeError(f"{name} must be floating point, got {x.dtype}")
        if first is None:
            first, like = name, x
            if x.ndim < 2:
                raise ValueError(
                    f"{name} must be [B, ...] with at least 2 dims, got {list(x.shape)}"
                )
        elif x.shape != like.shape:
            raise ValueError(
                f"{name} must have the shape of {first} {list(like.shape)}, got {list(x.shape)}"
            )
        else:
            check_device(name, x, like.device, first)
        if constants and x.requires_grad and name not in _VELOCITIES:
            raise ValueError(
                f"{name} is a constant for the gradient here but requires one; detach it"
            )
        result.append(x.float() if x.dtype == torch.float64 else x)
    return result


def storage_dtype(storage: torch.dtype | None) -> torch.dtype | None:
    """Checks the dtype that x' is rounded to."""
    if storage not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"storage must be float32, bfloat16, float16 or None, got {storage}")
    return storage


def draw(like: Tensor, generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """Draws normals from the caller's generator, maybe on the CPU, or from one for each sample."""
    if isinstance(generator, (list, tuple)) and len(generator) != 1:
        if len(generator) != like.shape[0]:
            raise ValueError(f"generator must hold {like.shape[0]}, got {len(generator)}")
        rows = [draw(row, g, dtype) for row, g in zip(like.split(1), generator, strict=True)]
        return torch.cat(rows)
    generator = generator[0] if isinstance(generator, (list, tuple)) else generator
    device = like.device if generator is None else generator.device
    noise = torch.randn(like.shape, generator=generator, device=device, dtype=dtype)
    return noise if device == like.device else noise.to(like.device)


def take_step(
    velocity: Tensor,
    latents: Tensor,
    table: Tensor,
    step: Tensor,
    *,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    storage: torch.dtype | None = None,
    with_x0: bool = False,
) -> Step:
    """Draws x', rounded to `storage` (that of latents when None), and scores it.

    Without seeds and noise x' is the mean. log_prob, mean and x0 are differentiable in velocity.
    """
    check_transforms("sde_step", velocity, latents, noise)
    if seeds is not None:
        check_seeds(seeds, latents)
    new = torch.empty_like(latents, dtype=storage, memory_format=torch.contiguous_format)
    mean = torch.empty(latents.shape, dtype=torch.float32, device=latents.device)
    x0 = torch.empty_like(mean) if with_x0 else None
    log_prob = mean.new_empty(latents.shape[0])
    sde_step_op(
        velocity.detach(), None, 1.0, latents, table, step, seeds, noise, new, log_prob, mean, x0
    )
    if torch.is_grad_enabled() and velocity.requires_grad:
        return score(velocity, latents, new, table, step, with_x0)
    return Step(new, log_prob, mean, x0)


def score(
    velocity: Tensor,
    latents: Tensor,
    prev_sample: Tensor,
    table: Tensor,
    step: Tensor,
    with_x0: bool = False,
) -> Step:
    """Scores a stored x'; log_prob, mean and x0 are differentiable in velocity."""
    check_transforms("log_prob", velocity)
    constants = (1.0, latents, prev_sample, table, step)
    differentiable = torch.is_grad_enabled() and velocity.requires_grad
    return Step(
        prev_sample, *score_and_mean(velocity, None, False, with_x0, constants, differentiable)
    )
