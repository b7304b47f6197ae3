"""LAION's aesthetic predictor v2: a rating of 1 ... 10 by a linear map of the CLIP-L embedding
(https://github.com/christophschuhmann/improved-aesthetic-predictor, sac+logos+ava1-l14-linearMSE).

    score = W5 (W4 (W3 (W2 (W1 e + b1) + b2) + b3) + b4) + b5,    e = the image's unit vector

Its five layers 768-1024-128-64-16-1 have no activation between them. The author's file is a pickle;
the default head is a copy as safetensors (https://huggingface.co/ttj/sac-logos-ava1-l14-linearMSE).
The names of its tensors end in layers.0.weight, layers.0.bias, layers.2.weight, ... as in the
author's; other tensors in the file are left alone.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor
from torch.nn import functional

from flowgrpo.rewards import RewardError, clip, models
from flowgrpo.rewards.options import configurable


@configurable("aesthetic")
def score(
    *,
    model: str = "openai/clip-vit-large-patch14",
    head: str = "ttj/sac-logos-ava1-l14-linearMSE",
    device: str = "auto",
    batch_size: int = 32,
):
    """Build the aesthetic predictor: a rating of 1 ... 10."""
    encoder = clip.load(model, device=device, batch_size=batch_size)
    layers = [(w.to(encoder.device), b.to(encoder.device)) for w, b in linear_layers(head)]
    if layers[0][0].shape[1] != encoder.model.config.projection_dim:
        raise RewardError(
            f"the head {head} of reward 'aesthetic' takes vectors of {layers[0][0].shape[1]} "
            f"numbers, but {model} gives {encoder.model.config.projection_dim}; use the CLIP model "
            "that the head was made for."
        )

    @torch.inference_mode()
    def rate(images, prompts, metadata) -> Tensor:
        values = encoder.images(images)
        for weight, bias in layers:
            values = functional.linear(values, weight, bias)
        return values[:, 0]

    return rate


def linear_layers(head: str) -> list[tuple[Tensor, Tensor]]:
    """Read (weight [out, in], bias [out]) of the head's layers, first to last."""
    tensors: dict[int, dict[str, Tensor]] = {}
    for name, tensor in models.tensors(head).items():
        match = re.search(r"(?:^|\.)layers\.(\d+)\.(weight|bias)$", name)
        if match:
            tensors.setdefault(int(match[1]), {})[match[2]] = tensor.float()
    layers = [(tensors[i].get("weight"), tensors[i].get("bias")) for i in sorted(tensors)]
    if not layers or any(tensor is None for layer in layers for tensor in layer):
        raise RewardError(
            f"the head {head} of reward 'aesthetic' has no complete layers.N.weight and "
            "layers.N.bias, but those of the linear aesthetic predictor are expected; name its "
            "safetensors file."
        )
    return layers
