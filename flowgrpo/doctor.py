"""What this machine offers a run: versions, devices, kernel backends, and what is off and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowgrpo import runs

# Optional packages and what is off without them.
OPTIONAL = {
    "triton": "GPU kernels; on a CPU none is needed",
    "httpx": "remote rewards; pip install flowgrpo[rewards]",
    "wandb": "logging to Weights & Biases; pip install flowgrpo[wandb]",
}


def doctor(console: Console | None = None) -> dict[str, Any]:
    """Print what was found, and return it."""
    console = console or Console(highlight=False)
    found = {
        "versions": runs.versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "bfloat16": {device: bfloat16(device) for device in devices()},
        "kernels": kernels(),
        "optional": {
            name: "present" if importlib.util.find_spec(name) else f"absent: no {use}"
            for name, use in OPTIONAL.items()
        },
        "nano": nano(),
    }
    for section, values in found.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in values.items():
            table.add_row(f"  {name}", Text(str(value)))
        console.print(section, style="bold")
        console.print(table)
    return found


def devices() -> list[str]:
    """Device types that a run can use here."""
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def cpu() -> dict[str, Any]:
    """Name, cores that this process may use, threads, and what speeds up 16-bit arithmetic."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    fast = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return {
        "name": names[0] if names else platform.processor() or platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "extensions": ", ".join(fast) or "none of avx2, avx512f, avx512_bf16, amx_bf16",
    }


def gpus() -> dict[str, str]:
    """Index -> name, memory and compute capability; or why there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no usable device" if built else "this torch is built without CUDA"
        return {"none": f"{reason}; runs use the CPU"}
    found = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = device.total_memory / 2**30
        found[str(index)] = f"{device.name}, {size:.0f} GiB, sm_{device.major}{device.minor}"
    return found


def bfloat16(device: str) -> str:
    """How fast a matrix product is in bfloat16 against float32, and what dtype auto chooses."""
    from flowgrpo.policies.base import choose_dtype

    seconds = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = str(choose_dtype("auto", torch.device(device))).removeprefix("torch.")
    return f"{ratio:.1f} times the speed of float32; policy.dtype auto takes {chosen}"


def _product(device: str, dtype: torch.dtype, size: int = 768) -> float:
    """Seconds of one matrix product, the best of a few."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def kernels() -> dict[str, str]:
    """Backend -> available or why not; and which backend each device's ops run on."""
    from flowgrpo_kernels import backend_info

    info = backend_info()
    found = {"FLOWGRPO_KERNELS": str(info["requested"])}
    for name, state in info["backends"].items():
        found[name] = "available" if state["available"] else f"off: {state['reason']}"
    for device, ops in info["ops"].items():
        backends = dict.fromkeys(ops.values())
        parts = [f"{b} ({', '.join(o for o in ops if ops[o] == b)})" for b in backends]
        found[f"on {device}"] = "; ".join(parts)
    return found


def nano() -> dict[str, str]:
    """Whether the embedded model's files are there."""
    try:
        from flowgrpo.nano.model import MODEL_DIR
    except ImportError as error:
        return {"model": f"absent: {error}"}
    size = sum(path.stat().st_size for path in Path(MODEL_DIR).rglob("*") if path.is_file())
    return {"model": f"{MODEL_DIR}, {size / 1e6:.1f} MB" if size else f"absent: no {MODEL_DIR}"}
