"""Qwen-Image's classifier-free guidance."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm


def guide(conditional: Tensor, uncond: Tensor, guidance_scale: float) -> Tensor:
    """Combine velocities [B, N, C] and rescale each token to the conditional's norm, in float32:

        v = u + s (c - u),    v |c| / |v|

    as the pipeline does with `true_cfg_scale`. Differentiable in both.
    """
    conditional, uncond = conditional.float(), uncond.float()
    combined = uncond + guidance_scale * (conditional - uncond)
    conditional_norm = vector_norm(conditional, dim=-1, keepdim=True)
    return combined * (conditional_norm / vector_norm(combined, dim=-1, keepdim=True))
