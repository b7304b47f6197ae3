"""Images between rewards and libraries: uint8 [B, 3, H, W] tensors, Pillow images, PNG, base64."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional


def check_images(images: Any, prompts: Sequence[Any], metadata: Sequence[Any]) -> None:
    """Raise unless `images` is uint8 [B, 3, H, W] with B prompts and B metadata."""
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"images is {kind}, but a uint8 tensor [B, 3, H, W] is expected.")
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images has shape {tuple(images.shape)}, but [B, 3, H, W] is expected.")
    if not len(images) == len(prompts) == len(metadata):
        raise ValueError(
            f"there are {len(images)} images, {len(prompts)} prompts and {len(metadata)} metadata, "
            "but one prompt and one metadata for each image are expected."
        )


def to_pil(image: Tensor) -> Image.Image:
    """Convert an image, uint8 [3, H, W], to Pillow's RGB."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy(), mode="RGB")


def from_pil(image: Image.Image) -> Tensor:
    """Convert any Pillow image to uint8 [3, H, W]."""
    rgb = image.convert("RGB")
    flat = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return flat.view(rgb.height, rgb.width, 3).permute(2, 0, 1).contiguous()


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
