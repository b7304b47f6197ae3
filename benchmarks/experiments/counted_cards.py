"""Memory of the recipes for small cards, counted tensor by tensor at their own sizes.

    python benchmarks counted-cards    # writes results/quantized/counted-cards.json

An iteration of each recipe's forward geometry runs on the meta device (bench_counted.py), with one
trained step of two, at real size: `counted` is the most bytes alive in it, weights, activations,
gradients and decoding included. What such an iteration does not have comes from the plan: AdamW's
moments, partial sums, the trajectory of all rows, reward models, the CUDA context. `total` is the
sum; `with_pool` adds what a captured rollout keeps beside an update.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import bench_counted
from flowgrpo import plan
from flowgrpo.config import Config
from flowgrpo.recipes import RECIPES, recipe
from measuring import on_meta
from models import configurations
from models.cases import Case
from providers import ours
from reporting import records

MODELS = {
    "stabilityai/stable-diffusion-3.5-medium": configurations.SD35_MEDIUM,
    "black-forest-labs/FLUX.1-dev": configurations.FLUX_DEV,
    "black-forest-labs/FLUX.2-klein-base-4B": configurations.FLUX2_KLEIN_4B,
    "Tongyi-MAI/Z-Image": configurations.Z_IMAGE,
}
FIELDS = ("gradient_checkpointing", "quantize", "vae_slicing")
"""Fields of policy that the forward's memory depends on, beside the case."""
MOMENTS = 8
"""Bytes of AdamW's two moments a trained parameter, which the counted iteration does not have."""


def case_of(config: Config) -> Case:
    """The forward geometry of a recipe."""
    policy, sample = config.policy, config.sample
    model = MODELS[policy.model]
    sides = (policy.resolution // 8,) * 2
    model = dataclasses.replace(model, latent=(model.latent[0], *sides), rank=policy.lora_rank)
    return Case(model, sample.batch_size, 2, sample.guidance_scale, 1, config.optim.beta)


def count(config: Config) -> dict[str, float]:
    """GiB of a recipe, by what they are."""
    changes: dict[str, Any] = {f"policy.{name}": getattr(config.policy, name) for name in FIELDS}
    with on_meta.watching() as watch:
        make = lambda: ours.Ours(case_of(config), on_meta.DEVICE, **changes)  # noqa: E731
        _, weights, most = bench_counted.peak(make, watch)
    planned = plan.expected_memory(config, plan.sizes_of(config.policy.model))
    moments = planned["adapters"] * MOMENTS / plan.BYTES_A_TRAINED
    rest = moments + sum(planned[name] for name in ("sums", "trajectory", "rewards", "overhead"))
    iteration = most / plan.GIB + rest
    # Text encoders come onto the card alone, beside what is always there.
    encoding = weights / plan.GIB + rest + planned["encode"]
    return {
        "counted": most / plan.GIB,
        "total": max(iteration, encoding),
        "with_pool": max(iteration + planned["rollout"], encoding),
        "planned": planned["total"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--recipes", default="", help="names with commas between; default: all")
    path = records.RESULTS / "quantized" / "counted-cards.json"
    parser.add_argument("--out", type=Path, default=path)
    args = parser.parse_args(argv)
    names = [name for name in RECIPES if name.endswith(("_12gb", "_24gb"))]
    names = args.recipes.split(",") if args.recipes else names
    rows = []
    for name in names:
        card = float(name.rpartition("_")[2].removesuffix("gb"))
        values = count(recipe(name, memory=card))
        rows += [records.row("counted-cards", name, "ours", m, v, "GiB") for m, v in values.items()]
        print(f"{name:28}", *(f"{m} {v:.1f}" for m, v in values.items()), flush=True)
    records.write(records.record(rows, "cpu", counted="meta device; nothing ran"), args.out)
    return 0
