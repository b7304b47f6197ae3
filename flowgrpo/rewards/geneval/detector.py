"""Objects and their colours for GenEval: Mask2Former and CLIP through transformers.

Detection follows the benchmark's (mmdetection 2, mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco):
the image is brought to 800 pixels at its shorter edge but at most 1333 at its longer one, padded to
a multiple of 32 at the right and below; every pair of query and class is a candidate, the best 100
are looked at, and the score is the class probability times the mean mask probability inside the
mask. The box is the mask's, its far corner exclusive.

Colours are CLIP zero-shot, as clip_benchmark does it for the benchmark: the object on grey (#999),
cropped to its box, against the mean of three sentences for each colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from flowgrpo.prompts.sets.geneval_prompts import CLASSES, COLORS
from flowgrpo.rewards import RewardError, clip
from flowgrpo.rewards.geneval.rules import THRESHOLD, Detection
from flowgrpo.rewards.options import check_numbers

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
CANDIDATES = 100
GREY = 0x99
SENTENCES = (
    "a photo of a {color} {name}",
    "a photo of a {color}-colored {name}",
    "a photo of a {color} object",
)


@dataclass(frozen=True)
class Detector:
    """A Mask2Former for the 80 COCO classes."""

    model: Any
    """transformers.Mask2FormerForUniversalSegmentation"""
    batch_size: int
    edge: int = 800
    """Pixels of the shorter edge that the model sees."""

    def __post_init__(self) -> None:
        check_numbers("geneval", {"batch_size": self.batch_size, "edge": self.edge})
        labels = self.model.config.num_labels
        if labels != len(CLASSES):
            raise RewardError(
                f"the detector of reward 'geneval' has {labels} classes, but a Mask2Former for the "
                f"{len(CLASSES)} COCO instance classes is expected; name such a model."
            )

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Detect objects in images, uint8 [B, 3, H, W]; those of an image in no order."""
        detections = []
        size = images.shape[-2:]
        for chunk in images.split(self.batch_size):
            inside, pixels = self._prepare(chunk.to(self.model.device))
            out = self.model(pixel_values=pixels)
            for logits, masks in zip(
                out.class_queries_logits, out.masks_queries_logits, strict=True
            ):
                detections.append(_detections(logits, masks, pixels.shape[-2:], inside, size))
        return detections

    def _prepare(self, images: Tensor) -> tuple[tuple[int, int], Tensor]:
        """Resize, normalise and pad images: (their height and width inside, float32 pixels)."""
        height, width = images.shape[-2:]
        longest = self.edge * 1333 / 800
        scale = min(self.edge / min(height, width), longest / max(height, width))
        inside = int(height * scale + 0.5), int(width * scale + 0.5)
        # OpenCV's bilinear resize, which mmdetection uses, does not smooth before it shrinks.
        pixels = functional.interpolate(
            images.float(), size=inside, mode="bilinear", align_corners=False
        )
        pixels = pixels.round() / 255
        mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        pixels = (pixels - mean) / std
        return inside, functional.pad(pixels, (0, -inside[1] % 32, 0, -inside[0] % 32))


def _detections(
    logits: Tensor,
    masks: Tensor,
    padded: Sequence[int],
    inside: tuple[int, int],
    size: Sequence[int],
) -> list[Detection]:
    """Build the detections of one image from class logits [Q, 81] and mask logits [Q, h, w]."""
    scores = logits.softmax(dim=-1)[:, :-1]
    best, index = scores.flatten().topk(min(CANDIDATES, scores.numel()))
    # A mask's own score is at most 1, so what lies under the threshold here stays there.
    index = index[best > THRESHOLD]
    queries, classes = index // len(CLASSES), index % len(CLASSES)
    if not len(index):
        return []
    resized = _resize(masks[queries].float(), padded)[:, : inside[0], : inside[1]]
    resized = _resize(resized, size)
    binary = resized > 0
    area = binary.flatten(1).sum(1)
    certainty = (resized.sigmoid() * binary).flatten(1).sum(1) / (area + 1e-6)
    values = (scores.flatten()[index] * certainty).tolist()
    return [
        Detection(CLASSES[name], _box(mask), score, mask)
        for name, score, mask, pixels in zip(
            classes.tolist(), values, binary, area.tolist(), strict=True
        )
        if pixels
    ]


def _resize(masks: Tensor, size: Sequence[int]) -> Tensor:
    return functional.interpolate(
        masks[:, None], size=tuple(size), mode="bilinear", align_corners=False
    )[:, 0]


def _box(mask: Tensor) -> tuple[float, float, float, float]:
    """Find the box x1, y1, x2, y2 around a mask, bool [H, W]; x2 and y2 exclusive."""
    x, y = mask.any(dim=0).nonzero()[:, 0], mask.any(dim=1).nonzero()[:, 0]
    return float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)


class ColorClassifier:
    """Names the colours of objects by CLIP."""

    def __init__(self, model: clip.Clip) -> None:
        self.model = model
        self._classifiers: dict[str, Tensor] = {}

    def __call__(self, objects: Sequence[tuple[Tensor, Detection]]) -> list[Detection]:
        """Name the colours of pairs (image uint8 [3, H, W], object in it)."""
        colored: list[Detection] = []
        for start in range(0, len(objects), self.model.batch_size):
            chunk = objects[start : start + self.model.batch_size]
            size = self.model.model.config.vision_config.image_size
            crops = [clip.pixels(_crop(image, detection)[None], size) for image, detection in chunk]
            vectors = self.model.pixels(torch.cat(crops).to(self.model.device))
            for vector, (_, detection) in zip(vectors, chunk, strict=True):
                best = int((self._classifier(detection.name) @ vector).argmax())
                colored.append(replace(detection, color=COLORS[best]))
        return colored

    def _classifier(self, name: str) -> Tensor:
        """Embed the ten colours of an object called `name`: unit vectors [10, D]."""
        if name not in self._classifiers:
            texts = [s.format(color=color, name=name) for color in COLORS for s in SENTENCES]
            vectors = self.model.texts(texts).view(len(COLORS), len(SENTENCES), -1).mean(dim=1)
            self._classifiers[name] = functional.normalize(vectors, dim=-1)
        return self._classifiers[name]


def _crop(image: Tensor, detection: Detection) -> Tensor:
    """Cut the object out at its box, on grey: uint8 [3, h, w]."""
    if detection.mask is not None:
        image = torch.where(detection.mask, image.to(detection.mask.device), GREY)
    x1, y1, x2, y2 = (round(edge) for edge in detection.box)
    return image[:, y1:y2, x1:x2].to(torch.uint8)
