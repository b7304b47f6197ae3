"""Fused SDE step, log-probability and losses (GRPO, NFT) for flow-matching models.

    transitions = flow_sde(sigmas, noise_level=0.7).to(device)
    x = initial_noise(seeds, (16, 64, 64))
    x, lp = sde_step(velocity, x, transitions, step, seeds=seeds)
    out = grpo_loss(velocity, x_t, x_next, lp, advantages, transitions, step)
    out.loss.backward()

The mathematics is in transitions.py, the numerical contract of all backends in reference.py.
Parts of transformer blocks are in `blocks`, diffusers' blocks made of them in `layers`, drop-ins
for other trainers in `compat`.
"""

import importlib

from .backends.compiled import warm_up
from .backends.info import backend_info
from .grpo_loss import GrpoLoss, grpo_loss
from .log_prob import log_prob
from .nft_loss import NftLoss, nft_loss
from .noise import initial_noise
from .sde_step import sde_step
from .transition_rows import transition_rows
from .transitions import Transitions, cps, dance_sde, flow_sde, matching, ode, window

__all__ = [
    "GrpoLoss",
    "NftLoss",
    "Transitions",
    "backend_info",
    "blocks",
    "compat",
    "cps",
    "dance_sde",
    "flow_sde",
    "grpo_loss",
    "initial_noise",
    "layers",
    "log_prob",
    "matching",
    "nft_loss",
    "ode",
    "sde_step",
    "transition_rows",
    "warm_up",
    "window",
]


def __getattr__(name: str):
    # Imported when first asked for; a copy from the Hub has no name to import them by.
    if name in ("blocks", "compat", "layers"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
