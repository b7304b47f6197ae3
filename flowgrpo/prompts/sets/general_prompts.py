"""Prompts of ten kinds, in the manner of DrawBench (Saharia et al., https://arxiv.org/abs/2205.11487,
section 4), for rewards of preference and quality. None is taken from there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import product
from typing import Any

from flowgrpo.prompts.sets import words

ANIMALS = words("fox owl tortoise heron badger seal goat crow lynx otter camel moose", " ")
THINGS = words(
    "teapot lantern violin compass typewriter armchair ladder suitcase telescope barrel kettle "
    "umbrella",
    " ",
)
COLORS = words("crimson turquoise mustard lavender emerald ivory charcoal coral indigo bronze", " ")
PLACES = words(
    "on a windy pier;in a greenhouse full of ferns;beside a frozen lake;in an attic;"
    "on a cobbled square;at the foot of a glacier;in a crowded tram;under a stone bridge;"
    "on a rooftop at dusk;in a library with tall windows"
)
ODD_DEEDS = words(
    "knitting a scarf;playing chess against a snowman;repairing a pocket watch;reading the news;"
    "conducting an orchestra;baking bread;painting its own portrait;riding a unicycle;"
    "delivering letters;surfing on a leaf"
)
RELATIONS = words(
    "to the left of;to the right of;on top of;underneath;in front of;behind;inside;leaning against"
)
NUMBERS = words("Two Three Four Five Six Seven", " ")
SIGNS = words(
    "a paper cup;a subway map;a wedding cake;a ship's bow;a pencil case;a museum ticket;"
    "a race car;a greeting card"
)
WORDS = words("Voyage;Good Morning;Number Nine;Thank You;Open Late;Eureka;Moonlight;First Prize")
MANNERS = words(
    "An oil painting of;A charcoal sketch of;A black and white photograph of;A watercolour of;"
    "A woodcut of;A stained glass window with;A clay model of;A pixel art picture of"
)
PEOPLE = words(
    "a beekeeper checking a hive;a glassblower at the furnace;twins in yellow raincoats;"
    "an old sailor mending a net;a girl flying a box kite;a cellist on a balcony;"
    "two farmers sharing an apple;a surveyor in the mountains"
)
TIMES = words(
    "at sunrise;in heavy rain;on a foggy morning;at midnight;in the first snow;in midsummer"
)
VIEWS = words(
    "A fishing village;A terraced vineyard;A railway viaduct;A salt flat;A walled garden;"
    "An abandoned quarry;A river delta from above;A mountain pass"
)
DESCRIBED = words(
    "A tool with a long handle and a flat blade for digging earth;"
    "A striped insect that lives in hives and makes something sweet;"
    "A small round fruit with a hard shell that squirrels bury in autumn;"
    "A musical instrument of eighty-eight black and white keys;"
    "A vehicle with two wheels that moves by pedalling;"
    "A tall building by the sea whose turning lamp guides ships;"
    "A piece of clothing for the hand with a place for each finger;"
    "A bird that cannot fly, swims well and lives where it is cold;"
    "A round device with a needle that always points north;"
    "A dessert of frozen cream served in a cone;"
    "A desert plant with thick green stems and spines;"
    "A large animal with a trunk and two tusks;"
    "A glass vessel with sand that measures time as it runs;"
    "A building with sails that the wind turns to grind grain;"
    "A soft bag of feathers on which one rests the head;"
    "A stringed toy that rises on the wind at the end of a line"
)
RARE = words(
    "A gibbous moon over a lagoon;A crepuscular harbour;A palimpsest on vellum;"
    "A caparisoned horse;A fuliginous foundry;An arboreal village;A verdigris dome;"
    "A lacustrine settlement;A nacreous shell;A tessellated floor;A bucolic valley;"
    "A diaphanous curtain;A coruscating chandelier;A sylvan glade;A crenellated wall;"
    "An isthmus seen from the air"
)

Line = dict[str, Any]


def tasks() -> Iterator[tuple[list[Line], int, int]]:
    """Yield (candidates, training prompts, test prompts) of each kind: 30 and 8 of most."""
    for tag, prompts in _kinds().items():
        test = min(8, len(prompts) // 4)
        lines = [{"tag": tag, "prompt": prompt} for prompt in prompts]
        yield lines, min(30, len(prompts) - test), test


def key(line: Line) -> str:
    """Return the prompt itself."""
    return line["prompt"]


def _kinds() -> dict[str, list[str]]:
    pairs = [(a, b) for a, b in product(THINGS, THINGS) if a != b]
    views = [f"{view} {time}." for view, time in product(VIEWS, TIMES)]
    return {
        "colors": [
            f"{_a(a, True)} {x} next to {_a(b)} {y}."
            for (x, y), (a, b) in product(pairs[::7], zip(COLORS, COLORS[3:], strict=False))
        ],
        "conflicting": [f"{_a(a, True)} {deed}." for a, deed in product(ANIMALS, ODD_DEEDS)],
        "counting": [f"{n} {t}s {p}." for n, t, p in product(NUMBERS, THINGS, PLACES)],
        "descriptions": [f"{text}." for text in DESCRIBED],
        "manner": [f"{manner} {who}." for manner, who in product(MANNERS, PEOPLE)],
        "misspellings": [_misspelt(view) for view in views if _misspelt(view) != view],
        "positional": [
            f"{_a(a, True)} {relation} {_a(b)}." for (a, b), relation in product(pairs, RELATIONS)
        ],
        "rare_words": [f"{text}." for text in RARE],
        "text": [
            f'{where[0].upper()}{where[1:]} with the words "{text}".'
            for where, text in product(SIGNS, WORDS)
        ],
        "views": views,
    }


def _a(noun: str, start: bool = False) -> str:
    article = "an" if noun[0] in "aeiou" else "a"
    return f"{article.capitalize() if start else article} {noun}"


def _misspelt(sentence: str) -> str:
    """Swap two letters inside each word of six or more letters."""
    words = sentence.split(" ")
    for i, word in enumerate(words):
        if len(word) > 5:
            at = 1 + int(hashlib.sha256(word.encode()).hexdigest(), 16) % (len(word) - 4)
            words[i] = word[:at] + word[at + 1] + word[at] + word[at + 2 :]
    return " ".join(words)
