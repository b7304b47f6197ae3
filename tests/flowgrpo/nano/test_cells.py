"""The closed form of a prompt's probability: by hand, by enumeration of pictures, its limits."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from flowgrpo.nano import prompts
from flowgrpo.nano.cells import EMPTY_KIND, JUNK_KIND, KINDS, assignments, log_probability
from flowgrpo.nano.scenes import CELLS, COLORS, SHAPES

CIRCLE, SQUARE, STAR = (SHAPES.index(name) for name in ("circle", "square", "star"))
RED, BLUE = (tuple(COLORS).index(name) for name in ("red", "blue"))


def probabilities(kinds, colors=None):
    """Log-probabilities of one picture; colours are uniform unless they are stated."""
    p = torch.zeros(1, CELLS, len(KINDS), dtype=torch.float64)
    c = torch.full((1, CELLS, len(COLORS)), 1 / 6, dtype=torch.float64)
    for cell, shares in enumerate(kinds):
        for kind, share in shares.items():
            p[0, cell, kind] = share
    for cell, shares in (colors or {}).items():
        c[0, cell] = 0
        for color, share in shares.items():
            c[0, cell, color] = share
    return p.log(), c.log()


def probability(prompt, *picture) -> float:
    return log_probability(*probabilities(*picture), [prompts.parse(prompt)]).exp().item()


SEEN = [{CIRCLE: 0.8, EMPTY_KIND: 0.2}, {EMPTY_KIND: 0.9, SQUARE: 0.1}, {EMPTY_KIND: 1}]
SEEN += [{EMPTY_KIND: 0.7, CIRCLE: 0.25, JUNK_KIND: 0.05}]
HUES = {0: {RED: 0.6, BLUE: 0.4}, 3: {RED: 0.1, BLUE: 0.9}, 1: {RED: 0.3, BLUE: 0.7}}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a circle", 0.9 * (0.8 * 0.7 + 0.2 * 0.25)),
        ("a red circle", 0.9 * (0.8 * 0.6 * 0.7 + 0.2 * 0.25 * 0.1)),
        ("two circles", 0.9 * 0.8 * 0.25),
        ("two blue circles", 0.9 * 0.8 * 0.4 * 0.25 * 0.9),
        ("three circles", 0.0),
        ("a circle and a square", 0.1 * (0.8 * 0.7 + 0.2 * 0.25)),
        # Cells 0 and 1, or 3 below 1: only the former stands to the left.
        ("a circle left of a square", 0.8 * 0.1 * 0.7),
        ("a circle below a square", 0.2 * 0.1 * 0.25),
        ("a square right of a circle", 0.8 * 0.1 * 0.7),
        ("a blue square right of a red circle", 0.8 * 0.6 * 0.1 * 0.7 * 0.7),
    ],
)
def test_by_hand(prompt, expected):
    assert probability(prompt, SEEN, HUES) == pytest.approx(expected, rel=1e-12)


def test_diagonal_cells_are_beside_and_above_each_other():
    diagonal = [{EMPTY_KIND: 1}, {CIRCLE: 1}, {STAR: 1}, {EMPTY_KIND: 1}]
    for relation, expected in (("right of", 1), ("above", 1), ("left of", 0), ("below", 0)):
        assert probability(f"a circle {relation} a star", diagonal) == pytest.approx(expected)


def test_against_all_pictures():
    """Each picture of four cells, scored by the rules of GenEval as the verifier has them."""
    torch.manual_seed(0)
    kinds = torch.randn(1, CELLS, len(KINDS), dtype=torch.float64).log_softmax(-1)
    colors = torch.randn(1, CELLS, len(COLORS), dtype=torch.float64).log_softmax(-1)
    states = [(k, c) for k in range(len(SHAPES)) for c in range(len(COLORS))]
    states += [(EMPTY_KIND, None), (JUNK_KIND, None)]
    weights = torch.tensor(
        [
            [kinds[0, cell, k] + (0 if c is None else colors[0, cell, c]) for k, c in states]
            for cell in range(CELLS)
        ]
    ).exp()
    # A few objects, so that 32 ** 4 pictures become 8 ** 4: the others count as one state.
    named = [
        (CIRCLE, RED),
        (CIRCLE, BLUE),
        (SQUARE, RED),
        (SQUARE, BLUE),
        (STAR, RED),
        (STAR, BLUE),
    ]
    columns = [states.index(state) for state in named] + [states.index((EMPTY_KIND, None))]
    rest = [i for i in range(len(states)) if i not in columns]
    shares = torch.cat([weights[:, columns], weights[:, rest].sum(1, keepdim=True)], dim=1)
    assert torch.allclose(shares.sum(1), torch.ones(CELLS, dtype=torch.float64))
    shares = shares.tolist()
    names = [(SHAPES[k], tuple(COLORS)[c]) for k, c in named] + [None, "junk"]
    asked = (
        "one red circle",
        "two blue squares",
        "a red star and a blue circle",
        "two red circles and one blue star",
        "a red star above a blue square",
        "a blue circle left of a red square",
    )
    records = [prompts.parse(prompt) for prompt in asked]
    sums = [0.0] * len(asked)
    for picture in product(range(len(names)), repeat=CELLS):
        share = math.prod(shares[cell][state] for cell, state in enumerate(picture))
        shown = [names[state] for state in picture]
        for i, record in enumerate(records):
            sums[i] += share * fulfils(shown, record["include"])
    log_p = log_probability(
        kinds.expand(len(asked), -1, -1), colors.expand(len(asked), -1, -1), records
    )
    assert log_p.exp().tolist() == pytest.approx(sums, rel=1e-10)
    assert min(sums) > 0


def fulfils(shown, include) -> bool:
    """The rules in words of their own: the exact set of objects, then where they stand."""
    multiset = sorted((e["class"], e["color"]) for e in include for _ in range(e["count"]))
    if "junk" in shown or sorted(s for s in shown if s is not None) != multiset:
        return False
    for entry in include:
        if "position" in entry:
            name, target = entry["position"]
            other = include[target]
            a, b = (shown.index((e["class"], e["color"])) for e in (entry, other))
            dx, dy = a % 2 - b % 2, a // 2 - b // 2
            if not {"left of": dx < 0, "right of": dx > 0, "above": dy < 0, "below": dy > 0}[name]:
                return False
    return True


def test_each_row_is_scored_for_its_own_prompt():
    torch.manual_seed(1)
    kinds = torch.randn(7, CELLS, len(KINDS)).log_softmax(-1)
    colors = torch.randn(7, CELLS, len(COLORS)).log_softmax(-1)
    records = [prompts.parse(t) for t in ("a star", "two red stars", "a star above a cross")] * 2
    records.append(prompts.parse("two red stars"))
    together = log_probability(kinds, colors, records)
    alone = [
        log_probability(kinds[i : i + 1], colors[i : i + 1], [m]) for i, m in enumerate(records)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-6)
    assert log_probability(kinds[:0], colors[:0], []).shape == (0,)


def test_gradient():
    torch.manual_seed(2)
    kinds = torch.randn(3, CELLS, len(KINDS), dtype=torch.float64, requires_grad=True)
    colors = torch.randn(3, CELLS, len(COLORS), dtype=torch.float64, requires_grad=True)
    records = [prompts.parse(t) for t in ("a red star", "two stars", "a star left of a circle")]

    def value(kinds, colors):
        return log_probability(kinds.log_softmax(-1), colors.log_softmax(-1), records)

    assert torch.autograd.gradcheck(value, (kinds, colors), fast_mode=True)


def test_every_prompt_can_be_fulfilled():
    for split in prompts.SPLITS:
        assert all(assignments(record) for record in prompts.balanced(split, 120))


@pytest.mark.parametrize(
    "include",
    [
        [{"class": "star", "count": 5}],
        [{"class": "star", "count": 3}, {"class": "circle", "count": 2}],
        [{"class": "star", "count": 1}, {"class": "star", "count": 2}],
        [{"class": "star", "count": 1, "color": c} for c in ("red", "blue")],
    ],
)
def test_what_no_picture_shows_is_refused(include):
    with pytest.raises(ValueError, match="but no picture of 4 cells shows that"):
        assignments({"include": include})
