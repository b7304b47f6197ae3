"""Prompts -> pictures that fulfil them: nano's pretraining data and the verifier's test cases."""

from __future__ import annotations

from functools import cache

import numpy as np

from flowgrpo.nano.scenes import (
    COLORS,
    HALF_EXTENT,
    MAX_OBJECTS,
    RELATIONS,
    SHAPES,
    Layout,
    random_layouts,
    relation,
    render,
)

POOL = 8_000


@cache
def _pool(objects: int) -> Layout:
    return random_layouts(POOL, objects, np.random.default_rng(objects))


@cache
def _related(name: str, objects: int) -> np.ndarray:
    """Find the layouts of the pool whose first object has the relation `name`, and no other, to the
    second."""
    pool = _pool(objects)
    extent = 2 * HALF_EXTENT * (pool.scales[:, 0] + pool.scales[:, 1])
    offset = pool.centers[:, 0] - pool.centers[:, 1]
    holds = relation(offset, np.stack([extent, extent], axis=-1))
    return np.nonzero(holds[:, RELATIONS.index(name)] & (holds.sum(-1) == 1))[0]


def with_more(record: dict, rng: np.random.Generator) -> dict:
    """Add one or two objects to a record, of any shape and colour, if they fit in a picture.

    Its prompt stays, and is true of the picture, but names only a part of it.
    """
    free = MAX_OBJECTS - sum(entry["count"] for entry in record["include"])
    count = min(free, 1 + int(rng.random() < 0.3))
    more = [{"class": SHAPES[rng.integers(len(SHAPES))], "count": 1} for _ in range(count)]
    return {**record, "include": [*record["include"], *more]}


def draw(metadata: list[dict], rng: np.random.Generator) -> np.ndarray:
    """Draw one picture per prompt that fulfils it: uint8 [M, 3, 24, 24].

    What the prompt leaves open is drawn at random: positions, sizes, and the colour of each group
    of like objects.
    """
    m = len(metadata)
    shapes = np.full((m, MAX_OBJECTS), -1)
    colors = np.zeros((m, MAX_OBJECTS), dtype=int)
    centers = np.full((m, MAX_OBJECTS, 2), 12.0)
    scales = np.ones((m, MAX_OBJECTS))
    for i, record in enumerate(metadata):
        slot, position = 0, None
        for entry in record["include"]:
            color = (
                list(COLORS).index(entry["color"])
                if "color" in entry
                else rng.integers(len(COLORS))
            )
            shapes[i, slot : slot + entry["count"]] = SHAPES.index(entry["class"])
            colors[i, slot : slot + entry["count"]] = color
            slot += entry["count"]
            position = entry.get("position", position)
        pool = _pool(slot)
        if position is None:
            pick = rng.integers(len(pool))
            order = rng.permutation(slot)
        else:
            # The pool's first object has the relation; in metadata it is the second entry.
            candidates = _related(position[0], slot)
            pick = candidates[rng.integers(len(candidates))]
            order = np.array([1, 0, *range(2, slot)])
        centers[i, :slot] = pool.centers[pick, order]
        scales[i, :slot] = pool.scales[pick, order]
    return render(shapes, colors, centers, scales)
