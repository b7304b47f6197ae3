"""CLIP score: how well an image fits its text (Radford et al., https://arxiv.org/abs/2103.00020;
model card https://huggingface.co/openai/clip-vit-large-patch14).

    score = exp(logit_scale) cos(image, text) / 30

The divisor is flow_grpo's. One departure: flow_grpo resizes bilinearly, CLIP and we bicubically.
"""

from __future__ import annotations

from flowgrpo.rewards import clip
from flowgrpo.rewards.options import configurable

DIVISOR = 30.0


@configurable("clipscore")
def score(
    *,
    model: str = "openai/clip-vit-large-patch14",
    device: str = "auto",
    batch_size: int = 32,
):
    """Build the CLIP score: CLIP's logit / 30."""
    encoder = clip.load(model, device=device, batch_size=batch_size)
    return encoder.reward(DIVISOR)
