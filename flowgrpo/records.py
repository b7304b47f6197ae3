"""The records that the stages hand on.

Shapes:

    K        prompts of an iteration
    G        samples of a prompt, a group
    B        K G rows; row k G + g is sample g of prompt k
    b        rows of a chunk
    M        samples of a micro-step
    T        sampling steps
    L        noise levels that a result is looked at
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
    level        noise level that a result is noised to anew, see objectives/matching.py
    window       the consecutive steps of a row that are stochastic and trained
    rollout      sampling of all rows of an iteration; chunk by chunk
    update       the optimizer steps of an iteration; micro-step by micro-step
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from flowgrpo_kernels import Transitions


def without_nulls(value: Any) -> Any:
    """Copy a JSON value without the keys whose value is null or NaN, at any depth.

    Tables give every row every key, so `datasets` and others write null where a key was absent, and
    pandas NaN. Items of a list stay, as their positions have a meaning.
    """
    if isinstance(value, dict):
        return {
            key: without_nulls(item)
            for key, item in value.items()
            # NaN alone is not equal to itself.
            if item is not None and not (isinstance(item, float) and item != item)
        }
    if isinstance(value, list):
        return [without_nulls(item) for item in value]
    return value


@dataclass(frozen=True)
class Prompts:
    """Texts and, for the rewards, their metadata."""

    texts: tuple[str, ...]
    """K prompts."""
    metadata: tuple[dict[str, Any], ...]
    """K dicts for the rewards. What was null is absent, see `without_nulls`."""
    indices: Tensor
    """int64 [K]: the number of each prompt in its prompt set."""
    images: tuple[str | None, ...] | None = None
    """K paths of the images that a model edits, None for a prompt without one; None: no prompt has
    one."""

    @classmethod
    def of(
        cls,
        texts: Sequence[str],
        metadata: Sequence[dict[str, Any]] | None = None,
        images: Sequence[str | None] = (),
    ) -> Prompts:
        """Build a prompt set; without metadata every prompt gets an empty dict, and without
        `images` there are none to edit."""
        if metadata is None:
            metadata = [{} for _ in texts]
        if len(metadata) != len(texts):
            raise ValueError(
                f"metadata has {len(metadata)} entries for {len(texts)} texts, but one for each "
                "text is expected."
            )
        entries = tuple(without_nulls(entry) for entry in metadata)
        paths = tuple(images) if any(images) else None
        if paths is not None and len(paths) != len(texts):
            raise ValueError(
                f"images has {len(paths)} entries for {len(texts)} texts, but one for each text is "
                "expected."
            )
        return cls(tuple(texts), entries, torch.arange(len(texts)), paths)

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, index: Sequence[int]) -> Prompts:
        """Choose prompts by their position here, in the order of `index`."""
        index = [int(i) for i in index]
        return Prompts(
            tuple(self.texts[i] for i in index),
            tuple(self.metadata[i] for i in index),
            self.indices[index],
            None if self.images is None else tuple(self.images[i] for i in index),
        )


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of N prompts, in the transformer's dtype.

    `Policy.prepare` adds `table`: what a transformer makes of prompt and time alone. `at` takes the
    values of one step from it, which the forward then looks up instead of computing them.
    """

    embeds: Tensor
    """[N, L, D]: one vector a token; with a table, in the width of the transformer's blocks."""
    pooled: Tensor
    """[N, P]: one vector a prompt; of models that mask padding, 1 for each token of the text, else
    0."""
    table: Tensor | None = None
    """[T, N, M]: all modulations (policies/modulation.py) of each of T steps."""
    modulation: Tensor | None = None
    """[N, M]: those of the step that a row is at."""
    reference: Tensor | None = None
    """[N, R, C]: packed latents of the images that a model edits, R tokens each; None of a model
    that makes images of texts alone."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    @property
    def prepared(self) -> bool:
        """True: embeds are projected and modulations are here."""
        return self.table is not None or self.modulation is not None

    def to(self, device: torch.device) -> Conditioning:
        """Copy to `device`, where it is not there."""
        return self._each(lambda tensor, dim: tensor.to(device))

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M]."""
        return self._each(lambda tensor, dim: tensor[(slice(None),) * dim + (index,)])

    def at(self, step: int) -> Conditioning:
        """Take the modulations of the step number `step`, for all prompts."""
        if self.table is None:
            return self
        return replace(self, table=None, modulation=self.table[step])

    def rows_at(self, index: Tensor, steps: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M], each at its own step, int64 [M]."""
        if self.table is None:
            return self.rows(index)
        modulation = self.table[steps, index]
        return replace(replace(self, table=None).rows(index), modulation=modulation)

    def repeat_interleave(self, count: int) -> Conditioning:
        """Each prompt `count` times in succession."""
        return self._each(lambda tensor, dim: tensor.repeat_interleave(count, dim=dim))

    def expand(self, count: int) -> Conditioning:
        """A single prompt as `count` rows."""
        return self._each(
            lambda tensor, dim: tensor.expand(*[-1] * dim, count, *[-1] * (tensor.dim() - dim - 1))
        )

    def then(self, other: Conditioning) -> Conditioning:
        """These prompts, then those of `other`.

        Raises:
            ValueError: one of them is prepared, or has reference latents, and the other is not.
        """
        return self._each(lambda a, b, dim: torch.cat([a, b], dim=dim), other)

    def with_reference_of(self, other: Conditioning) -> Conditioning:
        """These rows beside the reference latents of as many rows `other`, if these have any."""
        return self if other.reference is None else replace(self, reference=other.reference)

    def _each(self, change: Callable[..., Tensor], *others: Conditioning) -> Conditioning:
        """Apply change(tensor, those of the others, dimension of the prompts) to each tensor."""
        changed: dict[str, Tensor] = {}
        for name in (f.name for f in fields(self)):
            tensors = [getattr(conditioning, name) for conditioning in (self, *others)]
            absent = [tensor is None for tensor in tensors]
            if any(absent) != all(absent):
                raise ValueError(
                    f"other: {name} is there in one of both alone; they must be prepared alike "
                    "(Policy.prepare), and both encoded with images or without"
                )
            if not any(absent):
                # A table has the steps in front of the prompts.
                changed[name] = change(*tensors, 1 if name == "table" else 0)
        return Conditioning(**changed)


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
    """[T, B, C, H, W]: velocities of the steps, after guidance; for a loss that compares them."""


@dataclass(frozen=True)
class Draws:
    """Noise levels and noise of the results of an iteration, L draws each, and what the weights of
    the rollout made of them; see objectives/matching.py."""

    sigmas: Tensor
    """float32 [L, B]."""
    seeds: Tensor
    """int64 [L, B]: seeds of the noise."""
    log_probs: Tensor | None = None
    """float32 [L, B]: log_prob at the rollout, for a loss with a ratio."""
    velocities: Tensor | None = None
    """[L, B, C, H, W]: velocities at the rollout, after guidance, for a loss that compares them."""

    def take(self, rows: Tensor) -> Draws:
        """Choose the draws of these rows, int64 [b]."""
        chosen = {
            f.name: value[:, rows.to(value.device)]
            for f in fields(self)
            if (value := getattr(self, f.name)) is not None
        }
        return Draws(**chosen)

    def to(self, device: torch.device) -> Draws:
        """Copy levels and seeds to `device`, where they are not there."""
        return replace(self, sigmas=self.sigmas.to(device), seeds=self.seeds.to(device))


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
    iteration: int = 0
    """Iterations completed before this one: the index of its draws."""
    prompts: Prompts | None = None
    """K prompts with their metadata, for an objective that asks the rewards itself."""
    rows: Tensor | None = None
    """int64 [b]: the rows of the iteration that these are, where they are not all; on the CPU. B
    is b then, here and in the trajectory."""
    draws: Draws | None = None
    """Noise levels of the results, for objectives that re-noise them."""

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
    """[M, C, H, W]: velocity at the rollout, for a loss that compares it."""
    prompts: Prompts | None = None
    """M prompts with their metadata, for a loss that asks the rewards itself."""
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
