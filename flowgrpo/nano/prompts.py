"""nano's prompts: GenEval's six tasks in miniature, their metadata in GenEval's format, and the
splits.

    single_object  a star                      colors      a red star
    two_object     a star and a square         position    a star left of a square
    counting       three stars                 color_attr  a red star and a blue square

An object of two, counting and position may have a colour as well ("three red stars"), and the
wording varies a little (one / a single / exactly, and / with), so that there are about 7000
prompts. `split` deals them out once and for all by a hash: "train" for pretraining and RL, "tune"
for choosing hyper-parameters, "heldout" for reported figures. All tasks but the first are split by
combination: what a held-out prompt asks for is asked for by no training prompt, in any wording or
order. A single object, of which there are as many as shapes, is split by its wording.

`parse` reads any prompt of the vocabulary, also compositions outside the six tasks ("two circles
and a star").
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations, product

from flowgrpo.config.validation import ConfigError
from flowgrpo.nano.scenes import COLORS, MAX_OBJECTS, PLURALS, RELATIONS, SHAPES
from flowgrpo.records import Prompts

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
SPLITS = ("train", "tune", "heldout")
# Like flow_grpo's GenEval training set, RL sees the harder tasks more often.
TRAINING_SHARES = {
    "single_object": 1,
    "two_object": 2,
    "counting": 3,
    "colors": 1,
    "position": 5,
    "color_attr": 2,
}
COUNTS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
# "a single", "just one", "only one", "exactly three": words that stress a number and change nothing
# else.
STRESS = ("single", "just", "only", "exactly")
JOINTS = ("and", "with")
WORDS = (
    *COUNTS,
    *STRESS,
    *JOINTS,
    *COLORS,
    *SHAPES,
    *PLURALS,
    "left",
    "right",
    "of",
    "above",
    "below",
)
MAX_WORDS = 8


def parse(prompt: str) -> dict:
    """Parse a prompt into GenEval's metadata: {"tag", "include": [{"class", "count", "color"?,
    "position"?}], "prompt"}.

    Raises:
        ValueError: a word outside the vocabulary, or a sentence that the grammar does not know;
        says which.
    """
    words = prompt.lower().split()
    for word in words:
        if word not in WORDS:
            raise ValueError(
                f"prompt {prompt!r}: unknown word {word!r}; nano knows {', '.join(WORDS)}"
            )
    if not 1 <= len(words) <= MAX_WORDS:
        raise ValueError(f"prompt {prompt!r}: expected 1 to {MAX_WORDS} words, got {len(words)}")
    first, rest = _object(words, prompt)
    if not rest:
        return _record(prompt, [first], None)
    joint, rest = _joint(rest, prompt)
    second, rest = _object(rest, prompt)
    if rest:
        raise ValueError(
            f"prompt {prompt!r}: nothing may follow the second object, got {' '.join(rest)!r}"
        )
    if first["class"] == second["class"]:
        raise ValueError(
            f"prompt {prompt!r}: the two shapes must differ, both are {first['class']!r}"
        )
    if first["count"] + second["count"] > MAX_OBJECTS:
        raise ValueError(f"prompt {prompt!r}: at most {MAX_OBJECTS} objects fit in an image")
    if joint in JOINTS:
        return _record(prompt, [first, second], None)
    if first["count"] != 1 or second["count"] != 1:
        raise ValueError(f"prompt {prompt!r}: a position relates one object to one object")
    return _record(prompt, [first, second], joint)


def _object(words: list[str], prompt: str) -> tuple[dict, list[str]]:
    """Read `[stress] count [single] [color] shape` from the front: (GenEval entry, the words after
    it)."""
    rest = list(words)
    while rest and rest[0] in STRESS[1:]:
        rest = rest[1:]
    if not rest or rest[0] not in COUNTS:
        raise ValueError(f"prompt {prompt!r}: an object starts with one of {', '.join(COUNTS)}")
    count, rest = COUNTS[rest[0]], rest[1:]
    if rest and rest[0] == "single":
        rest = rest[1:]
    entry: dict = {"count": count}
    if rest and rest[0] in COLORS:
        entry["color"], rest = rest[0], rest[1:]
    nouns = dict(zip(SHAPES if count == 1 else PLURALS, SHAPES, strict=True))
    if not rest or rest[0] not in nouns:
        raise ValueError(f"prompt {prompt!r}: expected one of {', '.join(nouns)} after the count")
    return {"class": nouns[rest[0]], **entry}, rest[1:]


def _joint(words: list[str], prompt: str) -> tuple[str, list[str]]:
    if words[0] in JOINTS:
        return words[0], words[1:]
    for name in RELATIONS:
        relation = name.split()
        if words[: len(relation)] == relation:
            return name, words[len(relation) :]
    raise ValueError(
        f"prompt {prompt!r}: expected one of {', '.join((*JOINTS, *RELATIONS))} between two objects"
    )


def _record(prompt: str, objects: list[dict], position: str | None) -> dict:
    if position is not None:
        # GenEval lists the object that the position refers to first.
        objects = [objects[1], {**objects[0], "position": [position, 0]}]
    colored = ["color" in o for o in objects]
    if position is not None:
        tag = "position"
    elif len(objects) == 2:
        tag = "color_attr" if all(colored) else "two_object"
    elif objects[0]["count"] > 1:
        tag = "counting"
    else:
        tag = "colors" if colored[0] else "single_object"
    return {"tag": tag, "include": objects, "prompt": prompt}


def _all_prompts() -> list[tuple[str, str]]:
    """List all (prompt, split key) of the six tasks; the key says what is asked for."""
    pairs, hues = list(permutations(SHAPES, 2)), list(permutations(COLORS, 2))
    articles = ("a", "one", "a single", "just one", "only one")
    out = [(f"{a} {s}", f"{a} {s}") for a in articles for s in SHAPES]
    out += [(f"{a} {c} {s}", f"{c} {s}") for a in articles for c in COLORS for s in SHAPES]
    numbers = [n for n, count in COUNTS.items() if count > 1]
    for n, c, s, e in product(numbers, ("", *COLORS), PLURALS, ("", "exactly", "just")):
        out.append((_words(e, n, c, s), _words(n, c, s)))
    # Two colours that are asked for together differ, since one could not tell which is whose.
    one_hue = [("", ""), *((c, "") for c in COLORS), *(("", c) for c in COLORS)]
    for (p, q), (c, d), j, a in product(pairs, [*one_hue, *hues], JOINTS, ("a", "one")):
        # The same content in either order: "red circle and blue square" is "blue square and red
        # circle".
        key = " and ".join(sorted((_words(c, p), _words(d, q))))
        out.append((_words(a, c, p, j, a, d, q), key))
    for (p, q), (c, d), r in product(pairs, [("", ""), *hues], RELATIONS):
        text = _words("a", c, p, r, "a", d, q)
        # "a left of b" is "b right of a".
        first, second = _words(c, p), _words(d, q)
        mirrored = {"right of": "left of", "below": "above"}
        key = f"{second} {mirrored[r]} {first}" if r in mirrored else f"{first} {r} {second}"
        out.append((text, key))
    return out


def _words(*words: str) -> str:
    return " ".join(word for word in words if word)


@cache
def _splits() -> dict[str, tuple[dict, ...]]:
    """Deal the records out: split -> records.

    Within each task, in the order of the keys' hashes, three tenths of the keys are held out and
    one tenth is for tuning.
    """
    records = [(parse(text), key) for text, key in _all_prompts()]
    split_of_key = {}
    for tag in TAGS:
        keys = sorted({key for m, key in records if m["tag"] == tag}, key=_hash)
        heldout, tune = math.ceil(0.3 * len(keys)), math.ceil(0.4 * len(keys))
        split_of_key |= {
            k: "heldout" if i < heldout else "tune" if i < tune else "train"
            for i, k in enumerate(keys)
        }
    return {name: tuple(m for m, key in records if split_of_key[key] == name) for name in SPLITS}


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def records(name: str) -> tuple[dict, ...]:
    """List the metadata of all prompts of one split: "train", "tune" or "heldout"."""
    if name not in SPLITS:
        raise ConfigError(
            f"the split is {name!r}, but one of {', '.join(SPLITS)} is expected; name one."
        )
    return _splits()[name]


def split(name: str) -> Prompts:
    """Build the prompts of a split as training and evaluation use them.

    "tune" and "heldout" are the prompts as they are. "train" has the tasks in the proportion of
    `TRAINING_SHARES`, so a task with few prompts repeats them; each repetition has another
    index.
    """
    entries = records(name)
    if name == "train":
        shares = [tag for tag in TAGS for _ in range(TRAINING_SHARES[tag])]
        entries = _in_turn("train", shares, 240 * len(shares))
    return Prompts.of([m["prompt"] for m in entries], entries)


def balanced(name: str, count: int) -> list[dict]:
    """List the metadata of the first `count` prompts of a split with the six tasks in turn."""
    return _in_turn(name, TAGS, count)


def _in_turn(name: str, tags: Sequence[str], count: int) -> list[dict]:
    by_tag = {tag: [m for m in records(name) if m["tag"] == tag] for tag in TAGS}
    taken = dict.fromkeys(TAGS, 0)
    out = []
    for i in range(count):
        tag = tags[i % len(tags)]
        candidates = by_tag[tag]
        # Stride through the task's prompts by a step coprime to their number, so that a short
        # prefix is varied.
        out.append(candidates[taken[tag] * _coprime_step(len(candidates)) % len(candidates)])
        taken[tag] += 1
    return out


def _coprime_step(n: int) -> int:
    return next(step for step in range(max(1, (2 * n) // 5), n + 2) if math.gcd(step, n) == 1)
