"""LoRA weights in files: diffusers' format, PEFT's, and matrices under bare module names.

    format        file                                key of a matrix                     alpha
    diffusers'    pytorch_lora_weights.safetensors    transformer.MODULE.lora_A.weight    header
    PEFT's        adapter_model.safetensors           base_model.model.MODULE.lora_A...   beside it
    bare names    any                                 MODULE.lora_A.weight                .alpha

PEFT's `adapter_config.json` holds its alpha; the adapters that flow_grpo's authors have published
are of this kind. Where no alpha is stored, it is the rank, as in diffusers.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowgrpo.config import ConfigError
from flowgrpo.config.validation import require

LORA_FILE = "pytorch_lora_weights.safetensors"
PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
DIFFUSERS, PEFT, BARE = "transformer.", "base_model.model.", ""
FORMATS = {DIFFUSERS: "diffusers' format", PEFT: "PEFT's format", BARE: "bare module names"}
"""Prefix of the keys -> name of the format."""
# A whole state of a PEFT model has the adapter's name before `weight`.
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")
SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
"""Fields of PEFT's LoraConfig, beside the ranks, that decide what the matrices do."""


@dataclass(frozen=True)
class AdapterFile:
    """The LoRA matrices of a transformer, as one file holds them."""

    path: Path
    prefix: str
    """Prefix of the file's keys, one of `FORMATS`."""
    tensors: dict[str, Tensor]
    """MODULE.lora_A.weight [r, in] and MODULE.lora_B.weight [out, r], without the prefix."""
    settings: dict[str, Any]
    """Those of `SETTINGS` that are stored."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module, by its name."""
        matrices = ((MATRIX.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return {m["module"]: len(tensor) for m, tensor in matrices if m and m["matrix"] == "A"}

    @property
    def rank(self) -> int:
        """Rank of most modules."""
        return _most(self.ranks.values())

    @property
    def alpha(self) -> float:
        """Alpha of most modules."""
        return self.settings.get("lora_alpha", self.rank)

    def lora_config(self) -> dict[str, Any]:
        """Arguments of PEFT's LoraConfig for these matrices, on these modules exactly."""
        others = {f"^{name}": rank for name, rank in self.ranks.items() if rank != self.rank}
        # Without an alpha the scale is 1 at each rank.
        settings = self.settings or {"alpha_pattern": others}
        fixed = {"r": self.rank, "lora_alpha": self.alpha, "rank_pattern": others}
        return {**settings, **fixed, "target_modules": list(self.ranks)}

    def describe(self) -> str:
        """Say which format it is in, and its size and scale."""
        alpha = f"alpha {self.alpha:g}" if "lora_alpha" in self.settings else "no alpha, so scale 1"
        layers = f"{len(self.ranks)} layers, rank {self.rank}, {alpha}"
        return f"{self.path.name} in {FORMATS[self.prefix]}: {layers}"


def read_adapter(adapter: str) -> AdapterFile | None:
    """Read the adapter in a file, a folder or a Hub repository.

    Returns:
        None: there is no such file, or it is in another format.

    Raises:
        ConfigError: PEFT's settings beside it cannot be read, or the weights are pickled.
    """
    path = _find(adapter)
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
    prefix = next((p for p in FORMATS if tensors and all(n.startswith(p) for n in tensors)), None)
    if prefix is None:
        return None
    tensors = {_plain(name.removeprefix(prefix)): tensor for name, tensor in tensors.items()}
    alphas = {n.removesuffix(".alpha"): tensors[n].item() for n in tensors if n.endswith(".alpha")}
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if not any(MATRIX.fullmatch(name) for name in tensors):
        return None
    if alphas:
        common = _most(alphas.values())
        others = {f"^{name}": alpha for name, alpha in alphas.items() if alpha != common}
        settings = {"lora_alpha": common, "alpha_pattern": others}
    elif prefix == DIFFUSERS:
        settings = _settings_of_header(header)
    else:
        settings = _settings_beside(path)
    return AdapterFile(path, prefix, tensors, settings)


def _plain(name: str) -> str:
    """Drop the adapter's name from the key of a matrix."""
    match = MATRIX.fullmatch(name)
    return f"{match['module']}.lora_{match['matrix']}.weight" if match else name


def _most(values: Any) -> Any:
    return Counter(values).most_common(1)[0][0]


def _find(adapter: str) -> Path | None:
    """Find the file of weights in a folder or Hub repository; a file is itself."""
    path = Path(adapter)
    # os.path answers False for a name that is too long, which the Hub refuses.
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        return _from_hub(adapter)
    for name in (LORA_FILE, PEFT_FILE):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    require(
        bool(files) or not (path / "adapter_model.bin").exists(),
        f"the adapter {adapter!r} holds adapter_model.bin, which is a pickle, but a .safetensors "
        "file is expected; save it again by PEFT's save_pretrained.",
    )
    return files[0] if len(files) == 1 else None


def _from_hub(adapter: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    def fetch(name: str) -> Path | None:
        try:
            return Path(hf_hub_download(adapter, name))
        except (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
            return None

    if (path := fetch(LORA_FILE)) is None and (path := fetch(PEFT_FILE)) is not None:
        # Into the same folder; where the repository has none, `_settings_beside` says so.
        fetch(PEFT_CONFIG)
    return path


def _settings_of_header(header: dict[str, str]) -> dict[str, Any]:
    """Settings that diffusers has written into the header of a file."""
    try:
        values = json.loads(header["lora_adapter_metadata"])
        values = {name.removeprefix(DIFFUSERS): value for name, value in values.items()}
        return {name: values[name] for name in SETTINGS if values.get(name)}
    except (KeyError, ValueError, AttributeError):
        return {}


def _settings_beside(path: Path) -> dict[str, Any]:
    """Settings in PEFT's file beside `path`; none where there is no such file.

    Raises:
        ConfigError: it cannot be read, or is of another method than LoRA.
    """
    file = path.with_name(PEFT_CONFIG)
    if not file.exists():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        method = values.get("peft_type", "LORA")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{file} cannot be read ({error}), but the settings of a LoRA adapter are expected; "
            "restore the file."
        ) from error
    require(
        method == "LORA",
        f"{file} says peft_type {method}, but LORA is expected; name a LoRA adapter.",
    )
    return {name: values[name] for name in SETTINGS if values.get(name)}
