"""The characters that nano_text draws, as bitmaps, so that a picture is the same on every machine.

`glyphs.safetensors` holds one bit for each of FRACTION x FRACTION points of a pixel. This command
made it, from DejaVu Sans Mono Bold as it comes with matplotlib:

    python -m flowgrpo.nano.text.glyphs
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

# Without 0 and O: nobody can tell them apart in a string that is no word, nor can an OCR.
CHARACTERS = "ABCDEFGHIJKLMNPQRSTUVWXYZ123456789"
GLYPH_WIDTH, GLYPH_HEIGHT = 16, 24
"""Pixels of a glyph's cell; the font has one width for all."""
FRACTION = 4
"""Positions lie on a grid of 1 / FRACTION pixel."""
FILE = Path(__file__).parent / "glyphs.safetensors"
_FONT, _FONT_SIZE = "DejaVuSansMono-Bold.ttf", 26


def bake(path: Path = FILE) -> None:
    """Draw every character with Pillow and write its bits, uint8 [34, 96, 8], to `path`."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont
    from safetensors.numpy import save_file

    face = ImageFont.truetype(
        Path(matplotlib.get_data_path(), "fonts", "ttf", _FONT), _FONT_SIZE * FRACTION
    )
    width, height = GLYPH_WIDTH * FRACTION, GLYPH_HEIGHT * FRACTION
    bits = []
    for character in CHARACTERS:
        image = Image.new("1", (width, height))
        # On one base line, capitals in the middle of the cell.
        cap = face.getbbox("H", anchor="ls")
        origin = (width / 2, (height - cap[1] - cap[3]) / 2)
        ImageDraw.Draw(image).text(origin, character, 1, face, anchor="ms")
        bits.append(np.packbits(np.asarray(image), axis=-1))
    save_file({"bits": np.stack(bits)}, path)


@cache
def stamps() -> np.ndarray:
    """Compute opacities, float32 [34, FRACTION, FRACTION, 25, 17], of every character moved down
    and to the right by the fractions of a pixel."""
    from safetensors.numpy import load_file

    bits = np.unpackbits(load_file(FILE)["bits"], axis=-1)
    count, height, width = bits.shape
    out = np.zeros((count, FRACTION, FRACTION, GLYPH_HEIGHT + 1, GLYPH_WIDTH + 1), np.float32)
    for down in range(FRACTION):
        for right in range(FRACTION):
            fine = np.zeros((count, height + FRACTION, width + FRACTION), np.int64)
            fine[:, down : down + height, right : right + width] = bits
            cells = fine.reshape(count, GLYPH_HEIGHT + 1, FRACTION, GLYPH_WIDTH + 1, FRACTION)
            out[:, down, right] = cells.sum(axis=(2, 4)) / FRACTION**2
    return out


if __name__ == "__main__":
    bake()
