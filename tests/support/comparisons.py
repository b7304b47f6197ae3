"""Comparisons whose runs are written by hand: every figure of theirs is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from flowgrpo import files
from flowgrpo.comparison.folder import Folder, Run, plan_runs
from flowgrpo.comparison.studies import Study
from flowgrpo.config import Config, replace

PROMPTS = [("a red circle", "colors"), ("a blue square", "colors"), ("two circle", "counting")]


def recipe(folder: Path, **changes) -> Config:
    """A configuration of 8 images an iteration, evaluated on three prompts with two images each."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": p, "tag": t}) for p, t in PROMPTS))
    base = {
        "recipe": "tiny",
        "policy.device": "cpu",
        "sample.prompts": str(prompts),
        "sample.prompts_per_iteration": 2,
        "sample.group_size": 4,
        "sample.batch_size": 4,
        "reward.weights": {"strict": 1.0, "partial": 1.0},
        "run.eval_prompts": 0,
        "run.eval_samples": 2,
    }
    return replace(Config(), **{**base, **changes})


def study(**changes) -> Study:
    """Two arms, on a budget of 32 images."""
    values = {
        "name": "ranks",
        "recipe": "support.comparisons:unused",
        "arms": {"A": {}, "B": {"policy.lora_rank": 2}},
        "images": 32,
        "evaluations": 2,
    }
    return Study(**{**values, **changes})


def configs(study: Study, base: Config) -> dict[str, Config]:
    """The arms of a study over a base that no recipe returns."""
    return {arm: replace(base, **changes) for arm, changes in study.arms.items()}


def plan(study: Study, base: Config, seeds: Sequence[int], out: Path) -> list[Run]:
    """The runs of all arms, in an opened and released folder."""
    arms = configs(study, base)
    Folder.open(out, study, arms).close()
    return plan_runs(study, arms, seeds, out, threads=1)


def evaluation(iteration: int, seconds: float, images: Sequence[float], **figures) -> dict:
    """A line of metrics.jsonl, with the scores of six images in "images"."""
    return {
        "iteration": iteration,
        "kind": "eval",
        "accuracy": sum(images) / len(images),
        "scores": {"strict": sum(images) / len(images), "partial": figures.pop("partial", 0.5)},
        "quality": figures.pop("quality", {}),
        **figures,
        "seconds": {"evaluate": 1.0, "training": seconds},
        "images": images,
    }


def write_run(run: Run, lines: Sequence[dict], interrupted: bool = False) -> None:
    """A run directory with these evaluations; finished unless `interrupted`."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text("{}")
    text = []
    for line in lines:
        images = torch.tensor(line["images"], dtype=torch.float64)
        step = run.folder / "evaluations" / f"step-{line['iteration']:06d}"
        step.mkdir(parents=True)
        files.write_tensors(step / "images.safetensors", {"per_image": images})
        text.append(json.dumps({name: v for name, v in line.items() if name != "images"}))
    (run.folder / "metrics.jsonl").write_text("\n".join(text) + "\n")
    last = lines[-1]
    summary = {
        "iterations": last["iteration"],
        "images": last["iteration"] * run.config.sample.rows,
        "interrupted": interrupted,
        "device": "cpu (1 threads)",
        "seconds": {"total": 10.0},
        "max_ratio_error": 0.0,
    }
    (run.folder / "summary.json").write_text(json.dumps(summary))
