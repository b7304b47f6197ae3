"""GenEval: objects, counts, colours and positions of the prompt, looked for in the image (Ghosh et
al., https://arxiv.org/abs/2310.11513).

geneval          the partial reward that flow_grpo trains with
geneval_strict   1 if everything holds, else 0: the benchmark's figure

The rules are in rules.py, detection and colours in detector.py. Deliberate
departures from the benchmark, none of them in the rules:

1. Mask2Former is transformers' (the authors' own Swin-S weights for COCO instances,
   https://huggingface.co/facebook/mask2former-swin-small-coco-instance) and not mmdetection's
   retrained one, so that nothing has to be compiled. Figures differ a little from those with
   mmdetection.
2. CLIP ViT-L/14 is transformers' copy of OpenAI's weights, in float32 and without autocast.
3. Images arrive as they are. flow_grpo's server compresses them as JPEG and hands the detector red
   and blue in each other's place.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from flowgrpo.rewards import clip, models
from flowgrpo.rewards.geneval import rules
from flowgrpo.rewards.geneval.detector import ColorClassifier, Detector
from flowgrpo.rewards.geneval.rules import Objects
from flowgrpo.rewards.options import configurable

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
CLIP = "openai/clip-vit-large-patch14"


@configurable("geneval", check=lambda prompt, entry: rules.check(entry))
def partial(
    *,
    model: str = DETECTOR,
    clip_model: str = CLIP,
    device: str = "auto",
    batch_size: int = 8,
    edge: int = 800,
):
    """Build flow_grpo's reward, at most 1. edge: shorter edge that the detector sees, in pixels."""
    return _reward(rules.partial, model, clip_model, device, batch_size, edge)


@configurable("geneval", check=lambda prompt, entry: rules.check(entry))
def strict(
    *,
    model: str = DETECTOR,
    clip_model: str = CLIP,
    device: str = "auto",
    batch_size: int = 8,
    edge: int = 800,
):
    """Build the benchmark's judgement, 0 or 1."""

    def judge(objects: Objects, metadata: Mapping[str, Any]) -> float:
        return float(rules.strict(objects, metadata)[0])

    return _reward(judge, model, clip_model, device, batch_size, edge)


def _reward(
    judge: Callable[[Objects, Mapping[str, Any]], float],
    model: str,
    clip_model: str,
    device: str,
    batch_size: int,
    edge: int,
):
    detector = _cached_detector(model, clip_model, device, batch_size, edge)

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        for entry in metadata:
            rules.check(entry)
        pairs = zip(detector(images, metadata), metadata, strict=True)
        return [judge(objects, entry) for objects, entry in pairs]

    return rate


@cache
def _cached_detector(
    model: str, clip_model: str, device: str, batch_size: int, edge: int
) -> CachedDetector:
    """Load one pair of models for both rewards."""
    network = models.pretrained("Mask2FormerForUniversalSegmentation", model, models.device(device))
    return CachedDetector(
        Detector(network, batch_size, edge), ColorClassifier(clip.load(clip_model, device=device))
    )


class CachedDetector:
    """Detector and colours that remember their last result.

    Both rewards are often asked about the same images, one after the other.
    """

    def __init__(self, detector: Detector, classifier: ColorClassifier) -> None:
        self.detector, self.classifier = detector, classifier
        self._last: tuple[Any, int, list[dict[str, Any]], list[Objects]] | None = None

    def __call__(self, images: Tensor, metadata: list[dict[str, Any]]) -> list[Objects]:
        """Detect the objects of each image that count, with colours where the metadata has them."""
        if self._last is not None:
            reference, version, entries, objects = self._last
            # The version counts writes in place: the same tensor may hold other images by now.
            if reference() is images and version == images._version and entries == metadata:
                return objects
        objects = self._detect(images, metadata)

        def forget(reference: Any) -> None:
            if self._last is not None and self._last[0] is reference:
                self._last = None

        self._last = weakref.ref(images, forget), images._version, list(metadata), objects
        return objects

    def _detect(self, images: Tensor, metadata: list[dict[str, Any]]) -> list[Objects]:
        objects = [
            rules.select(detections, entry["tag"])
            for detections, entry in zip(self.detector(images), metadata, strict=True)
        ]
        colored_classes = [
            (row, wish["class"])
            for row, entry in enumerate(metadata)
            for wish in entry["include"]
            if "color" in wish
        ]
        targets = [
            (row, name, i)
            for row, name in dict.fromkeys(colored_classes)
            for i in range(len(objects[row].get(name, ())))
        ]
        colored = self.classifier(
            [(images[row], objects[row][name][i]) for row, name, i in targets]
        )
        for (row, name, i), detection in zip(targets, colored, strict=True):
            objects[row][name][i] = detection
        return objects
