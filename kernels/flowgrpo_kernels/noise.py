"""Initial noise: standard normals that belong to the sample's seed.

The noise of the steps is drawn inside sde_step.py. The generator is the same (philox.py), with a
reserved step counter here, so that no step's noise is repeated. The same seed gives the same noise
in any batch, on any rank and on any backend.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .arguments import integer
from .backends import dispatch, triton
from .backends.triton import (
    CHUNKS_C,
    INITIAL_STEP_C,
    chunk_lanes,
    jit,
    narrow,
    normals,
    position,
    store,
    tl,
)
from .checks import FLOAT_DTYPES, check_seeds

# With room for the bytes of an element in an int64.
MAX_ELEMENTS = 1 << 60


def _fake(seeds, shape, dtype):
    return seeds.new_empty((seeds.shape[0], *shape), dtype=dtype)


initial_noise_op = dispatch.define(
    "initial_noise",
    "(Tensor seeds, SymInt[] shape, ScalarType dtype) -> Tensor",
    reference.initial_noise,
    _fake,
)


@jit
def initial_noise_kernel(
    out_ptr,  # [B, D]
    seeds_ptr,  # [B]
    elements,
    num_blocks,
    ALIGN: tl.constexpr,
):
    """Writes a block of normals; one program per block."""
    row, _part, start, base, remaining = position(1, elements, num_blocks, ALIGN)
    seed = tl.load(seeds_ptr + row)
    step = tl.full([], INITIAL_STEP_C, tl.uint32)
    for chunk in range(CHUNKS_C):
        o_lane = chunk_lanes(chunk)
        b_z = normals(start, chunk_lanes(chunk, 4), seed, step)
        store(out_ptr + base, o_lane, remaining, narrow(b_z, out_ptr.dtype.element_ty), ALIGN)


@triton.launcher("initial_noise")
def _launch(launch, seeds, shape, dtype):
    """One launch."""
    rows, elements = seeds.shape[0], torch.Size(shape).numel()
    out = torch.empty((rows, *shape), dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    blocks = triton.num_blocks(elements)
    align = triton.alignment(rows, elements)
    with triton.on(seeds.device):
        launch(
            initial_noise_kernel, rows * blocks, (out, seeds), (elements, blocks),
            ALIGN=align, **triton.LAUNCH,
        )  # fmt: skip
    return out


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draws [B, *shape] standard normals in float32 on the device of seeds, rounded to dtype.

    seeds: int64 [B]. shape: the shape of one sample, without the batch.
    """
    check_seeds(seeds)
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be a sequence of integers, got {type(shape).__name__}")
    shape = [integer("shape", n) for n in shape]
    if any(n < 0 for n in shape):
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    # The sizes of an empty tensor have strides, too.
    if math.prod(max(n, 1) for n in (*seeds.shape, *shape)) >= MAX_ELEMENTS:
        raise ValueError(f"shape must have less than 2^60 elements in a batch, got {shape}")
    if not isinstance(dtype, torch.dtype) or dtype not in FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return initial_noise_op(seeds, shape, dtype)
