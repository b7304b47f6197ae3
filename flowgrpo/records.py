"""The records that the stages hand on.

Shapes:

    K        prompts of an iteration
    G        samples of a prompt, a group
    B        K G rows; row k G + g is sample g of prompt k
    b        rows of a chunk
    M        samples of a micro-step
    T        sampling steps
    W        trained steps of a row
    C H W    a latent; N C where the model works on packed tokens, as FLUX.1 does

Words:

    sigma        noise level in [0, 1]: 1 is noise, 0 is data
    velocity     output of the model
    sample       x_t, an input of the model; prev_sample is x_{t-1}, the next state of the sampler
    latents      the states of a trajectory; the last is the result, which is decoded to an image
    transition   a step of the sampler, or its row of coefficients in the table
    log_prob     log-probability of prev_sample given sample, averaged over the elements
    ratio        exp(log_prob - its value at the rollout)
    reward       rating of an image; `Scores` holds the rewards of an iteration
    advantage    a normalised reward, never called a reward
    window       the consecutive steps of a row that are stochastic and trained
    rollout      sampling of all rows of an iteration; chunk by chunk
    update       the optimizer steps of an iteration; micro-step by micro-step
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
    """Texts and, for the rewards, their metadata."""

    texts: tuple[str, ...]
    """K prompts."""
    metadata: tuple[dict[str, Any], ...]
    """K dicts, handed to the rewards as they are."""
    indices: Tensor
    """int64 [K]: the number of each prompt in its prompt set."""

    @classmethod
    def of(cls, texts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None) -> Prompts:
        """Build a prompt set; without metadata every prompt gets an empty dict."""
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

    def take(self, index: Sequence[int]) -> Prompts:
        """Choose prompts by their position here, in the order of `index`."""
        index = [int(i) for i in index]
        return Prompts(
            tuple(self.texts[i] for i in index),
            tuple(self.metadata[i] for i in index),
            self.indices[index],
        )


@dataclass(frozen=True)
class Trajectory:
    """One rollout: all states of all rows, and which steps of a row are trained."""

    latents: Tensor
    """float32 [T+1, B, C, H, W]: latents[i] is the input of step i, latents[T] the result."""
    log_probs: Tensor
    """float32 [T, B]: log-probability of latents[i+1] given latents[i]; 0 for an ODE step."""
    table_rows: Tensor
    """int64 [W, B]: rows of the transition table for the trained steps."""
    trained_steps: Tensor
    """int64 [W, B]: the same steps as indices i of `latents`."""
    groups: Tensor
    """int64 [B]: the prompt of each row, an index of the K embeddings."""
    seeds: Tensor
    """int64 [B]: seeds of the steps' noise."""
    velocities: Tensor | None = None
    """[T, B, C, H, W]: velocities of the steps, after guidance; for GRPO-Guard only."""


@dataclass(frozen=True)
class Experience:
    """One iteration's trajectory with all that an update learns from it."""

    trajectory: Trajectory
    conditioning: Conditioning
    """Embeddings of the K prompts; `trajectory.groups` says which one belongs to a row."""
    uncond: Conditioning | None
    """Embeddings of the empty prompt, one row; None without guidance."""
    advantages: Tensor
    """float32 [B], by `Objective.weigh`."""
    weights: Tensor
    """float32 [B], by `Objective.weigh`: 0 for the rows of a dropped group; mean 1."""

    def to(self, device: torch.device) -> Experience:
        """Move advantages and weights, which are computed on the CPU, to `device`."""
        moved = {"advantages": self.advantages.to(device), "weights": self.weights.to(device)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Batch:
    """M samples of one micro-step: rows at trained steps, or what else an objective gathers."""

    sample: Tensor
    """float32 [M, C, H, W]: inputs of the model."""
    prev_sample: Tensor
    """float32 [M, C, H, W]: next states of the sampler, or other values that the kernels score."""
    sigma: Tensor
    """float32 [M]: noise levels of `sample`."""
    transitions: Transitions
    """The transition table."""
    table_row: Tensor
    """int64 [M]: rows of the transition table."""
    conditioning: Conditioning
    """M rows."""
    uncond: Conditioning | None
    """M rows; None without guidance."""
    advantages: Tensor
    """float32 [M]."""
    weights: Tensor
    """float32 [M]."""
    old_log_prob: Tensor | None = None
    """float32 [M]: log_prob at the rollout, for a loss with a ratio."""
    old_velocity: Tensor | None = None
    """[M, C, H, W]: velocity at the rollout, for GRPO-Guard only."""
    step_weights: Tensor | None = None
    """float32 [M]: see `schedule.step_weights`."""


@dataclass(frozen=True)
class Scores:
    """Rewards of the images of one iteration."""

    total: Tensor
    """float64 [B]: the weighted sum of `rewards`; NaN in a dropped group."""
    rewards: dict[str, Tensor]
    """Reward name -> float64 [B]; NaN in a group where it failed."""
    dropped: Tensor
    """bool [K]: groups whose reward failed every attempt."""
