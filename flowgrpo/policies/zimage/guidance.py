"""Z-Image's classifier-free guidance with its two limits, see policy.cfg_normalization and
policy.cfg_truncation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm


def guide(
    conditional: Tensor,
    uncond: Tensor,
    guidance_scale: float,
    *,
    times: Tensor,
    normalization: float,
    truncation: float,
) -> Tensor:
    """Combine velocities [B, C, H, W] in float32, as the pipeline does with `cfg_normalization` and
    `cfg_truncation`:

        v = c + (s - 1) (c - u)
        v min(1, r |c| / |v|)       r = normalization, if it is above 0; norms of a whole sample
        c                           in place of it, at times above the truncation

    Differentiable in both.

    Args:
        times: float32 [B], 1 - sigma.
    """
    conditional, uncond = conditional.float(), uncond.float()
    guided = conditional + (guidance_scale - 1) * (conditional - uncond)
    if normalization > 0:
        dims = tuple(range(1, conditional.ndim))
        largest = vector_norm(conditional, dim=dims, keepdim=True) * normalization
        norm = vector_norm(guided, dim=dims, keepdim=True)
        guided = torch.where(norm > largest, guided * (largest / norm), guided)
    # As the pipeline compares: the float32 time, and the limit as it was given.
    beyond = times.double() > truncation
    return torch.where(beyond.view(-1, *[1] * (conditional.ndim - 1)), conditional, guided)
