"""backend_info(): what runs where, and why."""

from __future__ import annotations

import platform
import sys
from typing import Any

import torch

from . import compiled, dispatch


def backend_info() -> dict[str, Any]:
    """Reports versions, devices and, for each type of device, which backend runs each op.

    Keys: requested (FLOWGRPO_KERNELS), versions, devices, backends {name: {"available", "reason"}},
    images [what serves each CUDA device compiled, or why nothing does], ops {device type: {op:
    backend or "error: ..."}}. Starts no GPU work.
    """
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
    ops: dict[str, dict[str, str]] = {}
    for device in devices:
        ops[device] = {}
        for name in dispatch.OPS:
            try:
                ops[device][name] = dispatch.backend_of(name, device)
            except RuntimeError as error:
                ops[device][name] = f"error: {error}"
    return {
        "requested": dispatch.requested(),
        "versions": _versions(),
        "devices": _devices(),
        "backends": dispatch.backends(),
        "images": compiled.serving(),
        "ops": ops,
    }


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0], "torch": torch.__version__}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        versions["triton"] = "not installed"
    return versions


def _devices() -> list[str]:
    names = [f"cpu: {platform.processor() or platform.machine()}"]
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            names.append(f"cuda:{i}: {torch.cuda.get_device_name(i)} (sm_{major}{minor})")
    return names
