"""The world that nano draws: a few coloured shapes on a light background, 24 x 24 pixels.

A scene is a list of objects (shape, colour, centre, scale). `render` paints scenes by analytic
coverage: the signed distance to a shape's edge, clipped to one pixel, is its opacity, so edges are
anti-aliased and a shape can sit anywhere between pixels. The verifier (`verify.py`) compares with
templates painted by the same function.

Units are pixels; x grows to the right, y grows downwards, the pixel in column i has its centre at i
+ 0.5.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IMAGE_SIZE = 24
SHAPES = ("circle", "square", "triangle")
COLORS = {
    "red": (214, 40, 57),
    "green": (46, 158, 79),
    "blue": (38, 84, 208),
    "yellow": (244, 190, 30),
    "purple": (146, 64, 178),
}
BACKGROUND = (246, 244, 238)
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = 4

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
SCALE_RANGE = (0.9, 1.15)
# Half the side of the square that an object of scale 1 occupies in a layout, whatever its shape.
HALF_EXTENT = 3.9
# Free pixels between the boxes of two objects, and between a box and the border.
GAP, MARGIN = 1.5, 0.5


@dataclass(frozen=True)
class Layout:
    """Positions of n objects each in M scenes: centres [M, n, 2] as (x, y) and scales [M, n]."""

    centers: np.ndarray
    scales: np.ndarray

    def __len__(self) -> int:
        return len(self.scales)


def random_layouts(count: int, objects: int, rng: np.random.Generator) -> Layout:
    """Draw `count` layouts of `objects` objects whose boxes neither touch nor leave the image,
    uniform among all such.

    Plain rejection, but a layout that already fails is dropped before its next object is drawn: few
    draws of four fit.
    """
    centers = np.empty((0, objects, 2))
    scales = np.empty((0, objects))
    while len(scales) < count:
        center, scale = np.empty((4 * count, 0, 2)), np.empty((4 * count, 0))
        for _ in range(objects):
            new_scale = rng.uniform(*SCALE_RANGE, size=(len(scale), 1))
            reach = HALF_EXTENT * new_scale + MARGIN
            new = reach + rng.random((len(scale), 2)) * (IMAGE_SIZE - 2 * reach)
            distance = np.abs(center - new[:, None]).max(-1)  # Chebyshev, [M, objects so far]
            apart = (distance >= HALF_EXTENT * (scale + new_scale) + GAP).all(-1)
            center = np.concatenate([center, new[:, None]], axis=1)[apart]
            scale = np.concatenate([scale, new_scale], axis=1)[apart]
        centers = np.concatenate([centers, center])
        scales = np.concatenate([scales, scale])
    return Layout(centers[:count], scales[:count])


def relation(offset: np.ndarray, extent: np.ndarray) -> np.ndarray:
    """Test the relations of an object displaced by `offset` from another: bool [..., 4], in the
    order of RELATIONS.

    GenEval's rule: a tenth of the summed box sides (`extent`, [..., 2]) is taken off each
    component, and a direction holds when its share of the remaining length exceeds one half. A
    diagonal neighbour is both beside and above.
    """
    shortened = np.maximum(np.abs(offset) - 0.1 * extent, 0.0) * np.sign(offset)
    direction = shortened / np.maximum(np.linalg.norm(shortened, axis=-1, keepdims=True), 1e-6)
    x, y = direction[..., 0], direction[..., 1]
    return np.stack([x < -0.5, x > 0.5, y < -0.5, y > 0.5], axis=-1)


def coverage(
    shape: np.ndarray, center: np.ndarray, scale: np.ndarray, size: int = IMAGE_SIZE
) -> np.ndarray:
    """Compute the opacity in [0, 1] of objects on a size x size grid, float32 [N, size, size].

    Args:
        shape: int [N], index into SHAPES.
        center: float [N, 2] as (x, y), of the shape's box.
        scale: float [N]; 1 gives a circle of 7.6, a square of 6.8 and a triangle of 8.4 x 7.6
            pixels.
    """
    grid = np.arange(size, dtype=np.float32) + 0.5
    x = (grid[None, None, :] - center[:, 0, None, None]).astype(np.float32)
    y = (grid[None, :, None] - center[:, 1, None, None]).astype(np.float32)
    s = scale[:, None, None].astype(np.float32)
    circle = np.sqrt(x * x + y * y) - 3.8 * s
    square = np.maximum(np.abs(x), np.abs(y)) - 3.4 * s
    # Isosceles, apex up: two slanted edges from (0, -3.8) to (+-4.2, 3.8) and the base y = 3.8.
    slope = np.float32(4.2 / 7.6)
    slanted = (np.abs(x) - slope * (y + 3.8 * s)) / np.sqrt(1 + slope * slope)
    triangle = np.maximum(slanted, y - 3.8 * s)
    k = shape[:, None, None]
    distance = np.where(k == 0, circle, np.where(k == 1, square, triangle))
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(
    shapes: np.ndarray, colors: np.ndarray, centers: np.ndarray, scales: np.ndarray
) -> np.ndarray:
    """Paint scenes: uint8 [M, 3, 24, 24].

    Args:
        shapes: int [M, n], index into SHAPES, or -1 for no object.
        colors: int [M, n], index into COLORS.
        centers, scales: float [M, n, 2] and [M, n], as in `Layout`.
    """
    m, n = shapes.shape
    alpha = coverage(shapes.reshape(-1), centers.reshape(-1, 2), scales.reshape(-1))
    alpha = alpha.reshape(m, n, IMAGE_SIZE, IMAGE_SIZE) * (shapes >= 0)[..., None, None]
    paint = PALETTE[colors]  # [M, n, 3]
    background = np.array(BACKGROUND, dtype=np.float32)
    # Objects do not overlap, so their contributions add.
    change = np.einsum("mnhw,mnc->mchw", alpha, paint - background)
    return np.rint(background[None, :, None, None] + change).clip(0, 255).astype(np.uint8)
