"""nano's verifier: finds the objects of an image by classical vision, and compares them with the
prompt.

A pixel belongs to the foreground when it is far from the background colour; 4-connected components
of the foreground are objects. An object's colour is the palette entry nearest to the median of its
core. Its shape is the template, painted by `scenes.coverage` at the object's own centroid and area,
that overlaps its opacity best (soft intersection over union); an object that no template fits, or
whose colour is far from the palette, is junk.

`score` follows GenEval: *strict* is 1 only if exactly the asked objects are there, with the asked
colours and position; *partial* is the share of the requirements met, the form of reward that Flow-
GRPO trains GenEval with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from flowgrpo.nano.scenes import BACKGROUND, COLORS, IMAGE_SIZE, PALETTE, SHAPES, coverage, relation

# Colour distances are Euclidean in RGB / 255.
FOREGROUND_DISTANCE = 0.25
COLOR_DISTANCE = 0.25
MIN_AREA = 12.0
MIN_OVERLAP = 0.70
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32) / 255
_PALETTE = PALETTE / 255
_COLOR_NAMES = tuple(COLORS)
# Templates are painted in a window of this side, at fractional centroids on a grid of 1 / _FRACTION
# pixel.
_WINDOW, _FRACTION = 14, 4


# How far a trained model's quality figures may move from the base model's before the run is said to
# have paid for accuracy with quality: above 0 a rise, below 0 a fall. Colours and background may
# drift by 5 of 255 levels, which is hardly seen. Diversity may fall somewhat: the base model draws
# objects that were not asked for, and real pictures of the held-out prompts have 0.23.
TOLERANCES = {"palette": 0.02, "background": 0.02, "junk": 0.03, "diversity": -0.06}


@dataclass(frozen=True)
class Detected:
    """One object of an image: its names (None where unrecognisable), centroid and box sides in
    pixels."""

    shape: str | None
    color: str | None
    center: tuple[float, float]
    extent: tuple[float, float]
    color_error: float


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Paint the templates: opacity [shape, scale, fy, fx, W, W] and areas [shape, scale].

    Each window has the template's *centroid* (not its box centre) at column and row W // 2 + f /
    _FRACTION.
    """
    scales = np.linspace(0.55, 1.5, 39)
    fractions = np.arange(_FRACTION) / _FRACTION
    windows = np.empty(
        (len(SHAPES), len(scales), _FRACTION, _FRACTION, _WINDOW, _WINDOW), np.float32
    )
    areas = np.empty((len(SHAPES), len(scales)))
    for k in range(len(SHAPES)):
        # The triangle's centroid lies a third of its height above its base: 7.6 / 2 - 7.6 / 3 below
        # the box centre.
        below = (7.6 / 2 - 7.6 / 3) if SHAPES[k] == "triangle" else 0.0
        for j, scale in enumerate(scales):
            fy, fx = (f.reshape(-1) for f in np.meshgrid(fractions, fractions, indexing="ij"))
            center = np.stack([_WINDOW // 2 + fx, _WINDOW // 2 + fy - below * scale], axis=-1)
            painted = coverage(np.full(len(fx), k), center, np.full(len(fx), scale), _WINDOW)
            windows[k, j] = painted.reshape(_FRACTION, _FRACTION, _WINDOW, _WINDOW)
            areas[k, j] = painted.sum((1, 2)).mean()
    return windows, areas


def _classify(alpha: np.ndarray, center: np.ndarray, area: float) -> str | None:
    """Choose the shape that an object's opacity, `alpha` [24, 24], overlaps best; None if none
    enough."""
    windows, areas = _templates()
    position = np.floor(center * _FRACTION + 0.5) / _FRACTION  # (x, y) on the template grid
    pixel = np.floor(position).astype(int)
    fx, fy = ((position - pixel) * _FRACTION).astype(int)
    half = _WINDOW // 2
    padded = np.pad(alpha, _WINDOW)
    top, left = pixel[1] - half + _WINDOW, pixel[0] - half + _WINDOW
    patch = padded[top : top + _WINDOW, left : left + _WINDOW]
    best, best_overlap = None, MIN_OVERLAP
    for k, name in enumerate(SHAPES):
        j = int(np.abs(areas[k] - area).argmin())
        template = windows[k, j, fy, fx]
        overlap = np.minimum(patch, template).sum() / max(np.maximum(patch, template).sum(), 1e-6)
        if overlap > best_overlap:
            best, best_overlap = name, overlap
    return best


def find_objects(image: np.ndarray) -> list[Detected]:
    """Find the objects of one image, uint8 [3, 24, 24], in the order of their first pixel."""
    pixels = image.astype(np.float32).transpose(1, 2, 0) / 255
    offset = pixels - _BACKGROUND
    distance = np.sqrt((offset * offset).sum(-1))
    labels, count = ndimage.label(distance > FOREGROUND_DISTANCE)
    objects = []
    for index in range(1, count + 1):
        mask = labels == index
        if mask.sum() < MIN_AREA / 2:
            if mask.sum() >= 3:
                objects.append(_junk(mask))
            continue
        # The core: pixels inside the edge, whose colour is not mixed with the background.
        core = ndimage.binary_erosion(mask)
        core = core if core.sum() >= 4 else mask
        color = np.median(pixels[core], axis=0)
        # Opacity by projection on the object's own colour; the ring around the mask holds the faint
        # edge pixels.
        ink = color - _BACKGROUND
        ring = ndimage.binary_dilation(mask) & ((labels == 0) | mask)
        alpha = np.where(ring, (offset @ ink) / max(float(ink @ ink), 1e-6), 0.0).clip(0.0, 1.0)
        area = float(alpha.sum())
        rows, cols = np.nonzero(mask)
        extent = (float(np.ptp(cols) + 1), float(np.ptp(rows) + 1))
        grid = np.arange(IMAGE_SIZE) + 0.5
        center = np.array([(alpha.sum(0) * grid).sum(), (alpha.sum(1) * grid).sum()]) / max(
            area, 1e-6
        )
        errors = np.sqrt(((_PALETTE - color) ** 2).sum(-1))
        nearest = int(errors.argmin())
        error = float(errors[nearest])
        shape = _classify(alpha, center, area) if area >= MIN_AREA else None
        name = _COLOR_NAMES[nearest] if error <= COLOR_DISTANCE else None
        objects.append(Detected(shape, name, (float(center[0]), float(center[1])), extent, error))
    return objects


def _junk(mask: np.ndarray) -> Detected:
    rows, cols = np.nonzero(mask)
    extent = (float(np.ptp(cols) + 1), float(np.ptp(rows) + 1))
    return Detected(None, None, (float(cols.mean()) + 0.5, float(rows.mean()) + 0.5), extent, 1.0)


def _score_one(objects: list[Detected], metadata: dict) -> tuple[float, float]:
    """Score one image's objects against one GenEval-style record: (strict, partial)."""
    groups, terms = [], []
    for wish in metadata["include"]:
        group = [o for o in objects if o.shape == wish["class"]]
        terms.append(max(0.0, 1.0 - abs(len(group) - wish["count"]) / wish["count"]))
        if "color" in wish:
            right = [o for o in group if o.color == wish["color"]]
            terms.append(min(len(right), wish["count"]) / wish["count"])
            # With colours asked for, the position is that of the rightly coloured objects, where
            # there are any.
            group = right or group
        if "position" in wish:
            names, target = wish["position"]
            terms.append(float(_holds(names, group, groups[target])))
        groups.append(group)
    asked = sum(w["count"] for w in metadata["include"])
    classes = {w["class"] for w in metadata["include"]}
    extra = sum(o.shape not in classes or o.color is None for o in objects)
    strict = float(extra == 0 and all(t == 1.0 for t in terms))
    partial = sum(terms) / len(terms) * max(0.0, 1.0 - extra / (asked + 1))
    return strict, partial


def _holds(name: str, group: list[Detected], others: list[Detected]) -> bool:
    if not group or not others:
        return False
    a, b = group[0], others[0]
    offset = np.subtract(a.center, b.center)
    index = ("left of", "right of", "above", "below").index(name)
    return bool(relation(offset, np.add(a.extent, b.extent))[index])


def _as_numpy(images) -> np.ndarray:
    images = images.cpu().numpy() if hasattr(images, "cpu") else np.asarray(images)
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1:] != (3, IMAGE_SIZE, IMAGE_SIZE)
    ):
        raise ValueError(
            f"images: expected uint8 [B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}], got {images.dtype} "
            f"{list(images.shape)}"
        )
    return images


