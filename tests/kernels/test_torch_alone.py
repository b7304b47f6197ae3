"""The kernels need torch alone: no numpy, scipy, diffusers or Triton, in a process without them."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowgrpo_kernels

PACKAGE = Path(flowgrpo_kernels.__file__).resolve().parent
# Distributions that the trainer needs, and Triton, which comes with torch's builds for GPUs.
ABSENT = (
    "numpy", "scipy", "diffusers", "transformers", "peft", "accelerate", "safetensors",
    "huggingface_hub", "triton", "flowgrpo",
)  # fmt: skip
SCRIPT = """
import sys


class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in sys.argv[1].split(","):
            raise ModuleNotFoundError(f"No module named {name!r} (blocked)", name=name)


sys.meta_path.insert(0, Blocked())
import torch

import flowgrpo_kernels as fk
import flowgrpo_kernels.blocks as blocks
import flowgrpo_kernels.layers as layers
from flowgrpo_kernels.compat import dance_grpo, flow_factory, flow_grpo, miles, mixgrpo, precise
from flowgrpo_kernels.compat import unirl, verl_omni

assert not [name for name in sys.argv[1].split(",") if name in sys.modules]
transitions = fk.flow_sde([1.0, 0.7, 0.4, 0.0], noise_level=0.7)
seeds = torch.arange(2)
x = fk.initial_noise(seeds, (3, 5))
velocity = torch.linspace(-1, 1, 30).view(2, 3, 5).requires_grad_()
x_next, score = fk.sde_step(velocity.detach(), x, transitions, 1, seeds=seeds)
advantages = torch.tensor([1.0, -1.0])
out = fk.grpo_loss(velocity, x, x_next, score, advantages, transitions, 1)
out.loss.backward()
row = torch.ones(2, 5)
y = blocks.norm_modulate(x, row, row)
assert blocks.gated_residual(x, row, y).isfinite().all()
assert fk.layers is layers and not layers.fits(torch.nn.Linear(2, 2))
backends = fk.backend_info()["backends"]
print(out.ratio.tolist(), velocity.grad.abs().sum().item() > 0, bool(x_next.isfinite().all()))
print(backends["triton"]["available"], backends["triton"]["reason"])
"""


@pytest.mark.slow
def test_a_step_and_a_loss_without_anything_else():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(ABSENT)],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), "FLOWGRPO_KERNELS": "auto"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    results, triton = done.stdout.splitlines()
    assert results == "[1.0, 1.0] True True"
    assert triton.startswith("False triton cannot be imported: ") and "blocked" in triton


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda p: p.stem)
def test_imports_are_torch_and_the_standard_library(file):
    """Inside functions, too. Triton is looked for by its backend alone; aot/ is for the build."""
    allowed = {"torch", "__future__", *sys.stdlib_module_names}
    if file.parent.name == "aot" or file.stem in ("triton", "constants", "info"):
        allowed.add("triton")
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in allowed, f"{file} imports {name}"
