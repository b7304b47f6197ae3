"""Prompt -> train, validation or test, by a hash of the normalised prompt.

    u = first 8 bytes of SHA-256("<seed>\\n<normalised prompt>") / 2^64
    train if u < a, else validation if u < a + b, else test          shares a, b, 1 - a - b

A prompt has its split whatever else the set holds, so equal prompts never part, a command that goes
on splits as before, and more images move none. Prompts that differ in case, punctuation, spaces or
the form of their characters are one prompt here.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence
from fractions import Fraction

from flowgrpo.curation.dataset import SPLITS


def normalise(prompt: str) -> str:
    """Write a prompt in one form: NFKC, without case, punctuation and repeated spaces.

    A prompt of punctuation alone stays as it is.
    """
    text, before = prompt, None
    while text != before:
        # Folding may give characters that NFKC writes in another way, and the reverse. Upper case
        # first: it makes one letter of a dotless i and an i, which folding keeps apart.
        text, before = unicodedata.normalize("NFKC", text.upper().casefold()), text
    words = "".join(" " if unicodedata.category(c).startswith("P") else c for c in text)
    return " ".join(words.split()) or " ".join(text.split())


def prompt_key(prompt: str) -> str:
    """SHA-256 of the normalised prompt: what is one prompt for splits and pairs."""
    return hashlib.sha256(normalise(prompt).encode()).hexdigest()


def split_of(prompt: str, shares: Sequence[float], seed: int = 0) -> str:
    """Choose the split of a prompt; `shares` of train, validation and test sum to 1."""
    digest = hashlib.sha256(f"{seed}\n{normalise(prompt)}".encode()).digest()
    position, bound = Fraction(int.from_bytes(digest[:8], "big"), 1 << 64), Fraction(0)
    # Exact sums: a share of 0 has no prompt, and the last split ends at 1.
    for name, share in zip(SPLITS[:-1], shares, strict=False):
        bound += Fraction(str(share))
        if position < bound:
            return name
    return SPLITS[-1]
