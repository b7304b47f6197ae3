"""Digests of weights by samples of them, for the fingerprint of a run's model (runs/content.py)."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

WHOLE = 1 << 16
"""Elements up to which a tensor counts whole; a larger one by `BLOCKS` blocks of `BLOCK`."""
BLOCKS, BLOCK = 8, 1024


def digest_of(weight: Tensor) -> str:
    """SHA-256 of a weight's shape and of samples of its values, as bfloat16 or float16; of one on
    the meta device, of its shape."""
    digest = hashlib.sha256(str(list(weight.shape)).encode())
    if weight.is_meta:
        return digest.hexdigest()
    flat = weight.reshape(-1)
    if len(flat) > WHOLE:
        last = len(flat) - BLOCK
        starts = [last * number // (BLOCKS - 1) for number in range(BLOCKS)]
        flat = torch.cat([flat[start : start + BLOCK] for start in starts])
    if flat.is_floating_point() and flat.dtype != torch.float16:
        flat = flat.to(torch.bfloat16)
    digest.update(flat.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
