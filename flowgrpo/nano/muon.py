"""Muon in float32, with like matrices orthogonalised together.

    M = mu M + G,  O = NewtonSchulz(G + mu M),  W -= lr sqrt(max(1, rows / columns)) O

The update rule of Jordan et al. 2024 and `torch.optim.Muon`, which orthogonalises each matrix by
itself in bfloat16: without bfloat16 in hardware that takes ten times as long as one batched product
in float32.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

# Quintic polynomial whose iterates send all singular values in (0, 1] near 1.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Compute the orthogonal factors, about, of matrices [N, R, C] by Newton-Schulz iterations."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(b * gram, gram, gram, alpha=c) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices; a convolution's kernel is a matrix of its outputs."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update all parameters that have a gradient."""
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault(p.flatten(1).shape, []).append(p)
            for shape, params in alike.items():
                grads = torch.stack([p.grad.flatten(1) for p in params])
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p.flatten(1))
                buffers = [self.state[p]["momentum"] for p in params]
                momenta = torch.stack(buffers).mul_(group["momentum"]).add_(grads)
                torch._foreach_copy_(buffers, list(momenta.unbind()))
                update = orthogonalise(grads.add_(momenta, alpha=group["momentum"]))
                rate = -group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                for p, change in zip(params, update.unbind(), strict=True):
                    p.add_(change.view_as(p), alpha=rate)
