"""flowgrpo doctor: versions, devices and kernel backends of this machine; what is off, and why."""

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

from flowgrpo.nano import MODELS as EMBEDDED
from flowgrpo.runs.process import versions

# Optional packages and what is off without them.
OPTIONAL = {
    "triton": "GPU kernels of sizes that are not shipped compiled; on a CPU none is needed",
    "httpx": "remote rewards; pip install flowgrpo[rewards]",
    "datasets": "data sets of the Hub, prompts and pictures; pip install flowgrpo[data]",
    "webdataset": "shards of pictures for flowgrpo curate; pip install flowgrpo[data]",
    "wandb": "logging to Weights & Biases; pip install flowgrpo[wandb]",
}
# Reward -> libraries beyond those that every install has.
LIBRARIES = {
    "deqa": ("httpx",),
    "http": ("httpx",),
    "ocr": ("rapidocr", "onnxruntime", "rapidfuzz"),
    "ocr_strict": ("rapidocr", "onnxruntime"),
    "unifiedreward": ("httpx",),
}
# Options of rewards that name a model.
MODELS = ("model", "clip_model", "tokenizer", "head")


def doctor(console: Console | None = None) -> dict[str, Any]:
    """Print the state of this machine, section by section, and return it."""
    console = console or Console(highlight=False)
    sections = {
        "versions": versions(),
        "cpu": cpu(),
        "gpus": gpus(),
        "bfloat16": {device: bfloat16(device) for device in devices()},
        "kernels": kernels(),
        "attention": attention(),
        "optional": {
            name: "present" if importlib.util.find_spec(name) else f"absent: no {use}"
            for name, use in OPTIONAL.items()
        },
        "nano": nano(),
        "rewards": reward_states(),
        "recipes": recipe_states(),
    }
    for section, values in sections.items():
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for name, value in values.items():
            table.add_row(f"  {name}", Text(str(value)))
        console.print(section, style="bold")
        console.print(table)
    return sections


def devices() -> list[str]:
    """List the device types that a run can use here."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def cpu() -> dict[str, Any]:
    """Describe the CPU: name, cores for this process, threads, extensions for 16-bit arithmetic."""
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
    """Describe the GPUs: index -> name, memory and compute capability; or why there is none."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        reason = "no usable device" if built else "this torch is built without CUDA"
        return {"none": f"{reason}; runs use the CPU"}
    described = {}
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        size = device.total_memory / 2**30
        described[str(index)] = f"{device.name}, {size:.0f} GiB, sm_{device.major}{device.minor}"
    return described


def bfloat16(device: str) -> str:
    """Time a matrix product in bfloat16 against float32, and name the dtype that auto chooses."""
    from flowgrpo.policies.device import choose_dtype

    seconds = {dtype: _product(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    ratio = seconds[torch.float32] / seconds[torch.bfloat16]
    chosen = str(choose_dtype("auto", torch.device(device))).removeprefix("torch.")
    return f"{ratio:.1f} times the speed of float32; policy.dtype auto takes {chosen}"


def _product(device: str, dtype: torch.dtype, size: int = 768) -> float:
    """Time one matrix product, in seconds, the best of a few."""
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
    """Describe the backends: available or why not, and which ops of each device run on which."""
    from flowgrpo_kernels import backend_info

    info = backend_info()
    lines = {"FLOWGRPO_KERNELS": str(info["requested"])}
    for name, state in info["backends"].items():
        lines[name] = "available" if state["available"] else f"off: {state['reason']}"
    for i, image in enumerate(info["images"]):
        lines[f"compiled for cuda:{i}"] = image
    for device, backend_by_op in info["ops"].items():
        ops_by_backend: dict[str, list[str]] = {}
        for op, backend in backend_by_op.items():
            ops_by_backend.setdefault(backend, []).append(op)
        texts = [f"{backend} ({', '.join(ops)})" for backend, ops in ops_by_backend.items()]
        lines[f"on {device}"] = "; ".join(texts)
    return lines


def attention() -> dict[str, str]:
    """Describe packages of attention kernels: version, and whether policy.attention can choose
    them on the first GPU here, in bfloat16 and without masks."""
    from flowgrpo.policies import attention_packages

    return attention_packages.states(torch.device(devices()[-1]))


def nano() -> dict[str, str]:
    """Look for the files of the embedded models."""
    states = {}
    for name, folder in EMBEDDED.items():
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        states[name] = f"{folder}, {size / 1e6:.1f} MB" if size else f"absent: no {folder}"
    return states


def reward_states() -> dict[str, str]:
    """Describe the rewards: name -> "can run", or the reason why not."""
    from flowgrpo.rewards import REWARDS

    return {name: _reward_state(name) for name in REWARDS}


def _reward_state(name: str) -> str:
    from flowgrpo import rewards

    missing = [lib for lib in LIBRARIES.get(name, ()) if importlib.util.find_spec(lib) is None]
    if missing:
        return f"off: no {', '.join(missing)}; pip install 'flowgrpo[rewards]'"
    try:
        options = getattr(rewards.load(name), "options", {})
    except rewards.RewardError as error:
        return f"off: {error}"
    if "url" in options:
        if not options["url"]:
            return f"needs an address: FLOWGRPO_REWARD_{name.upper()}_URL or reward.options"
        return _answer(name)
    absent = [options[key] for key in MODELS if key in options and not at_hand(options[key])]
    if absent:
        return f"can run after a download of {', '.join(dict.fromkeys(absent))}"
    return "can run"


def _answer(name: str) -> str:
    """Ask the servers of a remote reward for an answer."""
    from flowgrpo import rewards

    try:
        reward = rewards.load(name).build()
        reward.reach()
    except rewards.RewardError as error:
        return f"off: {error}"
    return f"can run: {reward.servers.describe()}"


def at_hand(model: str) -> bool:
    """Look for `model` on this machine: a folder or file, or in the Hub's cache."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cached = Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    return Path(model).exists() or (cached.is_dir() and any(cached.iterdir()))


def recipe_states(memory: float | None = None) -> dict[str, str]:
    """Describe the recipes: expected memory against the GPU's, `memory` GiB; and their models."""
    from flowgrpo import plan, recipes

    memory = memory or plan.gpu_memory()
    states = {"GPU": f"{memory:.0f} GiB" if memory else "none here; recipes are made for 80 GiB"}
    models = {}
    for name in sorted(set(recipes.RECIPES) - recipes.EMBEDDED):
        config = recipes.recipe(name, memory=memory)
        need = plan.expected_memory(config, plan.sizes_of(config.policy.model))["total"]
        rows = config.sample.batch_size
        text = f"about {need:.0f} GiB, {rows} {'image' if rows == 1 else 'images'} a forward"
        if memory and need > memory:
            text += ", more than there is"
        states[name] = text
        models[config.policy.model] = at_hand(config.policy.model)
    for model, present in models.items():
        download = "to be downloaded; accept its licence on the Hub first"
        states[model] = "at hand" if present else download
    return states
