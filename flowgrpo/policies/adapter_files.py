"""LoRA weights in files: diffusers' format, PEFT's, and matrices under bare module names.

    format        file                                key of a matrix                     alpha
    diffusers'    pytorch_lora_weights.safetensors    transformer.MODULE.lora_A.weight    header
    PEFT's        adapter_model.safetensors           base_model.model.MODULE.lora_A...   beside it
    bare names    any                                 MODULE.lora_A.weight                .alpha

PEFT's `adapter_config.json` holds its alpha; the adapters that flow_grpo's authors have published
are of this kind. Where no alpha is stored, it is the rank, as in diffusers, also for one module
beside others that have theirs.

A folder may also hold one such file under another name, or in `lora/`, as flow_grpo's checkpoints
do. A Hub repository is OWNER/NAME, with a folder in it and a revision if need be:
OWNER/NAME/FOLDER@REVISION.

What a file holds is checked before anything of it is loaded (`AdapterFile.check`): PEFT and
diffusers leave out, without a word, the matrices and keys that they have no place for.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
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
CHECKPOINT = "lora"
"""Folder of a checkpoint of flow_grpo's that holds PEFT's files."""
REPOSITORY = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(/(?P<folder>[^@]+?))?/?(@(?P<revision>.+))?")
"""OWNER/NAME, OWNER/NAME/FOLDER, each with @REVISION or without."""
DIFFUSERS, PEFT, BARE = "transformer.", "base_model.model.", ""
FORMATS = {DIFFUSERS: "diffusers' format", PEFT: "PEFT's format", BARE: "bare module names"}
"""Prefix of the keys -> name of the format."""
# A whole state of a PEFT model has the adapter's name before `weight`.
MATRIX = re.compile(r"(?P<module>.+)\.lora_(?P<matrix>[AB])(\.default)?\.weight")
EXTRA = re.compile(r"(?P<module>.+)\.(lora_magnitude_vector(\.weight)?|lora_B\.bias)")
"""Keys that diffusers reads beside the matrices: DoRA's magnitudes, and biases."""
SETTINGS = ("lora_alpha", "alpha_pattern", "use_rslora", "use_dora")
"""Fields of PEFT's LoraConfig, beside the ranks, that decide what the matrices do."""
CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of PEFT's `init_lora_weights` that take the first matrices out of the model's weights:
the trained ones fit what is left of these alone."""


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
    alphas: dict[str, float]
    """Alphas that are tensors of the file, by module."""

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each adapted module, by its name."""
        return {
            name: tensor.shape[0] if tensor.ndim else 0
            for name, tensor in self._matrices("A").items()
        }

    def _matrices(self, matrix: str) -> dict[str, Tensor]:
        """The matrices A or B by module."""
        matches = ((MATRIX.fullmatch(name), tensor) for name, tensor in self.tensors.items())
        return {m["module"]: tensor for m, tensor in matches if m and m["matrix"] == matrix}

    def check(self, name: str) -> None:
        """Raise ConfigError unless the matrices are pairs of finite numbers that fit each other.

        Args:
            name: of the adapter, at the beginning of the sentence.
        """
        low, high = self._matrices("A"), self._matrices("B")
        for module in (*low, *high):
            lacking = "A" if module not in low else "B"
            require(
                module in low and module in high,
                f"{name} has no {module}.lora_{lacking}.weight, but both matrices of each layer "
                "are expected; restore the file.",
            )
        for module, rank in self.ranks.items():
            for matrix, tensor in (("A", low[module]), ("B", high[module])):
                kind = "NaN or infinity" if tensor.is_floating_point() else str(tensor.dtype)
                require(
                    tensor.is_floating_point() and bool(tensor.isfinite().all()),
                    f"{name} has {kind} in {module}.lora_{matrix}.weight, but finite numbers of a "
                    "floating-point type are expected; name another.",
                )
            shapes = [list(m[module].shape) for m in (low, high)]
            require(
                all(len(shape) > 1 for shape in shapes) and shapes[1][1] == rank > 0,
                f"{name} has {module}.lora_A.weight {shapes[0]} and lora_B.weight {shapes[1]}, but "
                "[rank, in] and [out, rank] are expected; restore the file.",
            )
        foreign = sorted(self.alphas.keys() - low.keys())
        require(
            not foreign,
            f"{name} has {foreign[0] if foreign else ''}.alpha without matrices, but those of its "
            "layers alone are expected; restore the file.",
        )

    def extras(self) -> list[str]:
        """List the keys beside the matrices that are no `EXTRA` of a module that has them."""
        ranks = self.ranks
        matches = {key: EXTRA.fullmatch(key) for key in self.others()}
        return [key for key, match in matches.items() if not match or match["module"] not in ranks]

    def others(self) -> list[str]:
        """List the keys beside the matrices."""
        return [key for key in self.tensors if not MATRIX.fullmatch(key)]

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
        settings = {} if "lora_alpha" in self.settings else {"alpha_pattern": others}
        settings |= self.settings
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
    alphas = {
        name.removesuffix(".alpha"): _scalar(tensor, f"{path} has {name}")
        for name, tensor in tensors.items()
        if name.endswith(".alpha")
    }
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".alpha")}
    if not any(MATRIX.fullmatch(name) for name in tensors):
        return None
    if not alphas:
        of_header = prefix == DIFFUSERS
        settings = _settings_of_header(header, path) if of_header else _settings_beside(path)
        return AdapterFile(path, prefix, tensors, settings, alphas)
    ranks = AdapterFile(path, prefix, tensors, {}, alphas).ranks
    by_module = {name: alphas.get(name, rank) for name, rank in ranks.items()}
    common = _most(by_module.values()) if by_module else _most(alphas.values())
    others = {f"^{name}": alpha for name, alpha in by_module.items() if alpha != common}
    return AdapterFile(
        path, prefix, tensors, {"lora_alpha": common, "alpha_pattern": others}, alphas
    )


