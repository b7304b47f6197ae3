"""Drop-in for `denoise` of UniRL's step strategies (unirl/sde/kernels.py).

    from flowgrpo_kernels.compat import unirl

    unirl.patch(unirl.sde.kernels)        # their module: FlowSDE-, CPSSDE- and DanceSDEStrategy

Same arguments, same results, noise from the same torch generator. What differs:

1. A step without noise (the last step of cps) has log_prob 0 and no gradient; theirs returns minus
   the squared error. With eta < 1e-7 log_prob is None and x' is not rounded, as in theirs.
2. Sigma pairs that do not fall and an eta that is NaN raise on the CPU and give rows of NaN on a
   GPU (FLOWGRPO_DEBUG=1 raises).
3. The coefficients are computed in float64 and rounded once; results agree to float32 rounding.
4. `sample` and `prev_sample` are constants for the gradient; one that requires a gradient raises.
   prev_sample_mean comes from the same pass, differentiable in noise_pred.

seeds= draws the noise from the samples' own seeds; step_index counts it, or the sigma where that is
0. Their ODE and DPM strategies are left as they are.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from ..arguments import integer, number
from .patch import Patch, owners, replacement
from .steps import draw, latents, score, take_step
from .tables import per_row, rows_of_pairs

CLASSES = ("FlowSDEStrategy", "CPSSDEStrategy", "DanceSDEStrategy")
LAWS = {"flow": "flow_sde", "cps": "cps", "dance": "dance_sde"}
# Below it theirs returns no log_prob.
LEAST_ETA = 1e-7


def denoise(
    self,
    noise_pred: Tensor,
    sample: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 1.0,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    sigma_max: float | Tensor = 0.99,
    step_index: int = 0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Steps to (prev_sample, log_prob [B] or None, prev_sample_mean); all float32.

    Args:
        self: one of their three strategies; its canonical_name decides the law.
        sigma, sigma_next: 0-dim or [B] (or [B, 1, ...]), falling within [0, 1].
        sigma_max: stands for sigma in 1 - sigma where sigma is 1.
        seeds: int64 [B], draws the noise from the samples' own seeds in place of the generator.
    """
    law = LAWS.get(getattr(self, "canonical_name", None))
    if law is None:
        raise ValueError(f"self must be a strategy named one of {tuple(LAWS)}")
    sample, noise_pred, prev_sample = latents(
        "prev_sample", sample=sample, noise_pred=noise_pred, prev_sample=prev_sample
    )
    eta = number("eta", eta)
    batch, device = sample.shape[0], sample.device
    pair = [per_row(n, x, device) for n, x in (("sigma", sigma), ("sigma_next", sigma_next))]
    if isinstance(sigma_max, Tensor):
        sigma_max = per_row("sigma_max", sigma_max, device)
    counter = integer("step_index", step_index) or None
    # Only noise that seeds draw is counted.
    counted = {} if seeds is None else {"noise_step": counter}
    table, step = rows_of_pairs("sigma", law, *pair, eta, sigma_max, batch, **counted)
    silent = eta < LEAST_ETA
    if prev_sample is None:
        noise = None if seeds is not None else draw(noise_pred, generator)
        result = take_step(
            noise_pred, sample, table, step, seeds=seeds, noise=noise,
            storage=torch.float32 if silent else None,
        )  # fmt: skip
    else:
        # As theirs, which rounds a given x', too.
        if not silent and prev_sample.dtype != sample.dtype:
            prev_sample = prev_sample.to(sample.dtype)
        result = score(noise_pred, sample, prev_sample, table, step)
    return result.prev_sample.float(), None if silent else result.log_prob, result.mean


def patch(*strategies: type | ModuleType, **options) -> Patch:
    """Replaces denoise in UniRL's strategies; a context manager with revert().

    strategies: their classes, or a module that has the three. ValueError for others.

    options: seeds, fixed for every call.
    """
    name = "denoise"
    entries = []
    for owner in owners(strategies, name):
        classes = [owner]
        if isinstance(owner, ModuleType):
            classes = [
                getattr(owner, n) for n in CLASSES if isinstance(getattr(owner, n, None), type)
            ]
            if not classes:
                raise ValueError(f"{owner.__name__} has none of {CLASSES}")
        for strategy in classes:
            if getattr(strategy, "canonical_name", None) not in LAWS:
                raise ValueError(
                    f"{getattr(strategy, '__name__', strategy)} must be one of {CLASSES}, with a "
                    f"canonical_name of {tuple(LAWS)}"
                )
            entries.append((strategy, name, replacement(strategy, name, denoise, options)))
    return Patch(entries)
