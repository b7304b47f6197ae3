"""Pictures that prompts come with, for models that edit them."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from flowgrpo.config import ConfigError

if TYPE_CHECKING:
    from PIL import Image


def check_picture(path: str, argument: str) -> None:
    """Raise ConfigError unless the file `path` begins as a picture does; `argument`: what named it.

    Its pixels are not read: a prompt set may have thousands.
    """
    from PIL import Image

    try:
        with Image.open(path):
            pass
    # Not an OSError: a picture of more pixels than Pillow takes, and a path with a null in it.
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"{argument} is {path!r}, which cannot be read as a picture ({_reason(error)}); "
            "correct the path, or put a picture there."
        ) from error


def read_picture(path: str) -> Image.Image:
    """Read a picture in RGB, turned as its EXIF orientation says, as diffusers' `load_image` does.

    Raises:
        ConfigError: it cannot be read.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(
            f"the image {path!r} cannot be read as a picture ({_reason(error)}); restore it, or "
            "take its prompt out of the set."
        ) from error


def content_of(path: str) -> str:
    """SHA-256 of a picture's file.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).hexdigest()
    except OSError as error:
        raise ConfigError(
            f"the image {path!r} cannot be read ({_reason(error)}); restore it, or take its prompt "
            "out of the set."
        ) from error


def _reason(error: BaseException) -> str:
    """Say in a few words what went wrong."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0].rstrip(".")
