"""Sentences that a run shows once, when figures of it ask for one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from flowgrpo.config import Config
from flowgrpo.runs.state import adam_eps

NEAR = 10
"""Gradients whose RMS is less than so many times AdamW's eps are near it: a step is then shorter
by a tenth or more."""
ITERATIONS = 3
"""Iterations in a row whose gradients are near eps, before the run says so."""
NOISY = 1.1
"""Standard deviation of a rollout's latents, as a multiple of the deterministic sampler's, above
which the run says so. The embedded model has 1.05 at noise level 0.7, and 1.18 at 1.0, where a
tenth of its reward is left."""


class Advice:
    """Watches the figures of a run."""

    def __init__(self, config: Config, weights: int) -> None:
        """weights: number of the weights that are trained."""
        self.config, self.weights = config, weights
        self.std: float | None = None
        """Standard deviation of the untrained model's latents by the deterministic sampler."""
        self._near, self._silent = 0, False

    def noise(self, std: float) -> str:
        """Compare the latents of the first rollout, of standard deviation `std`; "" if they are as
        they should be, or nothing is known of the deterministic sampler's."""
        sample = self.config.sample
        if self.std is None or not std > NOISY * self.std:
            return ""
        return (
            f"The latents of the first rollout have a standard deviation of {std:.3g}, which is "
            f"{std / self.std:.2f} times that of the deterministic sampler ({self.std:.3g}), so "
            "noise may be left in the images that are scored; lower sample.noise_level "
            f"({sample.noise_level:g}), or raise sample.steps ({sample.steps})."
        )

    def gradients(self, metrics: Mapping[str, Any]) -> str:
        """Compare the gradients of an iteration with AdamW's eps; "" if there is nothing to say, or
        it was said."""
        optim = self.config.optim
        norms = metrics.get("grad_norm", ())
        norm = max(norms if isinstance(norms, list | tuple) else [norms], default=0.0)
        groups = metrics.get("equal_groups", 0) + metrics.get("dropped_groups", 0)
        if not norm > 0 or groups >= self.config.sample.prompts_per_iteration:
            # Nothing was learned from: that has a sentence of its own.
            return ""
        rms = min(norm, optim.max_grad_norm or math.inf) / math.sqrt(self.weights)
        eps = adam_eps(optim, self.config.policy.adapter == "full")
        self._near = self._near + 1 if rms < NEAR * eps else 0
        if self._near < ITERATIONS or self._silent:
            return ""
        self._silent = True
        return (
            f"The gradients have a root mean square of {rms:.2g} over {self.weights} weights, "
            f"after clipping, near AdamW's eps of {eps:.2g}, which makes the steps of such "
            f"gradients {(rms + eps) / rms:.3g} times shorter; set optim.eps to {rms / 1e4:.0e} or "
            "less."
        )
