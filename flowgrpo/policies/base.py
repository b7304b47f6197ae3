"""What the trainer asks of a model.

A policy is a diffusers pipeline seen as three functions: `encode` texts, `velocity` of a sample at
a noise level, `decode` latents to images. Rollout, update, reference and evaluation all call the
same `velocity`, with the same weights and dtype, and no autocast: on the same rows in the same
batch geometry it returns the same bits with and without autograd, so the first ratio of an update
is 1.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch
from torch import Tensor, nn

from flowgrpo.config import ConfigError

FAMILIES = {"StableDiffusion3Pipeline": "flowgrpo.policies.sd3:SD3Policy"}
"""Pipeline class in model_index.json -> "module:class" of its policy."""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Conditioning:
    """Text embeddings of N prompts, in the transformer's dtype."""

    embeds: Tensor
    """[N, L, D]: one vector a token."""
    pooled: Tensor
    """[N, P]: one vector a prompt."""

    def __len__(self) -> int:
        return self.embeds.shape[0]

    def rows(self, index: Tensor) -> Conditioning:
        """The prompts at `index`, int64 [M]."""
        return Conditioning(self.embeds[index], self.pooled[index])

    def repeat_interleave(self, count: int) -> Conditioning:
        """Each prompt `count` times in succession."""
        return Conditioning(
            self.embeds.repeat_interleave(count, dim=0), self.pooled.repeat_interleave(count, dim=0)
        )

    def expand(self, count: int) -> Conditioning:
        """A single prompt as `count` rows."""
        return Conditioning(self.embeds.expand(count, -1, -1), self.pooled.expand(count, -1))

    def then(self, other: Conditioning) -> Conditioning:
        """These prompts, then those of `other`."""
        return Conditioning(
            torch.cat([self.embeds, other.embeds]), torch.cat([self.pooled, other.pooled])
        )


class Policy(ABC):
    """A flow-matching text-to-image model. Subclasses are final."""

    name: str
    """What the user called the model."""
    transformer: nn.Module
    """What is trained; adapters are injected into it."""
    scheduler: object
    """The pipeline's FlowMatchEulerDiscreteScheduler."""
    device: torch.device
    dtype: torch.dtype
    """Of the frozen weights and of the velocity."""
    latent_shape: tuple[int, int, int]
    """C, H, W."""

    @staticmethod
    def load(
        model: str, *, device: str | torch.device = "auto", dtype: str | torch.dtype = "auto"
    ) -> Policy:
        """The policy for the diffusers pipeline in the folder or Hub repository `model`.

        "nano" is the embedded model. Device "auto" is cuda where there is one; dtype "auto" is
        bfloat16 where the device multiplies it in hardware, else float32.
        """
        device = choose_device(device)
        dtype = choose_dtype(dtype, device)
        source = model
        if model == "nano":
            from flowgrpo.nano.model import MODEL_DIR

            source = str(MODEL_DIR)
        family = _pipeline_class(source, model)
        if family not in FAMILIES:
            raise ConfigError(
                f"policy.model {model!r} is a {family}, but one of {', '.join(FAMILIES)} is "
                "expected; name such a pipeline."
            )
        module, _, cls = FAMILIES[family].partition(":")
        return getattr(import_module(module), cls)(source, model, device, dtype)

    @abstractmethod
    def encode(self, texts: Sequence[str]) -> Conditioning:
        """Embeddings of the texts, in one batch, on the policy's device."""

    @abstractmethod
    def check_texts(self, texts: Sequence[str]) -> None:
        """Raise ConfigError for a text that the model cannot be given."""

    @abstractmethod
    def velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        """Velocity [B, C, H, W] in the policy's dtype for float32 samples at float32 sigma [B]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """uint8 images [B, 3, H', W'] of latents [B, C, H, W]."""

    @abstractmethod
    def sigmas(self, num_steps: int) -> Tensor:
        """float64 [num_steps + 1] from 1 to 0: the scheduler's own float32 values."""

    @abstractmethod
    def keep_reference(self) -> None:
        """Keep a copy of the present weights as the reference, for training without adapters."""

    @abstractmethod
    def reference(self) -> AbstractContextManager[None]:
        """Inside, `velocity` is that of the model before training."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trained parameters."""
        return (p for p in self.transformer.parameters() if p.requires_grad)


def choose_device(device: str | torch.device) -> torch.device:
    """The torch device that "auto" or a name stands for."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"policy.device is {str(device)!r}, which cannot be used "
            f"({str(error).splitlines()[0]}), but a device that torch sees is expected; use auto, "
            "cpu or cuda."
        ) from error
    return device


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that "auto" or a name stands for on this device."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto":
        return DTYPES[dtype]
    if device.type == "cuda":
        return torch.bfloat16
    # torch only has private names for these questions; a version without them gets float32.
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    fast = any(getattr(torch.cpu, name, bool)() for name in checks)
    return torch.bfloat16 if device.type == "cpu" and fast else torch.float32


def _pipeline_class(source: str, model: str) -> str:
    """`_class_name` of a pipeline folder or Hub repository."""
    if Path(source).is_dir():
        index = Path(source) / "model_index.json"
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
        )

        try:
            index = Path(hf_hub_download(source, "model_index.json"))
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
            raise ConfigError(
                f"policy.model is {model!r}, which is no folder and could not be found on the "
                f"Hugging Face Hub ({type(error).__name__}); name 'nano', a folder in diffusers' "
                "layout, or a repository that you have access to."
            ) from error
    try:
        return json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"policy.model {model!r} has no readable model_index.json ({error}), but a folder in "
            "diffusers' layout is expected; name one."
        ) from error
