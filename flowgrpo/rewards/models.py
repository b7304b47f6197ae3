"""Weights of rewards, by transformers and safetensors; nothing here reads a pickle."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo.config.validation import path_text
from flowgrpo.rewards.interface import RewardError


def device(name: str) -> torch.device:
    """Read a device's name; "auto" is cuda if there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        # A device that torch has a name for may be none that is here.
        torch.empty(0, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise RewardError(
            f"the device of a reward is {name!r}, which cannot be used "
            f"({str(error).splitlines()[0][:160]}), but auto, cpu, cuda or cuda:N of a GPU that "
            "torch sees is expected; correct it."
        ) from error


@cache
def pretrained(kind: str, model: str, on: torch.device, revision: str | None = None) -> Any:
    """Load the transformers model of class `kind` from a folder or Hub id, frozen, in float32.

    One copy serves all rewards that name the same model.

    Raises:
        RewardError: there is no such model, or it has no safetensors weights.
    """
    import transformers

    try:
        network = getattr(transformers, kind).from_pretrained(
            path_text(model), use_safetensors=True, dtype=torch.float32, revision=revision or "main"
        )
    # Files that are damaged or foreign raise whatever their reader raises.
    except Exception as error:
        raise _unusable(f"the model {model}", kind + " with safetensors weights", error) from error
    return network.eval().requires_grad_(False).to(on)


@cache
def tokenizer(name: str) -> Any:
    """Load the tokenizer of a folder or Hub id."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(path_text(name))
    except Exception as error:
        raise _unusable(f"the tokenizer {name}", "a tokenizer", error) from error


def tensors(source: str, file: str = "model.safetensors") -> dict[str, Tensor]:
    """Read the tensors of a .safetensors file, or of `file` in a folder or Hub id."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path_text(source))
    try:
        if os.path.isdir(path):
            path /= file
        elif not os.path.isfile(path):
            path = Path(hf_hub_download(source, file))
        return load_file(path)
    except (OSError, SafetensorError, HfHubHTTPError, HFValidationError) as error:
        raise _unusable(f"the weights {source}", "a .safetensors file", error) from error


def _unusable(what: str, expected: str, error: Exception) -> RewardError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return RewardError(
        f"{what} cannot be loaded ({reason}), but a folder or Hugging Face Hub id of {expected} is "
        "expected; check the name and its files, and for the Hub your access and the network."
    )
