"""`KontextPolicy`: FLUX.1-Kontext behind the trainer's interface."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from flowgrpo.policies.flux.policy import FluxPolicy
from flowgrpo.prompts.pictures import read_picture
from flowgrpo.records import Conditioning


@final
class KontextPolicy(FluxPolicy):
    """`Policy` of a FluxKontextPipeline."""

    def _positions_of(self, sample: Tensor) -> Tensor:
        reference = sample.clone()
        reference[:, 0] = 1
        return torch.cat([sample, reference])

    @torch.no_grad()
    def _reference_latents(self, path: str) -> Tensor:
        processor = self.pipeline.image_processor
        image = processor.resize(read_picture(path), self.height, self.width)
        pixels = processor.preprocess(image, self.height, self.width)
        return self.latents(pixels.to(self.device)).to(self.dtype)

    def _velocity(self, sample: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if conditioning.reference is None:
            raise ValueError("conditioning: of texts alone; encode them with images")
        tokens = torch.cat([sample.to(self.dtype), conditioning.reference], dim=1)
        velocity = super()._velocity(tokens, sigma, conditioning)
        return velocity[:, : sample.shape[1]].contiguous()
