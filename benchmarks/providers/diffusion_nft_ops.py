"""DiffusionNFT's loss, op for op: the baseline of the fused nft_loss.

The micro-step of its training script (arXiv 2509.16117, released with the paper): both implicit
predictions, both x0 predictions, the normalisers from float64 differences (which makes the quotient
float64, too), the squared velocity distance to the reference, and the metrics that the script
keeps. Nothing is fused, cached or left out, and nothing is added.
"""

from __future__ import annotations

import torch
from torch import Tensor


def normalised(x0_prediction: Tensor, x0: Tensor) -> Tensor:
    """Squared error of each row [B] over its mean magnitude, which has no gradient."""
    dims = tuple(range(1, x0.ndim))
    with torch.no_grad():
        magnitude = torch.abs(x0_prediction.double() - x0.double())
        factor = magnitude.mean(dim=dims, keepdim=True).clip(min=1e-5)
    return ((x0_prediction - x0) ** 2 / factor).mean(dim=dims)


def micro_step(
    velocity: Tensor,
    sample: Tensor,
    x0: Tensor,
    old_velocity: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    ref_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    beta: float = 1.0,
    adv_clip: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss, metrics) of one micro-step; backward is the caller's."""
    dims = tuple(range(1, x0.ndim))
    t = sigma.view(-1, *([1] * (x0.ndim - 1)))
    advantages = torch.clamp(advantages, -adv_clip, adv_clip)
    r = torch.clamp((advantages / adv_clip) / 2.0 + 0.5, 0, 1)
    deviation = (velocity - old_velocity) ** 2
    metrics = {
        "x0_norm": torch.mean(x0**2).detach(),
        "x0_norm_max": torch.max(x0**2).detach(),
        "old_deviate": torch.mean(deviation).detach(),
        "old_deviate_max": torch.max((velocity - old_velocity) ** 2).detach(),
    }
    positive = beta * velocity + (1 - beta) * old_velocity.detach()
    negative = (1.0 + beta) * old_velocity.detach() - beta * velocity
    positive_loss = normalised(sample - t * positive, x0)
    negative_loss = normalised(sample - t * negative, x0)
    unweighted = r * positive_loss / beta + (1.0 - r) * negative_loss / beta
    loss = (unweighted * adv_clip).mean()
    metrics["policy_loss"] = loss.detach()
    metrics["unweighted_policy_loss"] = unweighted.mean().detach()
    if ref_velocity is not None:
        kl = torch.mean(((velocity - ref_velocity) ** 2).mean(dim=dims))
        loss = loss + kl_weight * kl
        metrics["kl_div"] = torch.mean(((velocity - ref_velocity) ** 2).mean(dim=dims)).detach()
        old_kl = ((old_velocity - ref_velocity) ** 2).mean(dim=dims)
        metrics["old_kl_div"] = torch.mean(old_kl).detach()
    metrics["total_loss"] = loss.detach()
    return loss, metrics
