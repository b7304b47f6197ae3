"""Folders of pictures as other systems leave them: constant colours, so that means are exact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image


def picture(path: Path, red: int, size: tuple[int, int] = (8, 8)) -> Path:
    """A picture of (height, width) whose pixels are all (red, 0, 0), without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {}
    Image.new("RGB", size[::-1], (red, 0, 0)).save(path, **options)
    return path


def geneval(folder: Path, entries: Sequence[tuple[str, dict[str, Any], Sequence[int]]]) -> Path:
    """GenEval's layout: (prompt, metadata, the red of each picture) of each folder."""
    for number, (prompt, metadata, reds) in enumerate(entries):
        path = folder / f"{number:05d}"
        (path / "samples").mkdir(parents=True)
        (path / "metadata.jsonl").write_text(json.dumps({**metadata, "prompt": prompt}))
        for sample, red in enumerate(reds):
            picture(path / "samples" / f"{sample:04d}.png", red)
        picture(path / "grid.png", 255)
    return folder
