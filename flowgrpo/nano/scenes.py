"""The world that nano draws: coloured shapes on a light background, 64 x 64 pixels.

A picture has four cells, two by two, and at most one object in each. An object sits near the centre
of its cell: `JITTER` pixels off it at most, in steps of a quarter of a pixel. Shapes are painted by
analytic coverage: the signed distance to a shape's edge, clipped to one pixel, is its opacity, so
edges are anti-aliased. The verifier (`verify.py`) compares with templates of the same function.

Units are pixels; x grows to the right, y grows downwards, the pixel in column i has its centre at i
+ 0.5. Cells are numbered in reading order.
"""

from __future__ import annotations

from functools import cache

import numpy as np

IMAGE_SIZE = 64
CELL = 32
CELLS = 4
SHAPES = ("circle", "square", "triangle", "star", "cross")
PLURALS = ("circles", "squares", "triangles", "stars", "crosses")
COLORS = {
    "red": (214, 40, 57),
    "green": (46, 158, 79),
    "blue": (38, 84, 208),
    "yellow": (244, 190, 30),
    "purple": (146, 64, 178),
    "black": (42, 42, 50),
}
BACKGROUND = (246, 244, 238)
RELATIONS = ("left of", "right of", "above", "below")
MAX_OBJECTS = CELLS

PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
JITTER = 2.0
# Centres lie on a grid of 1 / FRACTION pixel, for which opacities are painted once.
FRACTION = 4
EMPTY = -1
"""Code of a cell without an object; else shape * len(COLORS) + color."""

_RADIUS = 11.0


def _corners() -> dict[str, np.ndarray]:
    """List the corners of the shapes but the circle, [n, 2] around the centre of the box."""
    angles = np.pi * np.arange(10) / 5
    reach = np.where(np.arange(10) % 2, 5.8, 13.0)
    star = np.stack([reach * np.sin(angles), -reach * np.cos(angles)], axis=-1)
    star[:, 1] -= (star[:, 1].min() + star[:, 1].max()) / 2
    far, near = 11.5, 4.2
    quarter = [(near, -far), (near, -near), (far, -near)]
    cross = [(x, y) for x, y in quarter]
    for _ in range(3):
        cross += [(-y, x) for x, y in cross[-3:]]
    return {
        "square": np.array([(-9.8, -9.8), (9.8, -9.8), (9.8, 9.8), (-9.8, 9.8)]),
        "triangle": np.array([(0.0, -11.0), (12.4, 11.0), (-12.4, 11.0)]),
        "star": star,
        "cross": np.array(cross),
    }


CORNERS = _corners()


def centroid(shape: int) -> np.ndarray:
    """Compute the centroid (x, y) of a shape, from the centre of its box."""
    if SHAPES[shape] not in CORNERS:
        return np.zeros(2)
    a = CORNERS[SHAPES[shape]]
    b = np.roll(a, -1, axis=0)
    twice = a[:, 0] * b[:, 1] - b[:, 0] * a[:, 1]
    return ((a + b) * twice[:, None]).sum(0) / (3 * twice.sum())


def coverage(shape: int, center: np.ndarray, scale: float = 1.0, size: int = CELL) -> np.ndarray:
    """Compute the opacity in [0, 1] of one shape on a size x size grid, float32 [N, size, size].

    Args:
        shape: index into SHAPES.
        center: float [N, 2] as (x, y), of the shape's box.
        scale: 1 is the size at which `render` paints.
    """
    grid = np.arange(size) + 0.5
    x = np.broadcast_to(grid - center[:, 0, None, None], (len(center), size, size)) / scale
    y = np.broadcast_to(grid[:, None] - center[:, 1, None, None], x.shape) / scale
    name = SHAPES[shape]
    distance = np.hypot(x, y) - _RADIUS if name == "circle" else _polygon(CORNERS[name], x, y)
    return np.clip(0.5 - scale * distance, 0.0, 1.0).astype(np.float32)


def _polygon(corners: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute the signed distance of points to a polygon's edge, negative inside."""
    squared, inside = np.full(x.shape, np.inf), np.zeros(x.shape, dtype=bool)
    for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        ex, ey, px, py = bx - ax, by - ay, x - ax, y - ay
        t = np.clip((px * ex + py * ey) / (ex * ex + ey * ey), 0.0, 1.0)
        squared = np.minimum(squared, (px - t * ex) ** 2 + (py - t * ey) ** 2)
        if ay != by:
            # A ray to the right crosses the edge: an odd number of crossings is inside.
            inside ^= ((ay > y) != (by > y)) & (px < ex * py / ey)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)


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


def cell_centers() -> np.ndarray:
    """List the centres of the cells, float [4, 2] as (x, y)."""
    side = (np.arange(2) + 0.5) * CELL
    return np.array([(x, y) for y in side for x in side])


@cache
def _stamps() -> np.ndarray:
    """Paint each shape once for each fraction of a pixel: [shape, fy, fx, CELL, CELL], the centre
    of its box at CELL / 2 + f / FRACTION."""
    fractions = CELL / 2 + np.arange(FRACTION) / FRACTION
    centers = np.array([(x, y) for y in fractions for x in fractions])
    stamps = np.stack([coverage(shape, centers) for shape in range(len(SHAPES))])
    return stamps.reshape(len(SHAPES), FRACTION, FRACTION, CELL, CELL)


def render(shapes: np.ndarray, colors: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Paint scenes: uint8 [M, 3, 64, 64].

    Args:
        shapes: int [M, n], index into SHAPES, or EMPTY for no object.
        colors: int [M, n], index into COLORS.
        centers: float [M, n, 2] as (x, y) of the shapes' boxes, rounded to the grid of FRACTION.
            Objects that touch add up.
    """
    steps = np.rint(np.asarray(centers) * FRACTION).astype(int)
    pixel, fraction = steps // FRACTION, steps % FRACTION
    rows, slots = np.nonzero(shapes >= 0)
    stamps = _stamps()[shapes[rows, slots], fraction[rows, slots, 1], fraction[rows, slots, 0]]
    background = np.array(BACKGROUND, dtype=np.float32)
    ink = PALETTE[colors[rows, slots]] - background
    change = stamps[:, None] * ink[:, :, None, None]
    # A border half as wide as a stamp: what leaves the picture falls there.
    canvas = np.zeros((len(shapes), 3, IMAGE_SIZE + CELL, IMAGE_SIZE + CELL), np.float32)
    for row, (x, y), stamp in zip(rows, pixel[rows, slots], change, strict=True):
        canvas[row, :, y : y + CELL, x : x + CELL] += stamp
    canvas = (
        canvas[:, :, CELL // 2 : -CELL // 2, CELL // 2 : -CELL // 2]
        + background[None, :, None, None]
    )
    return np.rint(canvas).clip(0, 255).astype(np.uint8)


def paint(cells: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Paint pictures of cells, int [M, 4] of EMPTY or shape * len(COLORS) + color: uint8
    [M, 3, 64, 64]; each object's jitter is drawn."""
    cells = np.asarray(cells)
    shapes = np.where(cells >= 0, cells // len(COLORS), EMPTY)
    reach = int(JITTER * FRACTION)
    jitter = rng.integers(-reach, reach + 1, (*cells.shape, 2)) / FRACTION
    return render(shapes, np.maximum(cells, 0) % len(COLORS), cell_centers() + jitter)
