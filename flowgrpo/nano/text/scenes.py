"""The world that nano_text draws: a word of two to four characters on a sign or a card, 80 x 32
pixels.

A sign is coloured and its word is light; a card is light and its word is coloured. The word stands
in the middle, `JITTER` pixels off it at most, in steps of a quarter of a pixel.
"""

from __future__ import annotations

import numpy as np

from flowgrpo.nano.text.glyphs import (
    CHARACTERS,
    FRACTION,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    stamps,
)

HEIGHT, WIDTH = 32, 80
LENGTHS = (2, 3, 4)
SURFACES = ("sign", "card")
COLORS = {
    "red": (200, 36, 52),
    "green": (30, 120, 62),
    "blue": (34, 76, 196),
    "purple": (122, 50, 156),
    "black": (42, 42, 50),
}
LIGHT = (246, 244, 238)
PALETTE = np.array(list(COLORS.values()), dtype=np.float32)
JITTER = 2.0
_CODES = {character: i for i, character in enumerate(CHARACTERS)}


def render(
    words: list[str], surfaces: np.ndarray, colors: np.ndarray, offsets: np.ndarray
) -> np.ndarray:
    """Paint pictures: uint8 [M, 3, 32, 80].

    Args:
        words: of CHARACTERS.
        surfaces: int [M], index into SURFACES.
        colors: int [M], index into COLORS.
        offsets: float [M, 2] as (x, y), of the word from the middle in pixels, rounded to the grid
            of FRACTION.
    """
    ink = _opacity(words, offsets)[:, None]
    dark, light = PALETTE[colors][:, :, None, None], np.array(LIGHT, np.float32)[:, None, None]
    sign = (np.asarray(surfaces) == SURFACES.index("sign"))[:, None, None, None]
    ground, paint = np.where(sign, dark, light), np.where(sign, light, dark)
    return np.rint(ground + ink * (paint - ground)).astype(np.uint8)


def _opacity(words: list[str], offsets: np.ndarray) -> np.ndarray:
    """Compute the opacity of the words, float32 [M, 32, 80] in [0, 1]."""
    # A border for what leaves the picture.
    border = 2 * GLYPH_WIDTH
    canvas = np.zeros((len(words), HEIGHT + 2 * border, WIDTH + 2 * border), np.float32)
    table = stamps()
    for row, word, (dx, dy) in zip(canvas, words, offsets, strict=True):
        left = (WIDTH - GLYPH_WIDTH * len(word)) / 2 + dx + border
        top = (HEIGHT - GLYPH_HEIGHT) / 2 + dy + border
        x, right = divmod(round(left * FRACTION), FRACTION)
        y, down = divmod(round(top * FRACTION), FRACTION)
        for character in word:
            stamp = table[_CODES[character], down, right]
            row[y : y + GLYPH_HEIGHT + 1, x : x + GLYPH_WIDTH + 1] += stamp
            x += GLYPH_WIDTH
    return np.minimum(canvas[:, border:-border, border:-border], 1.0)


def paint(
    words: list[str], surfaces: np.ndarray, colors: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Paint pictures as `render` does, with each word's offset drawn."""
    reach = int(JITTER * FRACTION)
    return render(
        words, surfaces, colors, rng.integers(-reach, reach + 1, (len(words), 2)) / FRACTION
    )
