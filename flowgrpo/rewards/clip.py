"""CLIP embeddings of images and texts (Radford et al., https://arxiv.org/abs/2103.00020).

Images are prepared as the CLIP models' own processors do: shorter edge to the model's size (bicubic
interpolation), centre crop, mean and standard deviation of CLIP's training set. It happens on the
model's device, in batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowgrpo.rewards import models
from flowgrpo.rewards.images import resize, resize_smoothly
from flowgrpo.rewards.interface import Reward
from flowgrpo.rewards.options import check_numbers

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def pixels(images: Tensor, size: int, fit: str = "crop") -> Tensor:
    """Prepare images, uint8 [B, 3, H, W], for the model: float32 [B, 3, size, size], normalised.

    Images of another type, in 0 ... 255, are not rounded, so that a gradient comes through.

    fit: "crop" brings the shorter edge to `size` and crops the centre; "pad" brings the longer edge
    there and pads with black.
    """
    height, width = images.shape[-2:]
    edge = min(height, width) if fit == "crop" else max(height, width)
    # torchvision's rule: the long edge is truncated in a crop; HPSv2's: rounded when it pads.
    to_int = int if fit == "crop" else round
    resized = tuple(to_int(side * size / edge) for side in (height, width))
    whole = images.dtype == torch.uint8
    images = (resize if whole else resize_smoothly)(images, resized)
    if fit == "pad":
        down, right = size - resized[0], size - resized[1]
        images = functional.pad(
            images, (right // 2, right - right // 2, down // 2, down - down // 2)
        )
    else:
        top, left = (round((side - size) / 2) for side in resized)
        images = images[..., top : top + size, left : left + size]
    return normalise(images / 255)


def normalise(images: Tensor) -> Tensor:
    """Apply CLIP's normalisation to images, float [B, 3, H, W] in [0, 1]."""
    mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return (images - mean) / std


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its tokenizer."""

    model: Any
    """transformers.CLIPModel"""
    tokenizer: Any
    batch_size: int
    fit: str = "crop"

    def __post_init__(self) -> None:
        check_numbers("clip", {"batch_size": self.batch_size})

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    @torch.inference_mode()
    def images(self, images: Tensor) -> Tensor:
        """Embed images, uint8 [B, 3, H, W], as unit vectors, float32 [B, D]."""
        size = self.model.config.vision_config.image_size
        vectors = [
            self.pixels(pixels(chunk.to(self.device), size, self.fit))
            for chunk in images.split(self.batch_size)
        ]
        return torch.cat(vectors)

    @torch.inference_mode()
    def pixels(self, values: Tensor) -> Tensor:
        """Embed normalised images, [B, 3, size, size], as unit vectors, float32 [B, D]."""
        return self._embed(values)

    def _embed(self, values: Tensor) -> Tensor:
        # Not get_image_features: what it returns differs between transformers 4 and 5.
        pooled = self.model.vision_model(pixel_values=values).pooler_output
        return functional.normalize(self.model.visual_projection(pooled), dim=-1)

    @torch.inference_mode()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Embed B texts as unit vectors, float32 [B, D]; equal texts are encoded once."""
        unique = list(dict.fromkeys(texts))
        length = self.model.config.text_config.max_position_embeddings
        vectors = []
        for start in range(0, len(unique), self.batch_size):
            tokens = self.tokenizer(
                unique[start : start + self.batch_size],
                padding=True,
                truncation=True,
                max_length=length,
                return_tensors="pt",
            ).to(self.device)
            pooled = self.model.text_model(
                input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
            ).pooler_output
            vectors.append(functional.normalize(self.model.text_projection(pooled), dim=-1))
        rows = {text: row for row, text in enumerate(unique)}
        return torch.cat(vectors)[[rows[text] for text in texts]]

    def cosine(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """Compute the cosine between each image and its text, float32 [B]."""
        return (self.images(images) * self.texts(texts)).sum(dim=-1)

    def reward(self, divisor: float) -> Reward:
        """Make the reward exp(logit_scale) cosine / divisor, which is differentiable too."""

        def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
            return self.scale * self.cosine(images, prompts) / divisor

        def of_pixels(values: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
            size = self.model.config.vision_config.image_size
            vectors = self._embed(pixels(values.to(self.device), size, self.fit))
            # A copy, because autograd saves no tensor that was made in inference mode.
            texts = self.texts(prompts).clone()
            return self.scale.detach() * (vectors * texts).sum(dim=-1) / divisor

        rate.of_pixels = of_pixels
        return rate

    @property
    def scale(self) -> Tensor:
        """Factor of the cosine in the model's logits (100 in most CLIP models)."""
        return self.model.logit_scale.exp()


def load(
    model: str,
    *,
    tokenizer: str | None = None,
    device: str = "auto",
    batch_size: int = 32,
    revision: str | None = None,
    fit: str = "crop",
) -> Clip:
    """Load the CLIP model of a folder or Hub id; `tokenizer`: another of its tokenizer."""
    network = models.pretrained("CLIPModel", model, models.device(device), revision)
    return Clip(network, models.tokenizer(tokenizer or model), batch_size, fit)
