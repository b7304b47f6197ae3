"""Initial noise: standard normals that belong to the sample's seed.

Same generator as the noise of a step (philox.py) with a reserved step counter, so it never repeats
a step's noise. The same seed gives the same noise in any batch, on any rank and on any backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _ops, _triton
from ._triton import CHUNKS_C, LANES_C, jit, narrow, normals, position, store, tl


@jit
def _noise_kernel(
    out_ptr,  # [B, D]
    seeds_ptr,  # [B]
    elements,
    num_blocks,
    ALIGN: tl.constexpr,
):
    row, start, base, remaining = position(elements, num_blocks, ALIGN)
    seed = tl.load(seeds_ptr + row)
    step = tl.full([], 0xFFFFFFFF, tl.uint32)
    for chunk in range(CHUNKS_C):
        o_lane = chunk * LANES_C + tl.arange(0, LANES_C)
        b_z = normals((start + chunk * LANES_C) // 4, seed, step)
        store(out_ptr + base, o_lane, remaining, narrow(b_z, out_ptr.dtype.element_ty))


@_triton.launcher("initial_noise")
def _launch(seeds, shape, dtype):
    rows, elements = seeds.shape[0], torch.Size(shape).numel()
    out = torch.empty((rows, *shape), dtype=dtype, device=seeds.device)
    if out.numel() == 0:
        return out
    blocks = _triton.num_blocks(elements)
    align = _triton.alignment(rows, elements)
    with _triton.on(seeds.device):
        _noise_kernel[(rows * blocks,)](out, seeds, elements, blocks, ALIGN=align, **_triton.LAUNCH)
    return out


_initial_noise = _ops.op("initial_noise")


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, *shape] standard normals on the device of seeds, drawn in float32 and rounded to dtype.

    seeds: int64 [B]. shape: the shape of one sample, without the batch.
    """
    _checks.check_seeds(seeds)
    if not isinstance(shape, Sequence) or isinstance(shape, str):
        raise TypeError(f"shape must be a sequence of integers, got {type(shape).__name__}")
    shape = [int(n) for n in shape]
    if any(n < 0 for n in shape):
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    if dtype not in _ops.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return _initial_noise(seeds, shape, dtype)
