"""Folders of grey pictures with captions, and rewards of the user's own that score them."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

NAMES = ("brightness", "length", "tagged")
SOURCE = """
def brightness(images, prompts, metadata):
    return images.double().mean(dim=(1, 2, 3)).tolist()

def length(images, prompts, metadata):
    return [len(prompt) for prompt in prompts]

def tagged(images, prompts, metadata):
    return [entry["rating"] for entry in metadata]
"""


def grey(path: Path, value: int, size: tuple[int, int] = (8, 8)) -> Path:
    """Write a picture of one grey, width x height pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def captioned(folder: Path, pictures: dict[str, tuple[int, str]]) -> Path:
    """Write pictures with captions beside them: name -> (grey, caption)."""
    for name, (value, caption) in pictures.items():
        grey(folder / name, value).with_suffix(".txt").write_text(caption)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    """All files below a folder, but for the time in dataset.json."""
    contents = {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    if "dataset.json" in contents:
        lines = contents["dataset.json"].splitlines()
        contents["dataset.json"] = b"\n".join(n for n in lines if b'"created"' not in n)
    return contents


def write_rewards(folder: Path) -> dict[str, str]:
    """Write a module of rewards: name -> file.py:function."""
    file = folder / "grey_rewards.py"
    file.write_text(SOURCE)
    return {name: f"{file}:{name}" for name in NAMES}
