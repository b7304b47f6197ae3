"""Pictures of sources -> images of one size.

    s = max(h / h0, w / w0)                 scale from h0 x w0 to h x w
    box = (w / s) x (h / s), in the centre  the largest with the new aspect ratio
    image = Lanczos(box -> h x w)           by Pillow's ImageOps.fit

s > 1 would enlarge the picture, which then is too small. The size h0 x w0 is that of the picture as
a viewer shows it (`as_shown` of rewards/images.py): turned as its EXIF data say, transparency over
white, 16 bits a colour rounded to 8. Of an animation the first frame counts.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps
from torch import Tensor

from flowgrpo import files
from flowgrpo.rewards.images import as_shown, from_pil, to_pil

THUMBNAIL = 112
"""Pixels of the longer side of a thumbnail."""


class UnreadableError(Exception):
    """A picture that cannot be read; the message is the reason."""


@dataclass(frozen=True)
class Picture:
    """A picture that has been read and fitted."""

    size: tuple[int, int]
    """Width and height in the source, in pixels."""
    image: Tensor | None
    """uint8 [3, H, W]; None for one that is too small."""


def read(open_picture: Callable[[], Image.Image], size: tuple[int, int], upscale: bool) -> Picture:
    """Read a picture and fit it to height and width `size`.

    Raises:
        UnreadableError: it is none, is damaged, or is too large to be decoded safely.
    """
    try:
        with open_picture() as picture:
            rgb = as_shown(picture)
    # Decoders of a dozen formats: anything may come out of a damaged file.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UnreadableError(reason.rstrip(".")) from error
    height, width = size
    if not upscale and (rgb.width < width or rgb.height < height):
        return Picture(rgb.size, None)
    fitted = ImageOps.fit(rgb, (width, height), Image.Resampling.LANCZOS)
    return Picture(rgb.size, from_pil(fitted))


def write(path: Path, image: Tensor) -> None:
    """Write an image, uint8 [3, H, W], as a PNG file that is there whole or not at all."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG", compress_level=4)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_bytes(path, buffer.getvalue())


def thumbnail(image: Tensor) -> bytes:
    """Encode a small JPEG of an image, uint8 [3, H, W]."""
    picture, buffer = to_pil(image), io.BytesIO()
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    picture.save(buffer, format="JPEG", quality=85)
    return buffer.getvalue()


def data_address(data: bytes, kind: str) -> str:
    """Write a picture's file as an address that a page holds itself; `kind` is png or jpeg."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
