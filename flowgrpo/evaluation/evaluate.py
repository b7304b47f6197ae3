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

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo import files, rewards
from flowgrpo.distributed.dealing import share_of
from flowgrpo.distributed.world import ALONE, World
from flowgrpo.evaluation.evaluation_set import EvaluationSet
from flowgrpo.evaluation.quality import Quality
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap, diversity, task_means
from flowgrpo.policies import Conditioning, Policy
from flowgrpo.rewards.frames import is_video, spread
from flowgrpo.sampling.rollout import chunks, sample_images

OnProgress = Callable[[str, int], None]
"""Progress of an evaluation: f("sampling", images so far), then f("scoring", all of them)."""

SHOWN = 24
"""Prompts of an evaluation that its pictures show."""
STRIP = 4
"""Frames of a video, at even distances, that stand for it in pictures and in the diversity."""
VIDEOS = 4
"""Prompts of an evaluation whose videos are kept whole."""


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
    """Figures that no reward asks for, diversity among them."""
    prompts: int
    images: int
    steps: int
    guidance_scale: float
    seconds: float
    per_image: Tensor = field(repr=False)
    """float64 [N * samples]: the first reward, NaN where it failed."""
    shown: Tensor = field(repr=False)
    """uint8 [S, 3, H, W]: the first image of the first S prompts; of videos [S, f, 3, H, W], the
    STRIP frames of each that pictures show."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % interval of every score."""
    per_reward: dict[str, Tensor] = field(default_factory=dict, repr=False)
    """Reward -> its scores, float64 [N * samples]; not saved."""
    kl: float | None = None
    """KL to the untrained model, see kl.py; None: not measured."""
    size: tuple[int, int] | None = None
    """Width and height of an image in pixels; None: of an older record, which has none."""
    videos: Tensor | None = field(default=None, repr=False)
    """uint8 [v, F, 3, H, W]: the first video of the first VIDEOS prompts, in the first process; not
    saved."""

    def to_dict(self) -> dict[str, Any]:
        """List what report.json, metrics.jsonl and summary.json hold: all but images, seconds."""
        values = {
            "accuracy": self.accuracy,
            "interval": list(self.interval),
            "tasks": self.tasks,
            "scores": self.scores,
            "quality": self.quality,
            "prompts": self.prompts,
            "images": self.images,
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "intervals": {name: list(bounds) for name, bounds in self.intervals.items()},
        }
        if self.size is not None:
            values["size"] = list(self.size)
        return values if self.kl is None else {**values, "kl": self.kl}

    @property
    def label(self) -> str:
        """Name of the accuracy: the first reward's own if it is not right or wrong."""
        scores = self.per_image[self.per_image.isfinite()]
        right_or_wrong = bool(((scores == 0) | (scores == 1)).all())
        return "accuracy" if right_or_wrong else next(iter(self.scores))

    @property
    def marks(self) -> list[float]:
        """Scores of the images in `shown`, by the first reward."""
        samples = len(self.per_image) // self.prompts
        return self.per_image[::samples][: len(self.shown)].tolist()

    def save(self, folder: Path) -> None:
        """Write report.json and images.safetensors, which `load` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        values = {"seconds": self.seconds, **self.to_dict()}
        files.write_tensors(
            folder / "images.safetensors", {"shown": self.shown, "per_image": self.per_image}
        )
        files.write_text(folder / "report.json", json.dumps(values, indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Evaluation:
        """Read the evaluation that `save` wrote."""
        values = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        tensors = files.read_tensors(folder / "images.safetensors")
        values["interval"] = tuple(values["interval"])
        if "size" in values:
            values["size"] = tuple(values["size"])
        values["intervals"] = {n: tuple(b) for n, b in values.get("intervals", {}).items()}
        return cls(**values, **tensors)


def evaluate(
    policy: Policy,
    evaluation_set: EvaluationSet,
    scorer: rewards.Scorer,
    *,
    steps: int,
    batch_size: int,
    guidance_scale: float = 1.0,
    quality: Quality | None = None,
    on_progress: OnProgress | None = None,
    world: World = ALONE,
) -> Evaluation:
    """Sample and score the held-out prompts with the policy's present weights.

    Several processes sample and score a share each, in whole chunks of `batch_size` images, and
    get the same result. With a sharded model those with a chunk less run as many forwards.

    Args:
        scorer: rewards that are reported; the first is the accuracy, and weights do not count.
        steps: steps of the deterministic sampler.
        batch_size: rows of one forward (2 x rows with guidance).
        quality: further figures of all images, see quality.py.
        on_progress: called with the progress, for example a `display.EvaluationProgress`.
        world: the processes.
    """
    started = time.perf_counter()
    total = len(evaluation_set.seeds)
    share = rows_of(total, batch_size, world)
    # Forwards of a sharded model are those of all processes.
    number = -(-total // batch_size)
    forwards = -(-number // world.size) if policy.sharded else None

    def progress(stage: str, count: int) -> None:
        if on_progress is not None:
            # Those of the other processes come as fast.
            on_progress(stage, min(count * world.size, total))

    with world.together(lockstep=policy.sharded):
        images = generate_images(
            policy,
            evaluation_set.prompts.texts,
            evaluation_set.seeds,
            evaluation_set.samples,
            steps=steps,
            batch_size=batch_size,
            guidance_scale=guidance_scale,
            on_progress=None if on_progress is None else progress,
            rows=share,
            forwards=forwards,
            images=evaluation_set.prompts.images,
        )
    with world.together():
        progress("scoring", len(images))
        scores = score_images(scorer, images, evaluation_set, share, batch_size)
    shares = world.gather((scores, scorer.problems))
    for _, problems in shares:
        scorer.problems = {**problems, **scorer.problems}
    per_reward = {name: torch.cat([share[name] for share, _ in shares]) for name in scores}
    # Raises, in all processes, if a reward failed everywhere.
    scorer.combine(per_reward, evaluation_set.samples)
    parts = world.collect_rows(images)

    def summary() -> Evaluation:
        return summarize(
            torch.cat(parts), per_reward, evaluation_set, steps, guidance_scale, quality, started
        )

    evaluation = world.from_first(summary)
    if policy.frames and world.first:
        # Not sent to the others, which write nothing.
        whole = torch.cat(parts)[:: evaluation_set.samples][:VIDEOS].clone()
        evaluation = replace(evaluation, videos=whole)
    return evaluation


def rows_of(total: int, batch_size: int, world: World) -> range:
    """Find the images, of `total`, that this process samples: a run of whole chunks."""
    return share_of(total, batch_size, world.size, world.rank)


def score_images(
    scorer: rewards.Scorer,
    images: Tensor,
    evaluation_set: EvaluationSet,
    rows: range,
    batch_size: int,
) -> dict[str, Tensor]:
    """Score the images of these rows, chunk by chunk, float64 [len(rows)] by each reward."""
    scored = []
    for chunk in chunks(len(rows), batch_size):
        entries = [row // evaluation_set.samples for row in rows[chunk]]
        counts = {entry: entries.count(entry) for entry in dict.fromkeys(entries)}
        prompts = evaluation_set.prompts.take(list(counts))
        scored.append(scorer.score_each(images[chunk], prompts, list(counts.values())))
    empty = torch.empty(0, dtype=torch.float64)
    return {name: torch.cat([empty, *(s[name] for s in scored)]) for name in scorer.weights}


def summarize(
    images: Tensor,
    per_reward: dict[str, Tensor],
    evaluation_set: EvaluationSet,
    steps: int,
    guidance_scale: float,
    quality: Quality | None,
    started: float,
) -> Evaluation:
    """Compute the figures of an evaluation from all images, or videos, and their scores.

    Args:
        started: time.perf_counter() when it began.
    """
    prompts, samples, tags = evaluation_set.prompts, evaluation_set.samples, evaluation_set.tags
    if is_video(images):
        images = spread(images, STRIP)
    per_prompt = {
        name: scores.view(len(prompts), samples).mean(dim=1).numpy()
        for name, scores in per_reward.items()
    }
    first = next(iter(per_prompt))
    intervals = {
        name: bootstrap(scores, tags, prompts.indices) for name, scores in per_prompt.items()
    }
    metadata = [entry for entry in prompts.metadata for _ in range(samples)]
    figures: dict[str, float] = {}
    if samples > 1:
        figures["diversity"] = diversity(images, samples)
    if quality is not None:
        figures |= quality(images.cpu(), metadata)
    return Evaluation(
        accuracy=balanced_mean(per_prompt[first], tags),
        interval=intervals[first],
        tasks=task_means(per_prompt[first], tags),
        scores={name: balanced_mean(scores, tags) for name, scores in per_prompt.items()},
        quality={name: float(figure) for name, figure in figures.items()},
        prompts=len(prompts),
        images=len(images),
        steps=steps,
        guidance_scale=guidance_scale,
        seconds=time.perf_counter() - started,
        per_image=per_reward[first],
        shown=images[::samples][:SHOWN].cpu(),
        intervals=intervals,
        per_reward=per_reward,
        size=(images.shape[-1], images.shape[-2]),
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
    rows: range | None = None,
    forwards: int | None = None,
    images: Sequence[str | None] | None = None,
) -> Tensor:
    """Sample `samples` images of each of N texts by the deterministic sampler.

    Args:
        rows: those of the N * samples images that are sampled, whole chunks of `batch_size`; None:
            all.
        forwards: chunks that are run, of which those behind the last of `rows` repeat an image, and
            are dropped; None: those of `rows`.
        images: paths of N images, for a model that edits.

    Returns:
        uint8 [N * samples, 3, H, W], of a model of videos [N * samples, F, 3, H, W], or those of
        `rows`.
    """
    total = len(texts) * samples
    rows = range(total) if rows is None else rows
    size = min(batch_size, total)
    repeated = max((forwards or 0) * size - len(rows), 0)
    if not rows and not repeated:
        return torch.empty(0, *policy.image_shape, dtype=torch.uint8)
    sampled = [*rows, *[rows[-1] if rows else 0] * repeated]
    # Embeddings of whole portions of texts, which may give others than their parts.
    first = sampled[0] // samples // batch_size * batch_size
    texts = list(texts)[: sampled[-1] // samples // batch_size * batch_size + batch_size]

    def encode(start: int) -> Conditioning:
        portion = slice(start, start + batch_size)
        edited = None if images is None else images[: len(texts)][portion]
        return policy.encode(texts[portion], images=edited)

    conditioning = encode(first)
    for start in range(first + batch_size, len(texts), batch_size):
        conditioning = conditioning.then(encode(start))

    def count_images(count: int) -> None:
        if policy.device.type == "cuda":
            # Images that are only launched are not there yet.
            torch.cuda.synchronize(policy.device)
        on_progress("sampling", count)

    sampled_images = sample_images(
        policy,
        conditioning,
        steps=steps,
        groups=torch.tensor([row // samples - first for row in sampled]),
        seeds=seeds[torch.tensor(sampled)],
        batch_size=size,
        uncond=policy.encode_empty(guidance_scale),
        guidance_scale=guidance_scale,
        on_progress=None if on_progress is None else count_images,
    )
    return sampled_images[: len(rows)]
