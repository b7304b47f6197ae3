"""One call of every kernel on awkward shapes, for compute-sanitizer.

    compute-sanitizer --tool memcheck python benchmarks sanitize
    compute-sanitizer --tool racecheck python benchmarks sanitize

Sizes with and without a tail, one element, one row and several, every dtype of both latents;
guidance, KL, Guard. The width of an access depends on the dtype of its tensor alone,
so the pairs of dtypes are not all tried with all sizes: a compilation each would take minutes.
Run it with PYTORCH_NO_CUDA_MEMORY_CACHING=1, so that each tensor is a separate allocation and
an access beyond its end is seen.
"""

from __future__ import annotations

import argparse
import itertools

import torch

from flowgrpo_kernels import (
    flow_sde,
    grpo_loss,
    initial_noise,
    log_prob,
    nft_loss,
    sde_step,
)
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate

SHAPES = ((1,), (3, 5, 7), (4097,), (16, 32, 32))
# (batch, tokens, heads, elements of a head), one for each dtype: each is another compilation.
BLOCKS = ((1, 1, 3, 2), (2, 5, 9, 64), (3, 2, 24, 128))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def step_and_loss(
    rows: int, shape: tuple[int, ...], velocity: torch.dtype, sample: torch.dtype, device
):
    """Run noise, step, log_prob and loss with gradients; raise when a result is not finite."""
    transitions = flow_sde([1 - i / 10 for i in range(11)]).to(device)
    seeds = torch.arange(rows, device=device)
    step = seeds % 9
    x = initial_noise(seeds, shape, dtype=sample)
    v, u, ref = (torch.randn(rows, *shape, device=device, dtype=velocity) for _ in range(3))
    guided = {"uncond_velocity": u, "guidance_scale": 3.0}
    after, old = sde_step(v, x, transitions, step, seeds=seeds, **guided)
    v.requires_grad_()
    log_prob(v, x, after, transitions, step, **guided).sum().backward()
    out = grpo_loss(
        v, x, after, old, torch.linspace(-1, 1, rows, device=device), transitions, step,
        ref_velocity=ref, kl_weight=0.1, old_velocity=ref, **guided,
    )  # fmt: skip
    out.loss.backward()
    half = torch.full((rows,), 0.5, device=device)
    nft = nft_loss(
        v, x, after, ref, half, half, ref_velocity=ref, kl_weight=0.1, row_weight=half, **guided
    )
    nft.loss.backward()
    for name, tensor in (
        ("x'", after),
        ("NFT's loss", nft.loss),
        ("loss", out.loss),
        ("gradient", v.grad),
    ):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name} of {rows} x {shape}, {velocity}/{sample}: not finite")


def block_ops(batch: int, tokens: int, heads: int, size: int, dtype: torch.dtype, device) -> None:
    """Run the element-wise ops of a block with gradients; raise when a result is not finite."""
    width = heads * size
    x, y, z = (torch.randn(batch, tokens, width, device=device, dtype=dtype) for _ in range(3))
    a, b, c, d = torch.randn(4, batch, width, device=device, dtype=dtype)
    tables = torch.randn(2, 2 * tokens, size, device=device)
    x.requires_grad_()
    h, h2 = norm_modulate(x, a, b, second=(c, d))
    out = gated_residual(h, a, y, second=(b, h2))
    joint = joint_heads((out, z), (a[0, :size], None), heads=heads, rotary=tuple(tables))
    joint.square().sum().backward()
    for name, tensor in (("heads", joint), ("gradient", x.grad)):
        if not tensor.isfinite().all():
            raise AssertionError(f"{name} of {batch, tokens, heads, size}, {dtype}: not finite")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("device", nargs="?", choices=("cuda", "cpu"), default="cuda")
    device = parser.parse_args(argv).device
    backend = "triton" if device == "cuda" else "reference"
    with dispatch.use_backend(backend):
        for number, shape in enumerate(SHAPES):
            turned = DTYPES[number % 3 :] + DTYPES[: number % 3]
            for rows, (v, x) in itertools.product((1, 3), zip(DTYPES, turned, strict=True)):
                step_and_loss(rows, shape, v, x, device)
        for sizes, dtype in zip(BLOCKS, DTYPES, strict=True):
            block_ops(*sizes, dtype, device)
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"every kernel ran on {device}")
    return 0
