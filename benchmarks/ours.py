"""This project on one case, through the trainer's own functions: setup, collect, decode, update.

The pipeline is handed over in memory with random embeddings for texts; all else is what
`flowgrpo train` runs with the same configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import models
import on_meta
import torch
from cases import Case
from torch import Tensor

from flowgrpo import train, update
from flowgrpo.advantages import advantages
from flowgrpo.config import Config, replace
from flowgrpo.policies import Conditioning, base
from flowgrpo.prompts.batches import prompt_batch
from flowgrpo.records import Experience, Trajectory
from flowgrpo.rewards.background import BackgroundScoring

# A deviation of the ratio is recorded here; the trainer would stop.
ANY = 1e9


def brightness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A light reward."""
    return images.float().mean((1, 2, 3))


def config(case: Case, device: str, **changes: Any) -> Config:
    """The trainer's configuration of a case."""
    values = {
        "recipe": "benchmark",
        "policy.model": case.model.name,
        "policy.device": device,
        "policy.lora_rank": case.model.rank,
        "policy.lora_alpha": 2 * case.model.rank,
        "policy.lora_targets": case.model.targets,
        "policy.text_cache": "",
        "sample.prompts": "nano",
        "sample.prompts_per_iteration": case.groups,
        "sample.group_size": case.group_size,
        "sample.batch_size": case.batch,
        "sample.steps": case.steps,
        "sample.guidance_scale": case.guidance,
        "sample.window_size": case.window,
        "sample.window_range": (0, case.window) if case.window else None,
        "reward.weights": {"ours:brightness": 1.0},
        "optim.beta": case.beta,
        "optim.updates_per_iteration": 1,
        "optim.ratio_tolerance": ANY,
    }
    if case.model.vae is not None:
        values["policy.resolution"] = 8 * case.model.latent[1]
    if case.model.family == "flux":
        values["policy.max_sequence_length"] = case.model.text_tokens
    if device == on_meta.DEVICE:
        # What a GPU would be given by default; and what is watched is this thread.
        values |= {"policy.dtype": "bfloat16", "policy.attention": "native_flash"}
        values["sample.overlap"] = 0
    return replace(Config(), **{**values, **changes})


def given(model: models.Model, device: str, dtype: str, whole: bool) -> dict[str, Any]:
    """What the trainer is handed in place of files: a random pipeline, and embeddings for texts.

    whole: with the real text encoders on the device.
    """
    if model.name == "nano":
        return {}
    on = base.choose_device(device)
    kind = base.choose_dtype(dtype, on)

    def encode(texts: Sequence[str]) -> Conditioning:
        seed = models.EMPTY_PROMPT if list(texts) == [""] else models.PROMPTS
        return Conditioning(*models.conditioning(model, len(texts), str(on), kind, seed))

    return {"pipeline": models.pipeline(model, str(on), kind, whole), "encode": encode}


class Ours:
    """The trainer on one case."""

    def __init__(self, case: Case, device: str, whole: bool = False, **changes: Any) -> None:
        self.case, self.config = case, config(case, device, **changes)
        made = given(case.model, device, self.config.policy.dtype, whole)
        self.parts = train.setup(self.config, **made)
        self.prompts = prompt_batch(self.parts.prompts, self.config, 0)
        self.conditioning = self.parts.policy.encode(self.prompts.texts)

    def rollout(self) -> Trajectory:
        return train.collect(self.parts, self.conditioning, self.config)

    def decode(self, trajectory: Trajectory) -> Tensor:
        parts = trajectory.latents[-1].split(self.case.batch)
        return torch.cat([self.parts.policy.decode(part) for part in parts])

    def update(self, trajectory: Trajectory) -> float:
        """One optimizer step; the largest |ratio - 1| in it."""
        return self._update(trajectory, torch.linspace(-1, 1, self.case.rows), None)

    def _update(self, trajectory: Trajectory, gains: Tensor, weights: Tensor | None) -> float:
        weights = torch.ones(self.case.rows) if weights is None else weights
        parts = self.parts
        experience = Experience(trajectory, self.conditioning, parts.uncond, gains, weights)
        metrics = update.update(
            parts.schedule,
            parts.state,
            parts.micro_step,
            experience.to(parts.policy.device),
            self.config,
        )
        return metrics["max_ratio_error"]

    def iteration(self) -> float:
        """The body of the trainer's loop; the largest |ratio - 1| before its update."""
        parts = self.parts
        scoring = BackgroundScoring(
            parts.scorer, self.prompts, self.case.group_size, parts.reward_thread
        )
        trajectory = train.collect(parts, self.conditioning, self.config, scoring)
        scores = scoring.finish()
        gains, weights = advantages(scores.total.view(-1, self.case.group_size), self.config.optim)
        error = self._update(trajectory, gains, weights)
        self.parts.state.iteration += 1
        return error
