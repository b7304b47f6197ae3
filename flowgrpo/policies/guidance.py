"""Classifier-free guidance: both velocities from one forward, and what they make together."""

from __future__ import annotations

import torch
from torch import Tensor

from flowgrpo.policies.base import Policy
from flowgrpo.records import Conditioning


def velocities(
    policy: Policy,
    sample: Tensor,
    sigma: Tensor,
    conditioning: Conditioning,
    uncond: Conditioning | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The conditional and, with `uncond`, the unconditional velocity, from one batch of 2B rows."""
    if uncond is None:
        return policy.velocity(sample, sigma, conditioning), None
    both = policy.velocity(
        torch.cat([sample, sample]),
        torch.cat([sigma, sigma]),
        uncond.expand(sample.shape[0]).then(conditioning),
        **({} if policy.parts is None else {"halves": 2}),
    )
    unconditional, conditional = both.chunk(2)
    return conditional, unconditional


def guide(conditional: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """The velocity that a step is made by."""
    if uncond is None:
        return conditional
    # In float32 and in the order of the kernels: GRPO-Guard compares it bit for bit.
    uncond = uncond.float()
    return uncond + (conditional.float() - uncond) * guidance_scale
