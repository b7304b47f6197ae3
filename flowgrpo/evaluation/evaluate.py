"""Evaluation: fixed prompts and seeds -> images -> every reward -> table and picture.

Images come from the deterministic sampler at `sample.eval_steps` steps (40): training's few steps
are a means and not the measure. Prompts and seeds are the same for every run, checkpoint and
guidance, so that pictures and figures compare row by row.

*accuracy* is the mean of the first reported reward: over images within a task, then over tasks with
equal weight, as GenEval's overall score. Its 95 % interval is a percentile bootstrap over prompts,
drawn within the tasks (2000 draws, fixed seed); images of one prompt stay together. The other
rewards have theirs; a task's reward that rises while they fall is being hacked. *quality* holds
what no reward asks for and reward hacking would spoil: the prompt set's own figures, and diversity,
the mean root-mean-square pixel distance between two images of one prompt entry, in [0, 1].
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowgrpo import files, rewards, seeds
from flowgrpo.config import Config
from flowgrpo.evaluation import pictures
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap, diversity, task_means
from flowgrpo.policies import Policy
from flowgrpo.prompts.load import load_prompts
from flowgrpo.records import Prompts
from flowgrpo.sampling.rollout import sample_images

Quality = Callable[[Tensor, list[dict[str, Any]]], Mapping[str, float]]
OnProgress = Callable[[str, int], None]
"""Told how far an evaluation is: f("sampling", images there), then f("scoring", all of them)."""

QUALITY = {"nano": "flowgrpo.nano.verify:quality"}
"""Prompt set -> "module:function" of its quality figures, f(images, metadata) -> name -> number."""

SHOWN = 12
"""Prompts of an evaluation that its pictures show."""


@dataclass(frozen=True)
class EvaluationSet:
    """What is evaluated: prompts that training never sees, each with its seeds."""

    prompts: Prompts
    """N entries; a task with few prompts repeats them with other seeds."""
    seeds: Tensor
    """int64 [N * samples]: image n * samples + s is sample s of prompt n."""
    samples: int
    """Images for each entry."""

    @property
    def tags(self) -> list[str]:
        """The task of each entry ("" where the prompt set has no tasks)."""
        return [str(entry.get("tag") or "") for entry in self.prompts.metadata]


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    accuracy: float
    interval: tuple[float, float]
    """95 % interval of the accuracy."""
    tasks: dict[str, float]
    """The first reward's mean for each task; empty without tasks."""
    scores: dict[str, float]
    """Mean of every reported reward, over tasks as the accuracy is."""
    quality: dict[str, float]
    """What no reward asks for, diversity among it."""
    prompts: int
    images: int
    steps: int
    guidance_scale: float
    seconds: float
    per_image: Tensor = field(repr=False)
    """float64 [N * samples]: the first reward, NaN where it failed."""
    shown: Tensor = field(repr=False)
    """uint8 [S, 3, H, W]: the first image of the first S prompts."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of every score."""
    parts: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """float64 [N * samples] for every reward; not saved."""

    def to_dict(self) -> dict[str, Any]:
        """What report.json, metrics.jsonl and summary.json hold: all but images and seconds."""
        names = ("accuracy", "interval", "tasks", "scores", "quality")
        counts = ("prompts", "images", "steps", "guidance_scale")
        found = {name: getattr(self, name) for name in (*names, *counts)}
        intervals = {name: list(bounds) for name, bounds in self.intervals.items()}
        return {**found, "interval": list(self.interval), "intervals": intervals}

    @property
    def label(self) -> str:
        """What the accuracy is called: the first reward's name if it is not right or wrong."""
        scores = self.per_image[self.per_image.isfinite()]
        share = bool(((scores == 0) | (scores == 1)).all())
        return "accuracy" if share else next(iter(self.scores))

    @property
    def marks(self) -> list[float]:
        """The first reward of the images in `shown`."""
        samples = len(self.per_image) // self.prompts
        return self.per_image[::samples][: len(self.shown)].tolist()

    def save(self, folder: Path) -> None:
        """Write what `Report.load` reads: report.json and images.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"seconds": self.seconds, **self.to_dict()}
        files.write_tensors(
            folder / "images.safetensors", {"shown": self.shown, "per_image": self.per_image}
        )
        files.write_text(folder / "report.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """The report that `save` wrote."""
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tensors = files.read_tensors(folder / "images.safetensors")
        values["interval"] = tuple(values["interval"])
        values["intervals"] = {n: tuple(b) for n, b in values.get("intervals", {}).items()}
        return cls(**values, **tensors)


def evaluation_set(config: Config, split: str = "heldout") -> EvaluationSet:
    """The prompts and seeds that `config` evaluates: `run.eval_prompts` of the set's split.

    The tasks take turns, so each has the same number of entries.
    """
    found = select(load_prompts(config.sample.prompts, split), config.run.eval_prompts)
    places, occurrence = found.indices.numpy(), np.zeros(len(found), dtype=np.int64)
    seen: dict[int, int] = {}
    for row, place in enumerate(places.tolist()):
        occurrence[row] = seen.get(place, 0)
        seen[place] = seen.get(place, 0) + 1
    number = occurrence[:, None] * config.run.eval_samples + np.arange(config.run.eval_samples)
    drawn = seeds.sample_seeds(0, seeds.EVALUATION, places[:, None], number)
    return EvaluationSet(found, torch.from_numpy(drawn.reshape(-1)), config.run.eval_samples)


def select(found: Prompts, count: int) -> Prompts:
    """`count` entries of a prompt set, its tasks in turn; 0, or too many without tasks: all.

    A task's prompts are taken at even distances, and again from the front when they are used up.
    """
    if count == 0:
        return found
    tasks: dict[str, list[int]] = {}
    for place, entry in enumerate(found.metadata):
        tasks.setdefault(str(entry.get("tag") or ""), []).append(place)
    count = min(count, len(found)) if len(tasks) == 1 else count
    chosen = []
    for number in range(count):
        own = list(tasks.values())[number % len(tasks)]
        turn, share = number // len(tasks), -(-count // len(tasks))
        stride = max(len(own) // share, 1)
        chosen.append(own[(turn * stride) % len(own)])
    return found.take(chosen)


def quality_of(prompt_set: str) -> Quality | None:
    """The quality figures that belong to a prompt set, or None."""
    if prompt_set not in QUALITY:
        return None
    module, _, function = QUALITY[prompt_set].partition(":")
    return getattr(importlib.import_module(module), function)


def tolerances_of(prompt_set: str) -> dict[str, float]:
    """Quality figure -> largest allowed change (above 0: rise, below 0: fall), from `TOLERANCES` of
    the module that computes the figures; empty if it states none."""
    if prompt_set not in QUALITY:
        return {}
    module = importlib.import_module(QUALITY[prompt_set].partition(":")[0])
    return dict(getattr(module, "TOLERANCES", {}))


def evaluate(
    policy: Policy,
    held: EvaluationSet,
    scorer: rewards.Scorer,
    *,
    steps: int,
    batch_size: int,
    guidance_scale: float = 1.0,
    quality: Quality | None = None,
    on_progress: OnProgress | None = None,
) -> Evaluation:
    """Sample and score the held-out prompts with the policy's present weights.

    Args:
        scorer: rewards that are reported; the first is the accuracy, and weights play no part.
        steps: steps of the deterministic sampler.
        batch_size: rows of one forward (2 x rows with guidance).
        quality: further figures of all images, see `quality_of`.
        on_progress: called as it goes, for example a `display.EvaluationProgress`.
    """
    started = time.perf_counter()
    images = generate_images(
        policy,
        held.prompts.texts,
        held.seeds,
        held.samples,
        steps=steps,
        batch_size=batch_size,
        guidance_scale=guidance_scale,
        on_progress=on_progress,
    )
    if on_progress is not None:
        on_progress("scoring", len(images))
    parts = scorer(images, held.prompts, held.samples).rewards
    per_prompt = {
        name: values.view(len(held.prompts), held.samples).mean(dim=1).numpy()
        for name, values in parts.items()
    }
    first = next(iter(per_prompt))
    intervals = {
        name: bootstrap(values, held.tags, held.prompts.indices)
        for name, values in per_prompt.items()
    }
    metadata = [entry for entry in held.prompts.metadata for _ in range(held.samples)]
    figures = {"diversity": diversity(images, held.samples)} if held.samples > 1 else {}
    figures |= dict(quality(images.cpu(), metadata)) if quality else {}
    shown = images[:: held.samples][:SHOWN].cpu()
    return Evaluation(
        accuracy=balanced_mean(per_prompt[first], held.tags),
        interval=intervals[first],
        tasks=task_means(per_prompt[first], held.tags),
        scores={name: balanced_mean(values, held.tags) for name, values in per_prompt.items()},
        quality={name: float(value) for name, value in figures.items()},
        prompts=len(held.prompts),
        images=len(images),
        steps=steps,
        guidance_scale=guidance_scale,
        seconds=time.perf_counter() - started,
        per_image=parts[first],
        shown=shown,
        intervals=intervals,
        parts=parts,
    )


def generate_images(
    policy: Policy,
    texts: Sequence[str],
    seeds: Tensor,
    samples: int,
    *,
    steps: int,
    batch_size: int,
    guidance_scale: float = 1.0,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """uint8 [N * samples, 3, H, W]: `samples` images of each text, by the deterministic sampler."""
    texts = list(texts)
    conditioning = policy.encode(texts[:batch_size])
    for start in range(batch_size, len(texts), batch_size):
        conditioning = conditioning.then(policy.encode(texts[start : start + batch_size]))

    def finished(count: int) -> None:
        if policy.device.type == "cuda":
            # What is only finished is not there.
            torch.cuda.synchronize(policy.device)
        on_progress("sampling", count)

    return sample_images(
        policy,
        conditioning,
        steps=steps,
        groups=torch.arange(len(texts)).repeat_interleave(samples),
        seeds=seeds,
        batch_size=batch_size,
        uncond=policy.encode([""]) if guidance_scale != 1 else None,
        guidance_scale=guidance_scale,
        on_progress=None if on_progress is None else finished,
    )


def grid(reports: Mapping[str, Evaluation], held: EvaluationSet) -> Image.Image:
    """The images of `reports` (label -> report): the same prompts and seeds, one row each."""
    texts = held.prompts.texts[: len(next(iter(reports.values())).shown)]
    rows = {label: report.shown for label, report in reports.items()}
    marks = {label: report.marks for label, report in reports.items()}
    return pictures.grid(rows, texts, marks)


def picture(reports: Mapping[str, Evaluation], held: EvaluationSet, path: Path) -> Path:
    """Write the `grid` of `reports`."""
    return pictures.save(grid(reports, held), path)
