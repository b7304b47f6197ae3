"""Files that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from flowgrpo.config import ConfigError


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` so that a reader sees the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as indented JSON, see `plain`."""
    write_text(path, json.dumps(plain(values), indent=2) + "\n")


def plain(value: Any) -> Any:
    """`value` as JSON: tensors become numbers or lists, numbers that are not finite null."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the safetensors file `path`, as `write_text` does."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    save_file({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}, beside)
    os.replace(beside, path)


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; ConfigError if it is none."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), but a safetensors file is expected; restore it."
        ) from error
