"""Small curated sets on disk, in the format of flowgrpo/curation/dataset.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from flowgrpo.curation import dataset


def picture(number: int, size: tuple[int, int]) -> torch.Tensor:
    """Random pixels, uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)


def save_picture(folder: Path, pixels: torch.Tensor) -> str:
    """Write a picture under the name of its content, and return that."""
    name = dataset.image_name(dataset.content_hash(pixels))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(folder / name)
    return name


def save(folder: Path, texts: list[str], size: tuple[int, int], pairs: bool = True) -> Path:
    """Write a set: image i has text i; with `pairs`, pair i is the images 100 + i and 200 + i."""

    def lines(name: str, entries: list[dict]) -> None:
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))

    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {
            "prompt": text,
            "image": save_picture(folder, picture(i, size)),
            "scores": {"aesthetic": float(i)},
            "source": f"photos/{i}.png",
            "size": [size[1], size[0]],
        }
        for i, text in enumerate(texts)
    ]
    lines("train.jsonl", entries)
    if pairs:
        scores = {"chosen": {"aesthetic": 1.0}, "rejected": {"aesthetic": 0.0}}
        rows = [
            {
                "prompt": text,
                "chosen": save_picture(folder, picture(100 + i, size)),
                "rejected": save_picture(folder, picture(200 + i, size)),
                "scores": scores,
            }
            for i, text in enumerate(texts)
        ]
        lines("pairs.jsonl", rows)
    about = {"format": dataset.FORMAT, "resolution": list(size), "rewards": ["aesthetic"]}
    (folder / dataset.FILE).write_text(json.dumps(about))
    return folder
