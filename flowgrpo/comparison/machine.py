"""The machine of a comparison: its cores, its memory, its GPUs, and what is measured on them."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Limits of a container, version 2."""


def cores() -> int:
    """Count the CPU cores that this process may use: by its affinity, and by the quota of its
    container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        pass
    return max(1, count or 1)


def free_memory() -> int | None:
    """Count the bytes that processes may still take; None where the system does not say."""
    try:
        match = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return None
    free = int(match[1]) * 1024 if match else None
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        if limit != "max":
            # What the container has cached of files is given back when it is needed.
            stat = dict(line.split() for line in (CGROUP / "memory.stat").open())
            used = int((CGROUP / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            left = max(0, int(limit) - used)
            free = left if free is None else min(free, left)
    except (OSError, ValueError):
        pass
    return free


def process_memory(pid: int) -> tuple[int, int]:
    """Count the resident bytes of a process, now and at most so far; (0, 0) where the system does
    not say."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    sizes = [re.search(rf"^{name}:\s+(\d+) kB", text, re.M) for name in ("VmRSS", "VmHWM")]
    now, most = (int(size[1]) * 1024 if size else 0 for size in sizes)
    return now, most


def gpus() -> list[str]:
    """List the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; without
    touching them."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(number) for number in range(count)]
    return [name.strip() for name in visible.split(",") if name.strip()][:count]


def name_of(gpu: str | None) -> tuple[str, str]:
    """Name the GPU and its driver's version, or, for None, the CPU and the kernel's."""
    if gpu is not None:
        # By its own tool: torch would take memory of the GPU for the answer.
        query = [
            "nvidia-smi",
            "--query-gpu=name,driver_version",
            "--format=csv,noheader",
            "-i",
            gpu,
        ]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=True)
            name, _, driver = done.stdout.splitlines()[0].rpartition(", ")
            return name, driver
        except (OSError, subprocess.CalledProcessError, IndexError):
            return "GPU", "unknown"
    name = platform.processor() or platform.machine()
    try:
        if match := re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M):
            name = match[1]
    except OSError:
        pass
    return f"{name}, {cores()} cores", platform.release()


def commit() -> str:
    """Name the commit of this package's checkout, with "+" where the tree differs from it; outside
    a checkout $FLOWGRPO_COMMIT, or "unknown"."""
    root = Path(__file__).resolve().parents[2]
    # An installed package may lie inside somebody else's checkout.
    if (root / ".git").exists():
        try:
            command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+"]
            done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
            return done.stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            pass
    return os.environ.get("FLOWGRPO_COMMIT", "unknown")
