"""Images between rewards and libraries: uint8 [B, 3, H, W] tensors, Pillow images, files, PNG."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional


def check_images(images: Any, prompts: Sequence[Any], metadata: Sequence[Any]) -> None:
    """Raise unless `images` is uint8 [B, 3, H, W] with B prompts and B metadata."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images is {kind}, but a uint8 tensor [B, 3, H, W] is expected.")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}, but [B, 3, H, W] is expected.")
    _check_counts("image", len(images), prompts, metadata)


def check_videos(videos: Any, prompts: Sequence[Any], metadata: Sequence[Any]) -> None:
    """Raise unless `videos` is uint8 [B, F, 3, H, W] with B prompts and B metadata."""
    if not isinstance(videos, Tensor) or videos.dtype != torch.uint8:
        kind = getattr(videos, "dtype", type(videos).__name__)
        raise TypeError(f"videos is {kind}, but a uint8 tensor [B, F, 3, H, W] is expected.")
    if videos.ndim != 5 or videos.shape[2] != 3:
        shape = tuple(videos.shape)
        raise ValueError(f"videos has shape {shape}, but [B, F, 3, H, W] is expected.")
    _check_counts("video", len(videos), prompts, metadata)


def _check_counts(kind: str, count: int, prompts: Sequence[Any], metadata: Sequence[Any]) -> None:
    if not count == len(prompts) == len(metadata):
        raise ValueError(
            f"there are {count} {kind}s, {len(prompts)} prompts and {len(metadata)} metadata, "
            f"but one prompt and one metadata for each {kind} are expected."
        )


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image, uint8 [3, H, W], to Pillow's RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy(), mode="RGB")


def from_pil(image: Image.Image) -> Tensor:
    """Convert any Pillow image to uint8 [3, H, W]."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


def from_file(path: Path) -> Tensor:
    """Read a picture file of any format that Pillow knows, uint8 [3, H, W], as a viewer shows it:
    turned as its EXIF data say, transparency over white, 16 bits a colour rounded to 8.

    Colour profiles are not applied.

    Raises:
        ValueError: the file is no whole picture; the message is the reason alone.
    """
    try:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                # An MPO of a camera holds the picture, then smaller copies of it.
                frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
                if frames > 1:
                    raise ValueError(f"it has {frames} frames")
                image.load()
                return from_pil(as_shown(image))
    except FileNotFoundError as error:
        raise ValueError("there is no such file") from error
    except UnidentifiedImageError as error:
        raise ValueError("it is no picture that Pillow knows") from error
    # Readers of broken files raise OSError, SyntaxError, struct.error, EOFError and others.
    except Exception as error:
        text = " ".join((getattr(error, "strerror", None) or str(error)).split())
        raise ValueError(text or type(error).__name__) from error


def as_shown(image: Image.Image) -> Image.Image:
    """Decode a picture as a viewer shows it, in RGB: see `from_file`.

    Raises:
        ValueError: a pixel is a number of 32 bits, whose range no format states.
    """
    return _over_white(_as_8_bits(image)).convert("RGB")


def _as_8_bits(image: Image.Image) -> Image.Image:
    """Turn a picture as its EXIF data say, and round grey of 16 bits to 8, which Pillow would clip.

    Raises:
        ValueError: a pixel is a number of 32 bits, whose range no format states.
    """
    # PNG and PGM: Pillow holds their 16 bits in integers of 32.
    grey_16 = image.mode.startswith("I;16") or (
        image.mode == "I" and image.format in ("PNG", "PPM")
    )
    if image.mode in ("I", "F") and not grey_16:
        raise ValueError("its pixels are numbers of 32 bits")
    image = ImageOps.exif_transpose(image)
    if not grey_16:
        return image
    grey = np.asarray(image).astype(np.float64) / 65535
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    """Lay a picture with transparency over white; its hidden colours may be anything."""
    if not image.has_transparency_data:
        return image
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA"))


def to_png(image: Tensor) -> str:
    """Encode an image, uint8 [3, H, W], as base64 of a PNG file, which loses nothing."""
    buffer = io.BytesIO()
    # Level 1: the fastest, and as exact as any other.
    to_pil(image).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(text: str, max_pixels: int = 4096 * 4096) -> Tensor:
    """Decode what `to_png` encoded, uint8 [3, H, W].

    Raises:
        ValueError: `text` is no base64 of a PNG file, or the image is larger than `max_pixels`.
    """
    try:
        image = Image.open(io.BytesIO(base64.b64decode(text, validate=True)), formats=["PNG"])
        # The size is in the header: nothing is decompressed before it is checked.
        if image.width * image.height <= max_pixels:
            return from_pil(image)
    except Image.DecompressionBombError as error:
        raise ValueError(f"far more than the {max_pixels} pixels that are allowed") from error
    except (binascii.Error, OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"not base64 of a PNG file ({error})") from error
    raise ValueError(f"{image.width} x {image.height} pixels, but at most {max_pixels} are allowed")


def resize_smoothly(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images, float [B, 3, H, W] in 0 ... 255, to [B, 3, *size], as `resize` does but
    without its rounding, so that a gradient comes through."""
    for shape in ((images.shape[-2], size[1]), size):
        if images.shape[-2:] != shape:
            images = functional.interpolate(
                images, size=shape, mode="bicubic", align_corners=False, antialias=True
            ).clamp(0, 255)
    return images


def resize(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize images, uint8 [B, 3, H, W], to float32 [B, 3, *size], whole numbers in 0 ... 255.

    Bicubic and antialiased as Pillow resizes 8-bit images, which rounds and clips after the first
    of its two passes too: the horizontal one (Pillow 13 may begin with the other).
    """
    resized = images.float()
    for shape in ((resized.shape[-2], size[1]), size):
        if resized.shape[-2:] != shape:
            resized = functional.interpolate(
                resized, size=shape, mode="bicubic", align_corners=False, antialias=True
            )
            resized = resized.round_().clamp_(0, 255)
    return resized


def comparison_picture(height: int, width: int) -> Tensor:
    """Draw the picture that servers are compared by, uint8 [3, H, W]: no two columns, rows or
    neighbours alike, and the same everywhere."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x * 255 // width, y * 255 // height, (x ^ y) % 256)).to(torch.uint8)


def comparison_video(frames: int, height: int, width: int) -> Tensor:
    """Draw the video that servers are compared by, uint8 [F, 3, H, W]: the picture, moving."""
    picture = comparison_picture(height, width)
    return torch.stack([picture.roll(t * t, dims=-1) for t in range(frames)])
