"""Figures of docs/small-cards.md: those of the records and of the plan."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from experiments import quantized
from flowgrpo import plan
from flowgrpo.config import replace
from flowgrpo.recipes import RECIPES, recipe
from models import configurations
from reporting import records

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "small-cards.md").read_text(encoding="utf-8")


def table(head: str) -> list[list[str]]:
    """Cells of the rows below the line that begins with `head`."""
    _, body = PAGE.split(f"\n{head}", 1)
    lines = body.split("\n\n", 1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_velocities_are_those_of_the_record():
    rows = records.read(quantized.OUT)["rows"]
    found = {(r["case"], r["metric"], r["provider"]): r["value"] for r in rows}
    order = ("bfloat16", "int8", "fp8", "nf4")
    shown = {(case, "velocity"): cells for case, *cells in table("| | bfloat16 | int8 | fp8")}
    assert len(shown) >= 2
    for (case, metric), cells in shown.items():
        values = [found[case, metric, name] for name in order]
        assert cells == [f"{100 * value:.1f} %" for value in values], case


def test_accuracies_are_those_of_the_records():
    names = {"float32": "none"}
    for weights, accuracy, interval in table("| weights | strict"):
        name = names.get(weights, weights)
        path = quantized.OUT.parent / f"nano-{name}.json"
        (system,) = json.loads(path.read_text())["systems"]
        score = system["task"]["scores"]["nano_strict"]
        assert accuracy == f"{100 * score['mean']:.1f}" and system["task"]["images"] == 480
        assert interval == " to ".join(f"{100 * bound:.1f}" for bound in score["interval"])


def test_counts_are_those_of_the_record():
    rows = records.read(quantized.OUT.with_name("counted-meta.json"))["rows"]
    found = {(r["case"], r["provider"], r["metric"]): r["value"] for r in rows}
    names = {
        "SD3.5-M, 9 rows with guidance and KL": "sd3.5-m t2 b9 cfg w1 kl",
        "FLUX.1-dev, 4 rows": "flux.1-dev t2 b4 no-cfg w1 no-kl",
    }
    shown = table("| | bfloat16 | int8 | nf4 |")
    assert [cells[0] for cells in shown] == list(names)
    for head, *cells in shown:
        values = [
            [
                found[names[head], f"ours-{name}", f"counted_{metric}"]
                for metric in ("weights", "memory")
            ]
            for name in ("recomputed", "int8", "nf4")
        ]
        assert cells == [f"{weights:.1f}, {most:.1f}" for weights, most in values]
    # No micro-step waits for the device, whatever unpacks its weights.
    assert all(r["value"] == 0 for r in rows if r["metric"] == "update_waits")


def test_recipes_are_as_the_plan_and_the_count_have_them():
    rows = table("| recipe |")
    record = records.read(quantized.OUT.with_name("counted-cards.json"))["rows"]
    counted = {(r["case"], r["metric"]): r["value"] for r in record}
    assert {row[0].strip("`") for row in rows} == {n for n in RECIPES if n.endswith("gb")}
    for name, *cells in rows:
        config = recipe(name.strip("`"))
        memory = plan.expected_memory(config, plan.sizes_of(config.policy.model))
        policy = config.policy
        expected = [policy.quantize, policy.quantize_text, str(config.sample.batch_size)]
        expected += [f"{memory['total']:.1f}", f"{memory['total'] + memory['rollout']:.1f}"]
        assert counted[config.recipe, "planned"] == pytest.approx(memory["total"], rel=1e-4)
        assert 0.95 < memory["total"] / counted[config.recipe, "total"] < 1.10
        pool = counted[config.recipe, "with_pool"]
        assert pool < (22 if name.endswith("24gb`") else 11)
        assert cells == [*expected, f"{pool:.1f}"], name


def test_steps_to_a_small_card_are_the_plans():
    config, fields = recipe("sd35m_ocr_1gpu", memory=80.0), {"sample.batch_size": 4}
    steps = (
        {"policy.vae_slicing": False},
        {"policy.gradient_checkpointing": True, "policy.vae_slicing": True},
        {"policy.quantize_text": "int8"},
        {"policy.quantize": "int8"},
        {"policy.quantize": "nf4", "policy.quantize_text": "nf4"},
    )
    for cells, step in zip(table("| | weights"), steps, strict=True):
        fields |= step
        changed = replace(config, **fields)
        memory = plan.expected_memory(changed, plan.sizes_of(config.policy.model))
        names = ("weights", "update", "encode", "total")
        assert cells[1:] == [f"{memory[name]:.1f}" for name in names], cells[0]


@pytest.mark.slow
def test_the_program_on_a_tiny_model():
    """Errors are in the order of the steps; the case says how deep the model is."""
    rows = quantized.rows_of(configurations.TINY_SD3, 2)
    found = {r["provider"]: r["value"] for r in rows if r["metric"] == "velocity"}
    assert 0 < found["int8"] < found["fp8"] < found["nf4"] < 1
    assert {row["case"] for row in rows} == {"tiny-sd3, 2 blocks"}
    assert re.fullmatch(r"bfloat16|nf4|int8|fp8", rows[0]["provider"]) and torch.is_grad_enabled()
