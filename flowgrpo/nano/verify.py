"""nano's verifier: finds the objects of images by classical vision, and compares them with the
prompts.

A pixel belongs to the foreground when it is far from the background colour; 4-connected components
of the foreground are objects. An object's colour is the palette entry nearest to the mean of its
core. Its shape is the template, painted by `scenes.coverage` at the object's own centroid and area,
that overlaps its opacity best (soft intersection over union); an object that no template fits, or
whose colour is far from the palette, is junk. All images of a batch are looked at together, at half
their resolution.

`score` follows GenEval: *strict* is 1 only if exactly the asked objects are there, with the asked
colours and position; *partial* is the share of the requirements met, the form of reward that Flow-
GRPO trains GenEval with.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from flowgrpo.nano.scenes import (
    BACKGROUND,
    CELL,
    COLORS,
    IMAGE_SIZE,
    PALETTE,
    RELATIONS,
    SHAPES,
    centroid,
    coverage,
    relation,
)

# Colour distances are Euclidean in RGB / 255.
FOREGROUND_DISTANCE = 0.25
COLOR_DISTANCE = 0.25
MIN_OVERLAP = 0.70
# Images are looked at in blocks of POOL x POOL pixels, GRID of them on a side. Areas are in blocks:
# below SPECK a component is not counted, below MIN_AREA it has no shape.
POOL = 2
GRID = IMAGE_SIZE // POOL
SPECK, MIN_AREA = 2, 20.0
SCALES = np.linspace(0.79, 1.21, 7)
_BACKGROUND = np.array(BACKGROUND, dtype=np.float32) / 255
_PALETTE = PALETTE / 255
_COLOR_NAMES = tuple(COLORS)
# Templates are painted in a window of this side, at fractional centroids on a grid of 1 / _FRACTION
# block.
_WINDOW, _FRACTION = CELL // POOL, 4
# Neighbours in the same image: connects components, and grows them.
_PLANE = np.zeros((3, 3, 3), dtype=bool)
_PLANE[1] = ndimage.generate_binary_structure(2, 1)


# How far a trained model's quality figures may move from the base model's before the run is said to
# have paid for accuracy with quality: above 0 a rise, below 0 a fall. Colours and background may
# drift by 5 of 255 levels, which is hardly seen. Diversity may fall somewhat: the base model draws
# objects that were not asked for.
TOLERANCES = {"palette": 0.02, "background": 0.02, "junk": 0.03, "diversity": -0.06}


@dataclass(frozen=True)
class Objects:
    """The objects of B images, in the order of the images and of their first pixel."""

    image: np.ndarray
    """int [N]: index of the image."""
    shape: np.ndarray
    """int [N]: index into SHAPES, or -1 where unrecognisable."""
    color: np.ndarray
    """int [N]: index into COLORS, or -1 where unrecognisable."""
    center: np.ndarray
    """float [N, 2]: centroid (x, y) in pixels."""
    extent: np.ndarray
    """float [N, 2]: sides of the box in pixels."""
    color_error: np.ndarray
    """float [N]: distance of the colour from the nearest of the palette."""

    def names(self, image: int) -> list[tuple[str | None, str | None]]:
        """List (shape, color) of one image's objects, None where unrecognisable."""
        return [
            (SHAPES[s] if s >= 0 else None, _COLOR_NAMES[c] if c >= 0 else None)
            for i, s, c in zip(self.image, self.shape, self.color, strict=True)
            if i == image
        ]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Paint the templates: opacity [shape, scale, fy, fx, W * W] and areas [shape, scale].

    Each window has the template's *centroid* (not its box centre) at column and row W // 2 + f /
    _FRACTION.
    """
    fractions = np.arange(_FRACTION) / _FRACTION
    middle = np.array([(x, y) for y in fractions for x in fractions]) + _WINDOW // 2
    windows = np.stack(
        [
            [coverage(k, POOL * middle - centroid(k) * s, s, POOL * _WINDOW) for s in SCALES]
            for k in range(len(SHAPES))
        ]
    )
    windows = windows.reshape(*windows.shape[:3], _WINDOW, POOL, _WINDOW, POOL).mean((4, 6))
    areas = windows.sum((3, 4)).mean(2)
    return windows.reshape(len(SHAPES), len(SCALES), _FRACTION, _FRACTION, -1), areas


def _offsets(images: np.ndarray) -> np.ndarray:
    """Mean colour of each block minus the background's, float32 [3, B, GRID, GRID] in RGB / 255."""
    pixels = images.astype(np.uint16)
    rows = pixels[:, :, 0::POOL] + pixels[:, :, 1::POOL]
    sums = rows[..., 0::POOL] + rows[..., 1::POOL]
    scaled = sums.transpose(1, 0, 2, 3) * np.float32(1 / (255 * POOL * POOL))
    return scaled - _BACKGROUND[:, None, None, None]


