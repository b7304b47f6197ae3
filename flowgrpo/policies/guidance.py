"""Classifier-free guidance: both velocities from one forward, and what they make together.

Of most families the two go to the kernels, which combine them while they read them. Where a model
has a guidance of its own (`Policy.own_guide`), it is computed here, with its gradient, and the
kernels are given its result as a velocity without guidance (`kernel_scale`).
"""

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
    uncond: Conditioning | None,
    guidance_scale: float,
) -> tuple[Tensor, Tensor | None]:
    """The conditional and, with `uncond`, the unconditional velocity, from one batch of 2B rows; of
    a family with a guidance of its own, the guided velocity, float32, and None.

    Raises:
        ValueError: guidance is asked for without `uncond`.
    """
    if uncond is None:
        if guidance_scale != 1:
            raise ValueError(f"guidance_scale={guidance_scale} needs uncond")
        return policy.velocity(sample, sigma, conditioning), None
    both = policy.velocity(
        torch.cat([sample, sample]),
        torch.cat([sigma, sigma]),
        # The image that is edited stands beside the empty prompt too, as in diffusers.
        uncond.expand(sample.shape[0]).with_reference_of(conditioning).then(conditioning),
        **({} if policy.parts is None else {"halves": 2}),
    )
    unconditional, conditional = both.chunk(2)
    if combine := policy.own_guide(sigma):
        return combine(conditional, unconditional, guidance_scale), None
    return conditional, unconditional


def kernel_scale(uncond: Tensor | None, guidance_scale: float) -> float:
    """The scale that the kernels combine the results of `velocities` by: 1 where there is nothing
    to combine."""
    return 1.0 if uncond is None else guidance_scale


def guide(conditional: Tensor, uncond: Tensor | None, guidance_scale: float) -> Tensor:
    """The velocity that a step is made by."""
    if uncond is None:
        return conditional
    # In float32 and in the order of the kernels: GRPO-Guard compares it bit for bit.
    uncond = uncond.float()
    return uncond + (conditional.float() - uncond) * guidance_scale
