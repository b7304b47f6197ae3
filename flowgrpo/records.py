"""What the stages pass on to each other.

Shapes: K prompts of an iteration, G samples a prompt, B = K G rows (row k G + g is sample g of
prompt k), T sampling steps, W trained steps of a row, C H W of a latent (N C where the model works
on packed tokens, as FLUX.1 does).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flowgrpo.policies import Conditioning
    from flowgrpo_kernels import Transitions


@dataclass(frozen=True)
class Prompts:
    """Texts with what their rewards need to know."""

    texts: tuple[str, ...]
    """K prompts."""
    metadata: tuple[dict[str, Any], ...]
    """K dicts, handed to the rewards as they are."""
    indices: Tensor
    """int64 [K]: the place of each prompt in its prompt set."""

    @classmethod
    def of(cls, texts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None) -> Prompts:
        """A prompt set; without metadata every prompt gets an empty dict."""
        if metadata is None:
            metadata = [{} for _ in texts]
        if len(metadata) != len(texts):
            raise ValueError(
                f"metadata has {len(metadata)} entries for {len(texts)} texts, but one for each "
                "text is expected."
            )
        return cls(tuple(texts), tuple(metadata), torch.arange(len(texts)))

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, places: Sequence[int]) -> Prompts:
        """The prompts at `places`, in that order."""
        places = [int(place) for place in places]
        return Prompts(
            tuple(self.texts[i] for i in places),
            tuple(self.metadata[i] for i in places),
            self.indices[places],
        )


@dataclass(frozen=True)
class Trajectory:
    """One rollout: every state of every row, and which steps of a row are trained."""

    latents: Tensor
    """float32 [T+1, B, C, H, W]: latents[i] is what step i was fed, latents[T] the result."""
    log_probs: Tensor
    """float32 [T, B]: log-probability of latents[i+1] given latents[i]; 0 for an ODE step."""
    table_rows: Tensor
    """int64 [W, B]: rows of the transition table for the trained steps."""
    trained_steps: Tensor
    """int64 [W, B]: the same steps as indices i of `latents`."""
    groups: Tensor
    """int64 [B]: the prompt of each row, as a place in the K embeddings."""
    seeds: Tensor
    """int64 [B]: the seeds of the noise."""
    velocities: Tensor | None = None
    """[T, B, C, H, W]: the velocities that made the steps; kept for GRPO-Guard only."""


@dataclass(frozen=True)
class Experience:
    """What an update learns from."""

    trajectory: Trajectory
    conditioning: Conditioning
    """Of the K prompts; `trajectory.groups` says which one belongs to a row."""
    uncond: Conditioning | None
    """Of the empty prompt, one row; None without guidance."""
    advantages: Tensor
    """float32 [B]."""
    weights: Tensor
    """float32 [B]: 0 for the rows of a dropped group; mean 1."""

    def to(self, device: torch.device) -> Experience:
        """The same with advantages and weights, which were made on the CPU, on `device`."""
        moved = {"advantages": self.advantages.to(device), "weights": self.weights.to(device)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """One micro-step: M rows, each at one of its trained steps."""

    sample: Tensor
    """float32 [M, C, H, W]: what the step was fed."""
    prev_sample: Tensor
    """float32 [M, C, H, W]: what came out."""
    sigma: Tensor
    """float32 [M]."""
    transitions: Transitions
    table_row: Tensor
    """int64 [M]: rows of the transition table."""
    conditioning: Conditioning
    """M rows."""
    uncond: Conditioning | None
    """M rows; None without guidance."""
    old_log_prob: Tensor
    """float32 [M]."""
    old_velocity: Tensor | None
    """[M, C, H, W], for GRPO-Guard only."""
    advantages: Tensor
    """float32 [M]."""
    weights: Tensor
    """float32 [M]."""
    step_weights: Tensor
    """float32 [M]: see `schedule.step_weights`."""


@dataclass(frozen=True)
class Scores:
    """Rewards of one batch of images."""

    total: Tensor
    """float64 [B]: the weighted sum of `rewards`; NaN in a dropped group."""
    rewards: dict[str, Tensor]
    """Reward name -> float64 [B]; NaN in a group where it failed."""
    dropped: Tensor
    """bool [K]: groups whose reward failed every attempt."""
