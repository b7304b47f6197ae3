"""The device and the dtype that "auto" or a name stands for."""

from __future__ import annotations

import torch

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import require
from flowgrpo.distributed.world import launched, local_rank

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SHORT_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}


def choose_device(device: str | torch.device) -> torch.device:
    """Find the torch device that "auto" or a name stands for; of several processes each has the GPU
    of its own number on the machine."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ConfigError(
            f"policy.device is {str(device)!r}, which cannot be used "
            f"({str(error).splitlines()[0][:160]}), but a device that torch sees is expected; use "
            "auto, cpu or cuda."
        ) from error
    if device.type != "cuda" or not launched():
        return device
    of_this_rank = torch.device("cuda", local_rank())
    require(
        device.index in (None, of_this_rank.index),
        f"policy.device is {str(device)!r} in the process of LOCAL_RANK {of_this_rank.index}, but "
        "each of several processes has a GPU of its own; use auto.",
    )
    # With its number, as other threads have another default.
    return of_this_rank


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype that "auto" or a name, such as bfloat16 or bf16, stands for on this device.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    if dtype in (*DTYPES.values(), torch.float64):
        return dtype
    name = SHORT_NAMES.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if name != "auto":
        require(
            name in DTYPES,
            f"dtype is {dtype!r}, but auto, {', '.join(DTYPES)}, or torch's own, is "
            "expected; give one.",
        )
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16
    # torch only has private names for these questions; a version without them gets float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(hasattr(torch.cpu, name) and getattr(torch.cpu, name)() for name in checks)
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32
