"""1, 2, 3 and 4 ranks write the same run: metrics, weights and pictures, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from flowgrpo.config import Config, replace
from flowgrpo.recipes import recipe
from support import curated_sets, setups
from support.processes import Fork, untimed
from support.ranks import Ranks

SIZES = (1, 2, 3, 4)
SHORT = {
    "run.steps": 2,
    "run.eval_every": 2,
    "run.eval_prompts": 5,
    "run.checkpoint_every": 2,
    "run.rank_timeout": 120.0,
    "sample.eval_steps": 2,
    "sample.steps": 3,
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 4,
    "sample.batch_size": 2,
    "sample.window_size": 2,
    "optim.lr": 1e-2,
    "optim.updates_per_iteration": 1,
    "optim.ema_every": 1,
}
"""4 chunks of 2 rows, two iterations, and an evaluation of 5 images in 3 chunks."""

BRIEF = {"run.steps": 1, "run.eval_every": 1, "run.eval_prompts": 1, "run.eval_samples": 1}
"""One iteration between evaluations of one image, of objectives that keep no more than weights."""

SPANNING = {
    # 10 chunks of 2 rows; the third one of each two groups is of both.
    "sample.prompts_per_iteration": 4,
    "sample.group_size": 5,
    "sample.guidance_scale": 2.0,
    "sample.shared_noise": True,
    "sample.steps": 5,
    "optim.updates_per_iteration": 2,
    "optim.beta": 0.1,
}


def cases(folder: Path, pixel: Path, latent: Path) -> dict[str, tuple[Config, tuple[int, ...]]]:
    """Name -> configuration, and numbers of ranks."""
    curated = curated_sets.save(folder / "set", list(setups.TEXTS), (8, 8))
    of_set = {"sample.curated": str(curated)}
    # Micro-steps of one and of two groups.
    groups = {**BRIEF, "sample.prompts_per_iteration": 4}
    twice = {"optim.updates_per_iteration": 2}
    changes = {
        "sd3": (latent, SPANNING, (1, 3, 4)),
        "no shared prefix, full": (
            pixel,
            {
                **SPANNING,
                "sample.share_prefix": False,
                "policy.adapter": "full",
                "run.reduction": "tree",
                "optim.lr": 1e-3,
            },
            (1, 2),
        ),
        # 28 candidates in 14 chunks of 2; 20 of them are sampled in full.
        "scouts": (pixel, {**SPANNING, "sample.scouts": 7}, (1, 3)),
        "mixture": (pixel, {**BRIEF, **of_set, "optim.sft_weight": 0.5}, (1, 2)),
        "awm": (pixel, {**BRIEF, "optim.objective": "awm"}, (1, 2)),
        "nft": (pixel, {"optim.objective": "nft"}, (1, 2)),
        "dpo": (pixel, {**groups, "optim.objective": "dpo", **twice}, (1, 2)),
        "sft": (pixel, {**groups, "optim.objective": "sft"}, (1, 2)),
        "sft on a set": (pixel, {**BRIEF, **of_set, "optim.objective": "sft"}, (1, 2)),
    }
    made = {
        name: (setups.config(model, folder, **{**SHORT, **values}), sizes)
        for name, (model, values, sizes) in changes.items()
    }
    nano = {"policy.device": "cpu", "run.progress": "none", "run.threads": 1}
    made["nano"] = (replace(recipe("nano"), **{**SHORT, **nano}), (1, 2))
    return made


def run_all(folder: Path, made: dict, size: int) -> None:
    """All cases that are for so many ranks, one after the other in the same processes."""
    from flowgrpo import train

    for name, (config, sizes) in made.items():
        if size in sizes:
            train.run(replace(config, **{"run.out": str(folder / f"{name}-{size}")}))


def content(run: Path) -> dict:
    """Everything in a run that is not a time, by name."""
    items: dict = {"metrics.jsonl": untimed(run / "metrics.jsonl")}
    summary = json.loads((run / "summary.json").read_text())
    items["summary.json"] = {key: value for key, value in summary.items() if key != "seconds"}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.suffix == ".safetensors":
            tensors = load_file(path)
            items |= {f"{name}: {key}": t.numpy().tobytes() for key, t in tensors.items()}
        elif path.suffix == ".png" and path.name != "curve.png":
            items[name] = path.read_bytes()
        elif "tensorboard" not in name:
            items.setdefault(name, "")
    return items


@pytest.mark.slow
def test_any_number_of_ranks_writes_the_same_run(tmp_path, pixel_model, latent_model):
    made = cases(tmp_path, pixel_model, latent_model)
    alone = Fork(tmp_path / "alone.log", run_all, tmp_path, made, 1)
    for size in SIZES[1:]:
        with Ranks(tmp_path / f"logs-{size}", size, run_all, tmp_path, made, size) as ranks:
            outputs = ranks.wait()
        # The others are silent.
        assert outputs[1:] == [""] * (size - 1)
    alone.wait()
    for name, (config, sizes) in made.items():
        expected = content(tmp_path / f"{name}-1")
        lines = [line for line in expected["metrics.jsonl"] if line["kind"] == "train"]
        assert len(lines) == config.run.steps and min(*lines[-1]["grad_norm"], 1) > 0, name
        assert {"samples/before-after.png"} <= expected.keys()
        for size in sizes[1:]:
            found = content(tmp_path / f"{name}-{size}")
            assert found.keys() == expected.keys(), (name, size)
            for item, value in expected.items():
                assert found[item] == value, (name, size, item)
