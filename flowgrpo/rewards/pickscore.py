"""PickScore: human preference between images of one prompt (Kirstain et al.,
https://arxiv.org/abs/2305.01569; model card https://huggingface.co/yuvalkirstain/PickScore_v1).

    score = exp(logit_scale) cos(image, text) / 26

Images that people prefer have a logit (exp(logit_scale) cos) of about 20 to 26; flow_grpo divides
by 26, and so do we, so that weights carry over.
"""

from __future__ import annotations

from flowgrpo.rewards import clip
from flowgrpo.rewards.options import configurable

DIVISOR = 26.0


@configurable("pickscore")
def score(
    *,
    model: str = "yuvalkirstain/PickScore_v1",
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    device: str = "auto",
    batch_size: int = 32,
):
    """Build PickScore / 26. Its tokenizer is that of the CLIP model that it was tuned from."""
    encoder = clip.load(model, tokenizer=tokenizer, device=device, batch_size=batch_size)
    return encoder.reward(DIVISOR)
