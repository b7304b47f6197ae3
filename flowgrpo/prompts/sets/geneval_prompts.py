"""Prompts with GenEval's metadata (Ghosh et al., https://arxiv.org/abs/2310.11513), from the 80
COCO classes, ten colours, four positions and the counts two to four.

Departures from the benchmark's own generator: English plurals and pairs ("four benches", "a pair of
scissors"), no counting of things that come in pairs or have no count, and the mix of tasks follows
Flow-GRPO's training set (position : counting : attributes : colours : two objects = 7:5:3:1:1),
with counting limited by the number of prompts there are and a few single objects kept.

The benchmark's own 553 test prompts are left out, whatever their wording: `BENCHMARK` has a hash of
the content of each that is not a single object (all 80 of those are in the benchmark).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import combinations, permutations, product
from pathlib import Path
from typing import Any

from flowgrpo.prompts.sets import words

CLASSES = words(
    "person;bicycle;car;motorcycle;airplane;bus;train;truck;boat;traffic light;"
    "fire hydrant;stop sign;parking meter;bench;bird;cat;dog;horse;sheep;cow;elephant;"
    "bear;zebra;giraffe;backpack;umbrella;handbag;tie;suitcase;frisbee;skis;snowboard;"
    "sports ball;kite;baseball bat;baseball glove;skateboard;surfboard;tennis racket;"
    "bottle;wine glass;cup;fork;knife;spoon;bowl;banana;apple;sandwich;orange;"
    "broccoli;carrot;hot dog;pizza;donut;cake;chair;couch;potted plant;bed;"
    "dining table;toilet;tv;laptop;computer mouse;tv remote;computer keyboard;cell phone;"
    "microwave;oven;toaster;sink;refrigerator;book;clock;vase;scissors;teddy bear;"
    "hair drier;toothbrush"
)
"""GenEval's names of the COCO classes, in COCO's order."""

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
POSITIONS = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
"""Position -> the same seen from the other object."""
NUMBERS = {2: "two", 3: "three", 4: "four"}
PAIRS = ("skis", "scissors")
PLURALS = {
    "person": "people",
    "bus": "buses",
    "bench": "benches",
    "sheep": "sheep",
    "wine glass": "wine glasses",
    "knife": "knives",
    "sandwich": "sandwiches",
    "couch": "couches",
    "computer mouse": "computer mice",
    "toothbrush": "toothbrushes",
}
UNCOUNTED = (*PAIRS, "broccoli")
BENCHMARK = frozenset(
    Path(__file__).with_name("geneval_benchmark_hashes.txt").read_text(encoding="ascii").split()
)

Line = dict[str, Any]


def tasks() -> Iterator[tuple[list[Line], int, int]]:
    """Yield (candidates, training prompts, test prompts) of each task."""
    tasks = (
        (_single(), 60, 20),
        (_two(), 100, 50),
        (_counting(), 110, 36),
        (_colors(), 100, 50),
        (_position(), 700, 60),
        (_color_attr(), 300, 60),
    )
    for lines, train, test in tasks:
        yield [line for line in lines if fingerprint(line) not in BENCHMARK], train, test


def key(line: Line) -> str:
    """Describe what the prompt asks for, without the order in which it names the objects."""
    objects = [
        f"{wish['count']} {wish.get('color', '')} {wish['class']}" for wish in line["include"]
    ]
    if line["tag"] == "position":
        relation = line["include"][1]["position"][0]
        order = (objects[1], relation, objects[0])
        other = (objects[0], POSITIONS[relation], objects[1])
        return f"position {min(order, other)}"
    return f"{line['tag']} {sorted(objects)}"


def fingerprint(line: Line) -> str:
    """Hash `key`, briefly."""
    return hashlib.sha256(key(line).encode()).hexdigest()[:10]


def _noun(name: str, color: str = "") -> str:
    """Write an object with its article: "a red car", "an apple", "a pair of red scissors"."""
    words = f"pair of {color} {name}" if name in PAIRS else f"{color} {name}"
    words = " ".join(words.split())
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _line(tag: str, prompt: str, *include: Line, **more: Any) -> Line:
    return {"tag": tag, "include": list(include), **more, "prompt": f"a photo of {prompt}"}


def _single() -> Iterator[Line]:
    for name in CLASSES:
        yield _line("single_object", _noun(name), {"class": name, "count": 1})


def _two() -> Iterator[Line]:
    for a, b in permutations(CLASSES, 2):
        wishes = ({"class": a, "count": 1}, {"class": b, "count": 1})
        yield _line("two_object", f"{_noun(a)} and {_noun(b)}", *wishes)


def _counting() -> Iterator[Line]:
    for name, number in product(CLASSES, NUMBERS):
        if name not in UNCOUNTED:
            yield _line(
                "counting",
                f"{NUMBERS[number]} {PLURALS.get(name, name + 's')}",
                {"class": name, "count": number},
                exclude=[{"class": name, "count": number + 1}],
            )


def _colors() -> Iterator[Line]:
    for name, color in product(CLASSES, COLORS):
        if name != "person":
            wish = {"class": name, "count": 1, "color": color}
            yield _line("colors", _noun(name, color), wish)


def _position() -> Iterator[Line]:
    for (a, b), position in product(permutations(CLASSES, 2), POSITIONS):
        wishes = ({"class": b, "count": 1}, {"class": a, "count": 1, "position": [position, 0]})
        yield _line("position", f"{_noun(a)} {position} {_noun(b)}", *wishes)


def _color_attr() -> Iterator[Line]:
    # Every pair of classes, with the colours that a hash of the pair gives: enough to choose from.
    for a, b in combinations([name for name in CLASSES if name != "person"], 2):
        number = int(hashlib.sha256(f"{a} {b}".encode()).hexdigest(), 16)
        first, second = divmod(number % 90, 9)
        colors = COLORS[first], [c for c in COLORS if c != COLORS[first]][second]
        if number // 90 % 2:
            a, b = b, a
        wishes = [{"class": n, "count": 1, "color": c} for n, c in zip((a, b), colors, strict=True)]
        yield _line("color_attr", f"{_noun(a, colors[0])} and {_noun(b, colors[1])}", *wishes)
