"""HPS v2: human preference score (Wu et al., https://arxiv.org/abs/2306.09341).

    score = cos(image, text)          a ViT-H/14 CLIP, tuned on human choices; usually 0.2 ... 0.35

The published checkpoints are pickles in open_clip's layout. The default is a conversion to
transformers' CLIPModel (https://huggingface.co/adams-story/HPSv2-hf), in the revision that has its
weights as safetensors. Any other conversion works by the option `model`, HPS v2.1 too.
Images are prepared as by HPS v2's own code: the longer edge to 224, padded to a square with black.
"""

from __future__ import annotations

from flowgrpo.rewards import clip
from flowgrpo.rewards.options import configurable


@configurable("hpsv2")
def score(
    *,
    model: str = "adams-story/HPSv2-hf",
    revision: str = "refs/pr/2",
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    device: str = "auto",
    batch_size: int = 32,
):
    """Build HPS v2: the cosine between image and text. `revision` is used with a Hub id only."""
    encoder = clip.load(
        model,
        tokenizer=tokenizer,
        device=device,
        batch_size=batch_size,
        revision=revision,
        fit="pad",
    )
    return lambda images, prompts, metadata: encoder.cosine(images, prompts)
