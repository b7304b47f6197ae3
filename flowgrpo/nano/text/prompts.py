"""nano_text's prompts, their metadata and the splits.

    a sign that says "K7"      a blue sign that says "K7P"      a card that says "X4QT"

A word has two to four of CHARACTERS. Whether a word is for training ("train"), for choosing
hyper-parameters ("tune") or for reported figures ("heldout") follows from a hash of the word alone:
six, one and three tenths of all words. So no word of a held-out prompt has been drawn or asked for
in pretraining or reinforcement learning, on any sign or card of any colour.
"""

from __future__ import annotations

import hashlib
import re
from functools import cache

import numpy as np

from flowgrpo.config.validation import ConfigError
from flowgrpo.nano.text.glyphs import CHARACTERS
from flowgrpo.nano.text.scenes import COLORS, LENGTHS, SURFACES
from flowgrpo.records import Prompts

TAGS = {length: f"{length} characters" for length in LENGTHS}
"""Task of a word by its length."""
SIZES = {"train": 3600, "tune": 600, "heldout": 600}
"""Prompts of each split that training and evaluation use, a third of them of each length."""
WORDS = ("a", *COLORS, *SURFACES, "that", "says")
MAX_TOKENS = 5 + max(LENGTHS)
_PATTERN = re.compile(
    rf'a(?: ({"|".join(COLORS)}))? ({"|".join(SURFACES)}) that says "([{CHARACTERS}]+)"'
)


def compose(word: str, surface: str, color: str | None) -> str:
    """Write the prompt for a word on a surface, of any colour (None) or a certain one."""
    return f'a {color + " " if color else ""}{surface} that says "{word}"'


def parse(prompt: str) -> dict:
    """Parse a prompt into its metadata: {"tag", "prompt", "word", "surface", "color"?}.

    Raises:
        ValueError: it is none of nano_text's.
    """
    match = _PATTERN.fullmatch(prompt)
    if match is None or len(match[3]) not in LENGTHS:
        raise ValueError(
            f"prompt {prompt!r}: expected a [{'|'.join(COLORS)}] {'|'.join(SURFACES)} that says "
            f'"WORD", with a word of {min(LENGTHS)} to {max(LENGTHS)} of {CHARACTERS}'
        )
    color, surface, word = match.groups()
    record = {"tag": TAGS[len(word)], "prompt": prompt, "word": word, "surface": surface}
    return record | ({"color": color} if color else {})


def split_of(word: str) -> str:
    """Look up the split of a word: "train", "tune" or "heldout"."""
    share = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "big") / 2**32
    return "heldout" if share < 0.3 else "tune" if share < 0.4 else "train"


@cache
def records(name: str) -> tuple[dict, ...]:
    """List the metadata of a split's prompts, the lengths in turn."""
    if name not in SIZES:
        raise ConfigError(
            f"the split is {name!r}, but one of {', '.join(SIZES)} is expected; name one."
        )
    out: dict[str, dict] = {}
    attempt = 0
    while len(out) < SIZES[name]:
        # From a hash, so that every machine and library draws the same.
        number = int.from_bytes(hashlib.sha256(f"{name} {attempt}".encode()).digest(), "big")
        attempt += 1
        word = ""
        for _ in range(LENGTHS[len(out) % len(LENGTHS)]):
            number, digit = divmod(number, len(CHARACTERS))
            word += CHARACTERS[digit]
        number, surface = divmod(number, len(SURFACES))
        # Every other prompt leaves the colour open.
        color = number % (2 * len(COLORS))
        chosen = list(COLORS)[color] if color < len(COLORS) else None
        if split_of(word) == name:
            # Words may come again, of two characters there are few; prompts may not.
            record = parse(compose(word, SURFACES[surface], chosen))
            out.setdefault(record["prompt"], record)
    return tuple(out.values())


def split(name: str) -> Prompts:
    """Build the prompts of a split as training and evaluation use them."""
    entries = records(name)
    return Prompts.of([m["prompt"] for m in entries], entries)


def draw_word(rng: np.random.Generator) -> str:
    """Draw a word of the training split, its length first."""
    while True:
        word = "".join(
            CHARACTERS[i] for i in rng.integers(len(CHARACTERS), size=rng.choice(LENGTHS))
        )
        if split_of(word) == "train":
            return word


def misread(word: str, rng: np.random.Generator) -> str:
    """Draw a word of the training split that differs from `word` in one character."""
    while True:
        i = rng.integers(len(word))
        other = word[:i] + CHARACTERS[rng.integers(len(CHARACTERS))] + word[i + 1 :]
        if other != word and split_of(other) == "train":
            return other