def first_key(adapter: str) -> str:
    """Find the first key of an adapter's file, for a message; "" where there is none."""
    path = _find(adapter)
    try:
        with safe_open(path or "", "pt") as file:
            return next(iter(file.keys()), "")
    except (OSError, SafetensorError):
        return ""


def _plain(name: str) -> str:
    """Drop the adapter's name from the key of a matrix."""
    match = MATRIX.fullmatch(name)
    return f"{match['module']}.lora_{match['matrix']}.weight" if match else name


def _scalar(tensor: Tensor, name: str) -> float:
    """Read a tensor of one finite number; `name` begins the sentence of the error."""
    require(
        tensor.numel() == 1 and bool(tensor.isfinite().all()),
        f"{name} {tensor.flatten()[:4].tolist()} in the shape {list(tensor.shape)}, but one finite "
        "number is expected; restore the file.",
    )
    return tensor.item()


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
    for name in (LORA_FILE, PEFT_FILE, f"{CHECKPOINT}/{PEFT_FILE}"):
        if (path / name).is_file():
            return path / name
    files = sorted(path.glob("*.safetensors"))
    require(
        bool(files) or not (path / "adapter_model.bin").exists(),
        f"the adapter {adapter!r} holds adapter_model.bin, which is a pickle, but a .safetensors "
        "file is expected; save it again by PEFT's save_pretrained.",
    )
    require(
        len(files) < 2,
        f"the adapter {adapter!r} is a folder with {', '.join(file.name for file in files[:3])}, "
        f"but one file of weights, {LORA_FILE} or {PEFT_FILE} is expected; name the file itself.",
    )
    return files[0] if files else None


