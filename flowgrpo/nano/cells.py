"""Probability that a picture fulfils a prompt, in closed form from what its four cells show.

A cell i shows nothing, an object of a shape s and a colour c, or junk, independently of the others:

    p_i(empty) = kind_i(empty)    p_i(s) = kind_i(s)    p_i(s, c) = kind_i(s) color_i(c)

A prompt asks for classes k, n_k objects each, perhaps of one colour, perhaps in a relation; nothing
else may be there. An assignment a says for each cell which class stands there, or none. Those
allowed have each class n_k times, and its first cell in reading order in the relation that was
asked for. They exclude each other, so

    P(fulfilled) = sum over allowed a of  prod_i p_i(a_i)

where p_i of a class without colour is that of the shape, and of no class that of empty. Relations
are those of the cells' centres (`scenes.relation`). It is the verifier's *strict* (`verify.py`),
with probabilities in place of what it sees. All sums are of logarithms.
"""

from __future__ import annotations

import json
from functools import cache
from itertools import product

import numpy as np
import torch
from torch import Tensor

from flowgrpo.nano.scenes import CELLS, COLORS, RELATIONS, SHAPES, cell_centers, relation

KINDS = (*SHAPES, "empty", "junk")
"""Names of what a cell shows, in the order of the classifier's outputs."""
EMPTY_KIND, JUNK_KIND = len(SHAPES), len(SHAPES) + 1
# Sides of two boxes together, in pixels, for the relations of cells.
_EXTENT = np.full(2, 44.0)
_COLOR_NAMES = tuple(COLORS)


def log_probability(log_kinds: Tensor, log_colors: Tensor, metadata: list[dict]) -> Tensor:
    """Compute log P(fulfilled) of each picture for its prompt, [B], differentiable.

    Args:
        log_kinds: log-probabilities [B, 4, 7] of `KINDS` in each cell.
        log_colors: log-probabilities [B, 4, 6] of COLORS, of the object in each cell.
        metadata: B records in GenEval's format ("include": class, count, color, position).

    Raises:
        ValueError: a record asks for what no picture of four cells shows.
    """
    symbols = _symbols(log_kinds, log_colors)
    rows_of: dict[str, list[int]] = {}
    for row, record in enumerate(metadata):
        rows_of.setdefault(_key(record), []).append(row)
    out: list[Tensor] = [symbols.new_zeros(())] * len(metadata)
    for key, rows in rows_of.items():
        allowed = torch.tensor(_assignments(key), device=symbols.device)
        cells = torch.arange(CELLS, device=symbols.device)
        terms = symbols[rows][:, cells, allowed].sum(dim=2)
        for row, value in zip(rows, terms.logsumexp(dim=1), strict=True):
            out[row] = value
    return torch.stack(out) if out else symbols.new_zeros(0)


def _symbols(log_kinds: Tensor, log_colors: Tensor) -> Tensor:
    """Log-probabilities [B, 4, 36]: shapes of any colour, empty, then shape * 6 + color."""
    shapes = log_kinds[..., : len(SHAPES)]
    objects = (shapes[..., None] + log_colors[..., None, :]).flatten(2)
    return torch.cat([log_kinds[..., : EMPTY_KIND + 1], objects], dim=2)


def _key(record: dict) -> str:
    return json.dumps(record["include"], sort_keys=True)


def assignments(record: dict) -> list[list[int]]:
    """List the allowed assignments, [A, 4] of numbers: a shape of any colour, `EMPTY_KIND`, or
    6 + shape * 6 + color.

    Raises:
        ValueError: there is none.
    """
    return _assignments(_key(record))


@cache
def _assignments(key: str) -> list[list[int]]:
    include = json.loads(key)
    counts: dict[str, set[int]] = {}
    colors: dict[str, set[str]] = {}
    for entry in include:
        counts.setdefault(entry["class"], set()).add(entry["count"])
        colors.setdefault(entry["class"], set()).update(
            [entry["color"]] if "color" in entry else []
        )
    names = list(counts)
    # Two counts or two colours of one class: the verifier counts all of its objects for both.
    if all(len(c) == 1 for c in counts.values()) and all(len(c) <= 1 for c in colors.values()):
        symbols = [EMPTY_KIND] + [_symbol(name, colors[name]) for name in names]
        asked = [next(iter(counts[name])) for name in names]
        allowed = [
            [symbols[label] for label in labels]
            for labels in product(range(len(symbols)), repeat=CELLS)
            if [labels.count(k + 1) for k in range(len(names))] == asked
            and _in_relation(labels, names, include)
        ]
        if allowed:
            return allowed
    raise ValueError(
        f"metadata asks for {key}, but no picture of {CELLS} cells shows that; ask for at most "
        f"{CELLS} objects, with one number and at most one colour of each shape"
    )


def _symbol(name: str, colors: set[str]) -> int:
    shape = SHAPES.index(name)
    if not colors:
        return shape
    return EMPTY_KIND + 1 + shape * len(COLORS) + _COLOR_NAMES.index(next(iter(colors)))


def _in_relation(labels: tuple[int, ...], names: list[str], include: list[dict]) -> bool:
    """Test the positions of an assignment by the first cells of the classes."""
    centers = cell_centers()
    for entry in include:
        if "position" in entry:
            name, target = entry["position"]
            of, to = (1 + names.index(e["class"]) for e in (entry, include[target]))
            offset = centers[labels.index(of)] - centers[labels.index(to)]
            if not relation(offset, _EXTENT)[RELATIONS.index(name)]:
                return False
    return True
