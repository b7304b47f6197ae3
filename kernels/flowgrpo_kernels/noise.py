"""Initial noise: standard normals that belong to the sample's seed.

Same generator as the noise of a step (philox.py) with a reserved step counter, so it never repeats
a step's noise. The same seed gives the same noise in any batch, on any rank and on any backend.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _ops

_initial_noise = _ops.op("initial_noise")


def initial_noise(
    seeds: Tensor, shape: Sequence[int], *, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, *shape] standard normals on the device of seeds, drawn in float32 and rounded to dtype.

    seeds: int64 [B]. shape: the shape of one sample, without the batch.
    """
    _checks.check_seeds(seeds)
    shape = [int(n) for n in shape]
    if any(n < 0 for n in shape):
        raise ValueError(f"shape must not have negative sizes, got {shape}")
    if dtype not in _ops.FLOAT_DTYPES:
        raise TypeError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    return _initial_noise(seeds, shape, dtype)
