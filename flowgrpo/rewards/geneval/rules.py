"""The rules of GenEval (Ghosh et al., https://arxiv.org/abs/2310.11513; evaluate_images.py of
https://github.com/djghosh13/geneval): from detected objects and a prompt's metadata to a score.

    select    score > 0.3 (0.9 in the task counting), the best 16 of a class, best first; of two
              boxes of a class that overlap by MAX_OVERLAP or more the better one (1, as in the
              benchmark: both)
    include   at least `count` objects of the class; the best `count` are looked at further
    color     `count` of these have the colour
    position  each of these stands so to each object that was matched for the entry it refers to
    exclude   fewer than `count` objects of the class

`strict` is the benchmark's judgement: everything holds. `partial` is the reward that flow_grpo
trains with (evaluate_reward in https://github.com/yifan123/reward-server). It is another rule, not
a softer one: counts are compared with ==, `exclude` is not read, and it is the mean of these terms,
for each entry of `include`:

    1 - |count - found| / count        negative where many too many are found
    with a color, the same of the objects that have it; 0 if the count was wrong
    with a position, 1 if it holds; 0 and 1, two terms, if it does not; 0 if the target is missing

The two terms of a wrong position are an oversight over there (the right answer's 1 is added in
either case), kept so that rewards compare: a wrong position earns 3/4 and not 2/3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowgrpo.prompts.sets.geneval_prompts import CLASSES, COLORS
from flowgrpo.rewards.geneval.metadata import problem
from flowgrpo.rewards.interface import RewardError

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
POSITION_THRESHOLD = 0.1


@dataclass(frozen=True)
class Detection:
    """One detected object."""

    name: str
    """One of CLASSES."""
    box: tuple[float, float, float, float]
    """x1, y1, x2, y2 in pixels."""
    score: float
    mask: Tensor | None = None
    """bool [H, W]: its pixels."""
    color: str | None = None
    """One of COLORS, where it was asked for."""


Objects = Mapping[str, Sequence[Detection]]
"""Class -> the detections of it that count, best first."""


def check(metadata: Mapping[str, Any]) -> None:
    """Raise RewardError unless `metadata` is GenEval's."""
    reason = problem(metadata, CLASSES, COLORS)
    if not isinstance(metadata.get("tag"), str):
        reason = f"tag {metadata['tag']!r}, which is no text" if "tag" in metadata else "no tag"
    if reason:
        raise RewardError(
            f"the metadata of a prompt has {reason}, but GenEval's is expected: "
            '{"tag": ..., "include": [{"class": a COCO class, "count": n, "color"?, "position"?}], '
            '"exclude"?: [...], "prompt": ...}; correct it, or give prompts as GenEval JSONL '
            f"(it is {str(dict(metadata))[:200]})."
        )


def select(detections: Iterable[Detection], tag: str) -> dict[str, list[Detection]]:
    """Select the detections that count, by class, best first."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    ordered = sorted(detections, key=lambda d: d.score, reverse=True)
    objects: dict[str, list[Detection]] = {}
    for name in dict.fromkeys(d.name for d in ordered):
        best = [d for d in ordered if d.name == name and d.score > threshold][:MAX_OBJECTS]
        selected: list[Detection] = []
        for detection in best:
            overlaps = (overlap(detection.box, better.box) for better in selected)
            if MAX_OVERLAP == 1 or all(share < MAX_OVERLAP for share in overlaps):
                selected.append(detection)
        if selected:
            objects[name] = selected
    return objects


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Compute intersection over union of two boxes of whole pixels (hence the + 1)."""

    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(x2 - x1 + 1, 0) * max(y2 - y1 + 1, 0)

    common = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = area(*a) + area(*b) - common
    return common / union if union else 0.0


def relations(a: Detection, b: Detection) -> set[str]:
    """List how `a` stands to `b`: up to two of POSITIONS.

    The offset between the centres is shortened, in each direction, by a tenth of both objects' size
    there. It counts in a direction in which it is more than half of the whole distance.
    """
    centers = [((x1 + x2) / 2, (y1 + y2) / 2) for x1, y1, x2, y2 in (a.box, b.box)]
    sizes = [(abs(x2 - x1), abs(y2 - y1)) for x1, y1, x2, y2 in (a.box, b.box)]
    offset = [centers[0][i] - centers[1][i] for i in (0, 1)]
    shortened = [
        math.copysign(
            max(abs(offset[i]) - POSITION_THRESHOLD * (sizes[0][i] + sizes[1][i]), 0), offset[i]
        )
        for i in (0, 1)
    ]
    if all(abs(component) < 1e-3 for component in shortened):
        return set()
    distance = math.hypot(*offset)
    dx, dy = (component / distance for component in shortened)
    tests = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in tests.items() if holds}


def strict(objects: Objects, metadata: Mapping[str, Any]) -> tuple[bool, str]:
    """Judge as the benchmark does: (right or not, the problems in words)."""
    problems: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for wish in metadata["include"]:
        name, count = wish["class"], wish["count"]
        detections = objects.get(name, ())[:count]
        problem = ""
        if len(detections) < count:
            problem = f"{len(detections)} {name} found, at least {count} wanted"
        elif "color" in wish and _colored(detections, wish) < count:
            colors = ", ".join(str(d.color) for d in detections)
            problem = f"{name} is {colors}, {wish['color']} wanted"
        elif "position" in wish:
            problem = _misplaced(detections, wish, matched)
        matched.append(None if problem else detections)
        problems += [problem] if problem else []
    for wish in metadata.get("exclude", ()):
        detections = objects.get(wish["class"], ())
        if len(detections) >= wish["count"]:
            problems.append(
                f"{len(detections)} {wish['class']} found, fewer than {wish['count']} wanted"
            )
    return not problems, "; ".join(problems)


def partial(objects: Objects, metadata: Mapping[str, Any]) -> float:
    """Score as flow_grpo does: at most 1, and 1 where everything is right."""
    terms: list[float] = []
    matched: list[Sequence[Detection] | None] = []
    for wish in metadata["include"]:
        count = wish["count"]
        detections = objects.get(wish["class"], ())
        right = len(detections) == count
        terms.append(1 - abs(count - len(detections)) / count)
        if not right and ("color" in wish or "position" in wish):
            terms.append(0.0)
        if right and "color" in wish:
            colored = _colored(detections, wish)
            terms.append(1 - abs(count - colored) / count)
            right = colored == count
        if right and "position" in wish:
            target = matched[wish["position"][1]]
            right = not _misplaced(detections, wish, matched)
            terms += [1.0] if right else [0.0] if target is None else [0.0, 1.0]
        matched.append(detections if right else None)
    return sum(terms) / len(terms) if terms else 0.0


def _colored(detections: Sequence[Detection], wish: Mapping[str, Any]) -> int:
    return sum(d.color == wish["color"] for d in detections)


def _misplaced(
    detections: Sequence[Detection],
    wish: Mapping[str, Any],
    matched: Sequence[Sequence[Detection] | None],
) -> str:
    """Say what is wrong with the position; "" if nothing is."""
    relation, target = wish["position"]
    if matched[target] is None:
        return f"nothing that {wish['class']} could be {relation}"
    for detection in detections:
        for other in matched[target]:
            actual = relations(detection, other)
            if relation not in actual:
                words = " and ".join(sorted(actual)) or "at the same place"
                return f"{wish['class']} is {words}, {relation} wanted"
    return ""
