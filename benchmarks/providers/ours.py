"""This project on one case, through the trainer's functions: setup, collect, decode, update.

The pipeline is handed over in memory with random embeddings for texts; all else is what
`flowgrpo train` runs with the same configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowgrpo import train, update
from flowgrpo.config import Config, replace
from flowgrpo.objectives.advantages import advantages
from flowgrpo.policies import Conditioning
from flowgrpo.policies import device as devices
from flowgrpo.prompts.batches import prompt_batch
from flowgrpo.records import Experience, Trajectory
from flowgrpo.rewards.background import BackgroundScoring
from models import random_weights
from models.cases import Case
from models.configurations import Model

# A deviation of the ratio is recorded here; the trainer would stop.
ANY_DEVIATION = 1e9


def brightness(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
    """A light reward: the mean of an image's values."""
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
        "reward.weights": {"providers.ours:brightness": 1.0},
        "optim.beta": case.beta,
        "optim.updates_per_iteration": 1,
        "optim.ratio_tolerance": ANY_DEVIATION,
    }
    if case.model.frames:
        _, height, width = case.model.latent
        size = {"height": 16 * height, "width": 16 * width, "frames": case.model.frames}
        values |= {f"policy.{name}": value for name, value in size.items()}
    elif case.model.name != "nano":
        values["policy.resolution"] = 8 * case.model.latent[1]
    if case.model.family != "sd3":
        values["policy.max_sequence_length"] = case.model.text_tokens
    if device == "meta":
        # A GPU's defaults; and one thread, since on_meta.py counts in the thread that enters it.
        kernel = "native_efficient" if case.model.masked else "native_flash"
        values |= {"policy.dtype": "bfloat16", "policy.attention": kernel}
        values["sample.overlap"] = 0
    return replace(Config(), **{**values, **changes})


def model_in_memory(model: Model, device: str, dtype: str, whole: bool) -> dict[str, Any]:
    """Arguments of `train.setup` in place of files: a random pipeline, and embeddings for texts.

    whole: with the real text encoders on the device.
    """
    if model.name == "nano":
        return {}
    on = devices.choose_device(device)
    kind = devices.choose_dtype(dtype, on)

    def encode(texts: Sequence[str]) -> Conditioning:
        seed = random_weights.EMPTY_PROMPT if list(texts) == [""] else random_weights.PROMPTS
        return Conditioning(*random_weights.conditioning(model, len(texts), str(on), kind, seed))

    return {"pipeline": random_weights.pipeline(model, str(on), kind, whole), "encode": encode}


class Ours:
    """The trainer on one case, with the methods that the suites time."""

    def __init__(self, case: Case, device: str, whole: bool = False, **changes: Any) -> None:
        self.case, self.config = case, config(case, device, **changes)
        model = model_in_memory(case.model, device, self.config.policy.dtype, whole)
        self.components = train.setup(self.config, **model)
        self.prompts = prompt_batch(self.components.prompts, self.config, 0)
        self.conditioning = self.components.policy.encode(self.prompts.texts)

    def rollout(self) -> Trajectory:
        """The latents of all steps of all rows."""
        return train.collect(self.components, self.conditioning, self.config)

    def decode(self, trajectory: Trajectory) -> Tensor:
        """uint8 images [B, 3, H, W] of the last latents."""
        chunks = trajectory.latents[-1].split(self.case.batch)
        return torch.cat([self.components.policy.decode(latents) for latents in chunks])

    def update(self, trajectory: Trajectory) -> float:
        """One optimizer step; the largest |ratio - 1| in it."""
        return self._update(trajectory, torch.linspace(-1, 1, self.case.rows), None)

    def _update(self, trajectory: Trajectory, advantages: Tensor, weights: Tensor | None) -> float:
        weights = torch.ones(self.case.rows) if weights is None else weights
        components = self.components
        experience = Experience(
            trajectory, self.conditioning, components.uncond, advantages, weights
        )
        experience = experience.to(components.policy.device)
        schedule, state = components.schedule, components.state
        metrics = update.update(schedule, state, components.micro_step, experience, self.config)
        return metrics["max_ratio_error"]

    def iteration(self) -> float:
        """The body of the trainer's loop; the largest |ratio - 1| before its update."""
        components = self.components
        scoring = BackgroundScoring(
            components.scorer, self.prompts, self.case.group_size, components.reward_thread
        )
        trajectory = train.collect(components, self.conditioning, self.config, scoring)
        scores = scoring.finish()
        rewards = scores.total.view(-1, self.case.group_size)
        error = self._update(trajectory, *advantages(rewards, self.config.optim))
        components.state.iteration += 1
        return error
