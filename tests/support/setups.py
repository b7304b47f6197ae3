"""Small training set-ups for the tests of the trainer's stages."""

from __future__ import annotations

import copy
from pathlib import Path
from unittest import mock

import torch
from diffusers import DiffusionPipeline

from flowgrpo import train
from flowgrpo import update as updates
from flowgrpo.config import Config, replace
from flowgrpo.policies import lora
from flowgrpo.prompts.batches import prompt_batch
from flowgrpo.records import Experience

TEXTS = (
    "a red circle",
    "a blue circle",
    "a green square",
    "two red triangle",
    "one bright circle",
    "the dark square",
)


def bright(images, prompts, metadata):
    """Brighter images are better."""
    return images.float().mean((1, 2, 3)) / 255


bright.of_pixels = lambda pixels, prompts, metadata: pixels.mean((1, 2, 3)) / 255


def config(model: Path, folder: Path, **changes) -> Config:
    """2 prompts x 6 images in 4 chunks of 3, LoRA on every linear layer of the blocks."""
    prompts = Path(folder) / "prompts.txt"
    prompts.write_text("\n".join(TEXTS))
    base = {
        "recipe": "tiny",
        "policy.model": str(model),
        "policy.device": "cpu",
        "policy.dtype": "float32",
        "policy.lora_rank": 4,
        "policy.lora_alpha": 8,
        "policy.lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.2"),
        "sample.prompts": str(prompts),
        "sample.prompts_per_iteration": 2,
        "sample.group_size": 6,
        "sample.batch_size": 3,
        "sample.steps": 6,
        "sample.window_size": 2,
        "reward.weights": {"support.setups:bright": 1.0},
        "run.out": str(Path(folder) / "run"),
        "run.threads": 1,
        "run.progress": "none",
    }
    return replace(Config(), **{**base, **changes})


LOADED: dict[tuple, DiffusionPipeline] = {}
"""Pipelines by class, files and options; copying one takes a third of reading it."""

_from_pretrained = DiffusionPipeline.from_pretrained.__func__


def _copy(cls, folder, **options):
    """`from_pretrained`, which reads the same files once a process."""
    stamps = {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}
    key = (cls, *sorted(stamps.items()), repr(sorted(options.items())))
    if key not in LOADED:
        LOADED[key] = _from_pretrained(cls, folder, **options)
    return copy.deepcopy(LOADED[key])


def read_once():
    """Let pipelines of the same files be read once a process, inside, and copied then."""
    return mock.patch.object(DiffusionPipeline, "from_pretrained", classmethod(_copy))


def parts(config: Config, spread: float = 0.1) -> train.Components:
    """`train.setup` with trained weights moved away from the base model by `spread`."""
    with read_once():
        made = train.setup(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.state.parameters.values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.add_(spread * noise * (1 if config.policy.adapter == "lora" else 0.1))
    return made


def update(made: train.Components, experience: Experience, config: Config) -> dict:
    """The metrics of one update by `experience`."""
    inputs = (made.schedule, made.state, made.micro_step, experience, config)
    count = len(made.objective.micro_steps(config, config.sample.rows))
    # That of `made` is of other micro-steps where `config` is another.
    same = count == sum(map(len, made.dealing.order))
    return updates.update(*inputs, dealing=made.dealing if same else None)


def experience(made: train.Components, config: Config) -> Experience:
    """One rollout with random rewards."""
    batch = prompt_batch(made.prompts, config, made.state.iteration)
    conditioning = made.policy.encode(batch.texts)
    clock = train.Clock(made.policy.device)
    scouted = train.send_scouts(made, batch, conditioning, config, clock)
    trajectory = train.collect(made, conditioning, config, None, scouted)
    generator = torch.Generator().manual_seed(2)
    shape = (len(batch), config.sample.group_size)
    rewards = torch.randn(shape, generator=generator, dtype=torch.float64)
    gains, weights = made.objective.weigh(rewards, config.optim)
    iteration = made.state.iteration
    return Experience(trajectory, conditioning, made.uncond, gains, weights, iteration, batch)


def double_copies(parts):
    """The transformer in float64 with PEFT's own forward: with adapters on, and off."""
    model = copy.deepcopy(parts.policy.transformer).double()
    for layer in lora.lora_layers(model):
        del layer.forward
    base = copy.deepcopy(model)
    for layer in lora.lora_layers(base):
        layer.enable_adapters(False)
    return model, base