def _from_hub(adapter: str) -> Path | None:
    """Fetch the file of weights of a Hub repository, and PEFT's settings beside it."""
    from huggingface_hub import hf_hub_download, list_repo_files
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    match = REPOSITORY.fullmatch(adapter)
    if match is None:
        return None
    repository, folder, revision = match["repo"], match["folder"] or "", match["revision"]
    # OSError: there is no network, and OfflineModeIsEnabled is one too.
    absent = (EntryNotFoundError, HfHubHTTPError, HFValidationError, OSError)

    def fetch(name: str) -> Path | None:
        name = f"{folder}/{name}" if folder else name
        try:
            return Path(hf_hub_download(repository, name, revision=revision))
        except absent:
            return None

    def only_file() -> str | None:
        """Find the one file of weights that has another name."""
        try:
            names = list_repo_files(repository, revision=revision)
        except absent:
            return None
        start = f"{folder}/" if folder else ""
        inside = [name.removeprefix(start) for name in names if name.startswith(start)]
        weights = [n for n in inside if n.endswith(".safetensors") and "/" not in n]
        require(
            len(weights) < 2,
            f"the adapter {adapter!r} is a repository with {', '.join(weights[:3])}, but one file "
            f"of weights, {LORA_FILE} or {PEFT_FILE} is expected; download one and name the file.",
        )
        return weights[0] if weights else None

    for name in (LORA_FILE, PEFT_FILE, f"{CHECKPOINT}/{PEFT_FILE}"):
        if (path := fetch(name)) is not None:
            if name != LORA_FILE:
                # Into the same folder; where the repository has none, `_settings_beside` says so.
                fetch(f"{name.removesuffix(PEFT_FILE)}{PEFT_CONFIG}")
            return path
    return None if (name := only_file()) is None else fetch(name)


def origin(adapter: str) -> dict[str, str]:
    """Say where an adapter comes from, for a record: the "file", and where they are known the
    "revision" (commit) of its Hub repository and the "base_model" that it says it was trained on.
    """
    path = _find(adapter)
    if path is None:
        return {}
    known = {"file": path.name}
    # The Hub's cache has a folder for each commit.
    if match := re.search(r"/snapshots/([0-9a-f]{40})/", path.absolute().as_posix()):
        known["revision"] = match[1]
    try:
        beside = json.loads(path.with_name(PEFT_CONFIG).read_text(encoding="utf-8"))
        base = beside.get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return {**known, "base_model": base} if isinstance(base, str) and base else known


def _settings_of_header(header: dict[str, str], path: Path) -> dict[str, Any]:
    """Settings that diffusers has written into the header of the file `path`."""
    try:
        values = json.loads(header["lora_adapter_metadata"])
        values = {name.removeprefix(DIFFUSERS): value for name, value in values.items()}
    except (KeyError, ValueError, AttributeError):
        return {}
    return _settings_of(values, path)


def _settings_of(values: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Pick `SETTINGS` out of a LoraConfig's `values`.

    Raises:
        ConfigError: one is of a wrong type, or the adapter belongs to changed weights.
    """

    def is_number(value: object) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and math.isfinite(value)

    def is_pattern(value: object) -> bool:
        try:
            return all(is_number(alpha) and re.compile(name) for name, alpha in value.items())
        except (AttributeError, TypeError, re.error):
            return False

    def is_flag(value: object) -> bool:
        return isinstance(value, bool)

    init = values.get("init_lora_weights")
    require(
        not (isinstance(init, str) and init.lower().startswith(CHANGES_BASE)),
        f"{source} says init_lora_weights {init}, so its matrices belong to a model from whose "
        "weights the first ones were taken, but an adapter of the model itself is expected; "
        "convert it by PEFT's save_pretrained(path_initial_model_for_weight_conversion=...).",
    )
    rules = dict(zip(SETTINGS, (is_number, is_pattern, is_flag, is_flag), strict=True))
    settings = {name: values[name] for name in SETTINGS if values.get(name) is not None}
    for name, value in settings.items():
        require(
            rules[name](value),
            f"{source} says {name} {value!r}, but what PEFT's LoraConfig takes is expected; "
            "correct it.",
        )
    return settings


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
    return _settings_of(values, file)
