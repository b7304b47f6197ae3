"""Prompts -> pictures that fulfil them: nano's pretraining data and the verifier's test cases."""

from __future__ import annotations

from functools import cache

import numpy as np

from flowgrpo.nano.scenes import (
    CELLS,
    COLORS,
    EMPTY,
    RELATIONS,
    SHAPES,
    cell_centers,
    paint,
    relation,
)

_COLOR_NAMES = tuple(COLORS)


def code(shape: str, color: str) -> int:
    """Look up the code of an object in a cell."""
    return SHAPES.index(shape) * len(COLORS) + _COLOR_NAMES.index(color)


@cache
def _related(name: str) -> list[tuple[int, int]]:
    """List the pairs of cells whose first has the relation `name`, and no other, to the second."""
    centers, size = cell_centers(), np.full(2, 44.0)
    pairs = []
    for i in range(CELLS):
        for j in range(CELLS):
            holds = relation(centers[i] - centers[j], size)
            if i != j and holds[RELATIONS.index(name)] and holds.sum() == 1:
                pairs.append((i, j))
    return pairs


def arrange(metadata: list[dict], rng: np.random.Generator) -> np.ndarray:
    """Arrange the objects of each prompt in cells: int [M, 4], as `scenes.paint` takes them.

    What the prompt leaves open is drawn at random: the cells, and the colour of each group of like
    objects.
    """
    cells = np.full((len(metadata), CELLS), EMPTY)
    for row, record in zip(cells, metadata, strict=True):
        codes, position = [], None
        for entry in record["include"]:
            color = entry.get("color") or _COLOR_NAMES[rng.integers(len(_COLOR_NAMES))]
            codes += [code(entry["class"], color)] * entry["count"]
            position = entry.get("position", position)
        if position is None:
            row[rng.permutation(CELLS)[: len(codes)]] = codes
        else:
            # In metadata the object that has the relation is the second entry.
            pairs = _related(position[0])
            of, to = pairs[rng.integers(len(pairs))]
            row[[to, of]] = codes
    return cells


def draw(metadata: list[dict], rng: np.random.Generator) -> np.ndarray:
    """Draw one picture per prompt that fulfils it: uint8 [M, 3, 64, 64]."""
    return paint(arrange(metadata, rng), rng)


def mistake(record: dict, rng: np.random.Generator) -> dict:
    """Change what a record asks for as text-to-image models get it wrong; its prompt stays.

    One object is another or two are one, the number is another, the colour is another or two are
    swapped, the position is any (and right by chance in one of three).
    """
    entries = [dict(entry) for entry in record["include"]]
    tag, first, last = record["tag"], entries[0], entries[-1]
    if tag == "single_object":
        last["class"] = _other(SHAPES, [last["class"]], rng)
    elif tag == "two_object":
        if rng.random() < 0.5:
            entries = [entries[rng.integers(2)]]
        else:
            wrong = entries[rng.integers(2)]
            wrong["class"] = _other(SHAPES, [first["class"], last["class"]], rng)
    elif tag == "counting":
        last["count"] = int(_other((1, 2, 3, 4), [last["count"]], rng))
    elif tag == "colors":
        last["color"] = _other(_COLOR_NAMES, [last["color"]], rng)
    elif tag == "color_attr":
        if rng.random() < 0.5:
            first["color"], last["color"] = last["color"], first["color"]
        else:
            wrong = entries[rng.integers(2)]
            wrong["color"] = _other(_COLOR_NAMES, [wrong["color"]], rng)
    else:
        del last["position"]
    return {**record, "include": entries}


def _other(values, taken, rng: np.random.Generator):
    values = [value for value in values if value not in taken]
    return values[rng.integers(len(values))]
