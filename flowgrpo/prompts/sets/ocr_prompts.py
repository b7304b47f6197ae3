"""Prompts with a quoted text to render, for the reward ocr: a scene with a surface, and a phrase.

The phrases of the test part do not occur in the training part.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Any

from flowgrpo.prompts.sets import words

SURFACES = (
    'A wooden sign at the edge of a pine forest that reads "{}"',
    'A neon sign above the door of a small diner at night that says "{}"',
    'A chalkboard in front of a bakery with "{}" written in white chalk',
    'A hand-painted banner across a village street with the words "{}"',
    'The cover of an old leather book titled "{}", lying on a desk by a window',
    'A birthday cake on a kitchen table, decorated with the words "{}"',
    'A shop window on a rainy evening with "{}" in golden letters',
    'A cotton T-shirt on a hanger, printed with "{}"',
    'A coffee mug on a wooden table with the text "{}" on it',
    'A road sign in the desert under a clear sky that says "{}"',
    'A concert poster on a brick wall with "{}" in large letters',
    'A lighthouse keeper holding a board that says "{}"',
    'A ticket lying on a marble counter, printed with "{}"',
    'A robot in a workshop holding a placard that reads "{}"',
    'A delivery van parked by the kerb with "{}" painted on its side',
    'An enamel plate on a garden gate that reads "{}"',
    'A laptop on a tidy desk whose screen shows "{}"',
    'A stone archway over a quiet path, engraved with "{}"',
    'A flag on the mast of a sailing boat that says "{}"',
    'A jar of jam on a breakfast table, its label reading "{}"',
    'A subway wall covered in graffiti that spells "{}"',
    'A scoreboard in an empty stadium that shows "{}"',
    'A letter in neat handwriting that begins with "{}"',
    'A hot-air balloon over green hills with "{}" along its side',
    'A cardboard box in a hallway, stamped with "{}"',
    'A museum label under a bronze statue that reads "{}"',
    'A train station clock with "{}" on the board below it',
    'A snow-covered cabin with a lit sign that says "{}"',
    'A paper lantern in a night market with "{}" brushed on it',
    'A bookmark between the pages of a novel, embroidered with "{}"',
)

FIRST = words(
    "Golden Quiet Fresh Hidden Royal Northern Gentle Brave Lucky Frozen Clever Ancient Copper "
    "Rapid Humble Bright Velvet Twin Secret Merry Winter Urban Crimson Open Magic Silver Modern "
    "Sunny Wild Grand Happy Distant Smooth Vintage Double Honest",
    " ",
)
SECOND = words(
    "Harbor Bakery Garden Museum Orchard Kitchen Theatre Station Market Library Coffee Bridge "
    "Island Journey Festival Cinema Workshop Village Mountain Ocean Forest Castle Window Record "
    "Bicycle Pepper Thunder Planet Parade Chapter Pottery Summer Fountain Express Flower Ticket",
    " ",
)
SHORT = words(
    "Welcome Closed Sale Exit Danger Thanks Hello Quiet Fragile Caution Reserved Vacancy Private "
    "Victory Dream Adventure Courage Wonder Breakfast Tomorrow",
    " ",
)
SAYINGS = words(
    "Mind the Gap;Keep Off the Grass;Fresh Bread Daily;Beware of the Dog;Handle With Care;"
    "Back in Five Minutes;No Parking Here;Please Ring the Bell;Wet Paint;Last Call for Boarding;"
    "Happy Birthday Grandma;Closed on Sundays;Push the Button;Free Hugs Today;Lost and Found;"
    "Save the Bees;Made by Hand;Never Stop Learning;Out of Order;Pay at the Counter;"
    "Queue Starts Here;Road Work Ahead;Smile and Wave;Take Your Shoes Off;Two for One;"
    "Under New Management;Watch Your Step;Just Married;Do Not Disturb;Catch of the Day;"
    "Self Service Only;Good Luck Team;Vote Next Friday;Swim at Your Own Risk;The End"
)
DATED = ("Since {}", "Class of {}", "Summer {}", "Est. {}", "Expo {}")
YEARS = (1924, 1937, 1948, 1953, 1962, 1976, 1985, 1997, 2026, 2034)
NUMBERED = ("Gate {}", "Platform {}", "Room {}", "Highway {}", "Chapter {}", "Bus {}", "Route {}")
NUMBERS = (4, 7, 9, 12, 23, 36, 48, 64, 72, 85, 97, 243, 359)

Line = dict[str, Any]


def phrases() -> list[str]:
    """List the texts that may stand in a prompt."""
    texts = [f"{a} {b}" for a, b in product(FIRST, SECOND)]
    texts += [pattern.format(year) for pattern, year in product(DATED, YEARS)]
    texts += [pattern.format(number) for pattern, number in product(NUMBERED, NUMBERS)]
    return [*texts, *SAYINGS, *SHORT]


def tasks() -> Iterator[tuple[list[Line], int, int]]:
    """Yield (candidates, training prompts, test prompts): two thirds are names of two words."""
    names = [f"{a} {b}" for a, b in product(FIRST, SECOND)]
    others = [text for text in phrases() if text not in set(names)]
    yield _lines(names), 500, 100
    yield _lines(others), 140, 40


def key(line: Line) -> str:
    """Return the text to render."""
    return re.search('"(.*)"', line["prompt"])[1]


def _lines(texts: list[str]) -> list[Line]:
    return [{"tag": "text", "prompt": s.format(t)} for s, t in product(SURFACES, texts)]