def score(images, metadata: list[dict]) -> dict[str, np.ndarray]:
    """Score images against their prompts' metadata, strictly and partially.

    Args:
        images: uint8 [B, 3, 24, 24], array or tensor.
        metadata: B records in GenEval's format ("include": class, count, color, position).

    Returns:
        {"strict": float32 [B] of 0 or 1, "partial": float32 [B] in [0, 1]}.
    """
    images = _as_numpy(images)
    if len(images) != len(metadata):
        raise ValueError(
            f"metadata: expected {len(images)} records, one an image, got {len(metadata)}"
        )
    pairs = [
        _score_one(find_objects(image), record)
        for image, record in zip(images, metadata, strict=True)
    ]
    strict, partial = np.array(pairs, dtype=np.float32).reshape(-1, 2).T
    return {"strict": strict, "partial": partial}


def quality(images, metadata: list[dict]) -> dict[str, float]:
    """Measure reward hacking: how clean and how varied the images are, whatever their prompts.

    Returns:
        palette: mean RGB distance (0 to 1 a channel) of the objects' colours from their palette
            entries; lower is cleaner.
        background: root-mean-square error of the pixels that belong to no object or edge, against
            the background colour.
        junk: share of the found objects that are no known shape or colour.
        diversity: mean RMS pixel distance between two images of the same prompt; 0 if no prompt
            comes twice.
    """
    images = _as_numpy(images)
    errors, backgrounds, junk, total = [], [], 0, 0
    for image in images:
        for o in find_objects(image):
            total += 1
            junk += o.shape is None or o.color is None
            if o.color is not None:
                errors.append(o.color_error)
        pixels = image.astype(np.float32).transpose(1, 2, 0) / 255 - _BACKGROUND
        near = ndimage.binary_dilation(
            np.sqrt((pixels**2).sum(-1)) > FOREGROUND_DISTANCE, iterations=2
        )
        if not near.all():
            backgrounds.append(float(np.mean(pixels[~near] ** 2)))
    return {
        "palette": float(np.mean(errors)) if errors else 1.0,
        "background": float(np.sqrt(np.mean(backgrounds))) if backgrounds else 1.0,
        "junk": junk / total if total else 1.0,
        "diversity": _diversity(images, [m["prompt"] for m in metadata]),
    }


def _diversity(images: np.ndarray, prompts: list[str]) -> float:
    by_prompt: dict[str, list[np.ndarray]] = {}
    for image, prompt in zip(images, prompts, strict=True):
        by_prompt.setdefault(prompt, []).append(image.astype(np.float32).reshape(-1) / 255)
    distances = []
    for group in by_prompt.values():
        stack = np.stack(group)
        for i in range(len(stack) - 1):
            distances.extend(np.sqrt(((stack[i + 1 :] - stack[i]) ** 2).mean(-1)))
    return float(np.mean(distances)) if distances else 0.0