def find_objects(images) -> Objects:
    """Find the objects of images, uint8 [B, 3, 64, 64]."""
    return _find(_offsets(_as_numpy(images)))


def _find(offset: np.ndarray) -> Objects:
    mask = (offset * offset).sum(0) > FOREGROUND_DISTANCE**2
    labels, count = ndimage.label(mask, _PLANE)
    if not count:
        none = np.zeros(0, dtype=int)
        return Objects(none, none, none, np.zeros((0, 2)), np.zeros((0, 2)), np.zeros(0))
    core = _inner(mask)
    where = np.flatnonzero(mask)
    label = labels.reshape(-1)[where] - 1
    image, block = np.divmod(where, GRID * GRID)
    y, x = np.divmod(block, GRID)
    ink = offset.reshape(3, -1)[:, where]

    def total(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(label, values, minlength=count)

    # The core: blocks inside the edge, whose colour is not mixed with the background.
    inside = core.reshape(-1)[where].astype(np.float32)
    weight = np.where((total(inside) >= 4)[label], inside, 1.0)
    color = np.stack([total(weight * channel) for channel in ink]) / total(weight)
    # Opacity by projection on the object's own colour.
    length = np.maximum((color * color).sum(0), 1e-6)
    alpha = ((ink * color[:, label]).sum(0) / length[label]).clip(0.0, 1.0)
    area = np.maximum(total(alpha), 1e-6)
    center = np.stack([total(alpha * (x + 0.5)), total(alpha * (y + 0.5))], axis=-1) / area[:, None]
    order = np.argsort(label, kind="stable")
    starts = np.searchsorted(label[order], np.arange(count))
    extent = np.stack(
        [
            np.maximum.reduceat(side, starts) - np.minimum.reduceat(side, starts) + 1
            for side in (x[order], y[order])
        ],
        axis=-1,
    )
    large = total() > SPECK
    owner = image[order][starts][large]
    color, center, extent = color.T[large], center[large], extent[large]
    shape = _classify(offset, labels, owner, np.flatnonzero(large) + 1, color, center)
    errors = np.sqrt(((_PALETTE - _BACKGROUND - color[:, None]) ** 2).sum(-1))
    nearest = errors.argmin(1)
    error = errors[np.arange(len(errors)), nearest]
    nearest = np.where((error <= COLOR_DISTANCE) & (shape >= 0), nearest, -1)
    return Objects(owner, shape, nearest, POOL * center, POOL * extent.astype(float), error)


def _inner(mask: np.ndarray) -> np.ndarray:
    """Blocks all of whose four neighbours are in the mask [B, H, W]."""
    inner = np.zeros_like(mask)
    inner[:, 1:-1, 1:-1] = (
        mask[:, 1:-1, 1:-1]
        & mask[:, :-2, 1:-1]
        & mask[:, 2:, 1:-1]
        & mask[:, 1:-1, :-2]
        & mask[:, 1:-1, 2:]
    )
    return inner


def _classify(
    offset: np.ndarray,
    labels: np.ndarray,
    owner: np.ndarray,
    label: np.ndarray,
    color: np.ndarray,
    center: np.ndarray,
) -> np.ndarray:
    """Choose the shape that each object's opacity overlaps best, int [N]; -1 if none enough."""
    windows, areas = _templates()
    position = np.floor(center * _FRACTION + 0.5) / _FRACTION  # (x, y) on the template grid
    pixel = np.floor(position).astype(int)
    fx, fy = ((position - pixel) * _FRACTION).astype(int).T
    span = np.arange(_WINDOW) - _WINDOW // 2
    x, y = pixel[:, 0, None] + span, pixel[:, 1, None] + span
    seen = ((x >= 0) & (x < GRID))[:, None, :] & ((y >= 0) & (y < GRID))[:, :, None]
    index = owner[:, None, None] * GRID * GRID
    index = index + y.clip(0, GRID - 1)[:, :, None] * GRID + x.clip(0, GRID - 1)[:, None, :]
    index = index.reshape(len(owner), -1)
    # The object's own blocks, and background ones, which hold the faint part of its edge.
    near = labels.reshape(-1)[index]
    member = ((near == label[:, None]) | (near == 0)) & seen.reshape(index.shape)
    flat = offset.reshape(3, -1)
    alpha = sum(flat[c][index] * color[:, c, None] for c in range(3))
    alpha /= np.maximum((color * color).sum(1), 1e-6)[:, None]
    alpha = np.where(member, alpha.clip(0.0, 1.0), 0.0).astype(np.float32)
    area = alpha.sum(1)
    best, best_overlap = np.full(len(owner), -1), np.full(len(owner), MIN_OVERLAP)
    for k in range(len(SHAPES)):
        j = np.abs(areas[k] - area[:, None]).argmin(1)
        common = np.minimum(alpha, windows[k, j, fy, fx]).sum(1)
        overlap = common / np.maximum(area + areas[k, j] - common, 1e-6)
        better = (overlap > best_overlap) & (area >= MIN_AREA)
        best, best_overlap = np.where(better, k, best), np.where(better, overlap, best_overlap)
    return best


def _score_one(objects: Objects, rows: range, metadata: dict) -> tuple[float, float]:
    """Score the objects `rows` of one image against one GenEval-style record: (strict, partial)."""
    shapes, colors = objects.shape[rows.start : rows.stop], objects.color[rows.start : rows.stop]
    shapes, colors = shapes.tolist(), colors.tolist()
    groups, terms = [], []
    for wish in metadata["include"]:
        kind = SHAPES.index(wish["class"])
        group = [i for i, shape in enumerate(shapes) if shape == kind]
        terms.append(max(0.0, 1.0 - abs(len(group) - wish["count"]) / wish["count"]))
        if "color" in wish:
            color = _COLOR_NAMES.index(wish["color"])
            right = [i for i in group if colors[i] == color]
            terms.append(min(len(right), wish["count"]) / wish["count"])
            # With colours asked for, the position is that of the rightly coloured objects, where
            # there are any.
            group = right or group
        if "position" in wish:
            name, target = wish["position"]
            others = groups[target]
            holds = bool(group and others) and _holds(
                name, objects, rows[group[0]], rows[others[0]]
            )
            terms.append(float(holds))
        groups.append(group)
    asked = sum(w["count"] for w in metadata["include"])
    classes = {SHAPES.index(w["class"]) for w in metadata["include"]}
    extra = sum(s not in classes or c < 0 for s, c in zip(shapes, colors, strict=True))
    strict = float(extra == 0 and all(t == 1.0 for t in terms))
    partial = sum(terms) / len(terms) * max(0.0, 1.0 - extra / (asked + 1))
    return strict, partial


def _holds(name: str, objects: Objects, a: int, b: int) -> bool:
    offset = objects.center[a] - objects.center[b]
    extent = objects.extent[a] + objects.extent[b]
    return bool(relation(offset, extent)[RELATIONS.index(name)])


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
        images: uint8 [B, 3, 64, 64], array or tensor.
        metadata: B records in GenEval's format ("include": class, count, color, position).

    Returns:
        {"strict": float32 [B] of 0 or 1, "partial": float32 [B] in [0, 1]}.
    """
    images = _as_numpy(images)
    if len(images) != len(metadata):
        raise ValueError(
            f"metadata: expected {len(images)} records, one an image, got {len(metadata)}"
        )
    objects = find_objects(images)
    ends = np.searchsorted(objects.image, np.arange(len(images) + 1))
    pairs = [
        _score_one(objects, range(ends[i], ends[i + 1]), record)
        for i, record in enumerate(metadata)
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
    offset = _offsets(images)
    objects = _find(offset)
    known = objects.color >= 0
    near = (offset * offset).sum(0) > FOREGROUND_DISTANCE**2
    near = ndimage.binary_dilation(near, _PLANE, iterations=2)
    squared = np.square(images / np.float32(255) - _BACKGROUND[:, None, None]).mean(1)
    squared = squared.reshape(-1, GRID, POOL, GRID, POOL).mean((2, 4))
    far = (~near).sum((1, 2))
    errors = np.where(near, 0.0, squared).sum((1, 2))[far > 0] / far[far > 0]
    return {
        "palette": float(objects.color_error[known].mean()) if known.any() else 1.0,
        "background": float(np.sqrt(errors.mean())) if len(errors) else 1.0,
        "junk": float(1 - known.mean()) if len(known) else 1.0,
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
