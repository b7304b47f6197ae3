"""Clean renders of a text by Pillow, in fonts that come with matplotlib and Pillow."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch
from PIL import Image, ImageDraw, ImageFont

from flowgrpo.rewards.images import from_pil

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Italic", "DejaVuSansMono", "")
"""File names in matplotlib's font folder; "" is Pillow's own font."""
SIZES = (26, 36, 48, 64)
PAPERS = (
    ("white", "black"),
    ("#f4ead2", "#5a1f1f"),
    ("#1d3557", "#f1faee"),
    ("#2b2b2b", "#ffd166"),
)
SIDE = 512


def render(text: str, font: str, size: int, paper: tuple[str, str]) -> torch.Tensor:
    """uint8 [3, 512, 512]: `text` in the middle, on as many lines as it needs."""
    if font:
        folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
        face = ImageFont.truetype(folder / f"{font}.ttf", size)
    else:
        face = ImageFont.load_default(size)
    image = Image.new("RGB", (SIDE, SIDE), paper[0])
    draw = ImageDraw.Draw(image)
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, face) <= SIDE - 32:
            lines[-1] = longer
        else:
            lines.append(word)
    draw.multiline_text(
        (SIDE / 2, SIDE / 2), "\n".join(lines).strip(), paper[1], face, anchor="mm", align="center"
    )
    return from_pil(image)


def renders(texts: list[str]) -> torch.Tensor:
    """uint8 [N, 3, 512, 512]: the texts in turning fonts, sizes and papers."""
    return torch.stack(
        [
            render(text, FONTS[i % 6], SIZES[i // 6 % 4], PAPERS[i // 5 % 4])
            for i, text in enumerate(texts)
        ]
    )
