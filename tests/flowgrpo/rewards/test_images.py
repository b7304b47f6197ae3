"""Picture files as tensors: real files of many kinds, and files that are no whole picture."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo.rewards.images import from_file


def noise(height: int = 11, width: int = 7, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def as_array(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8 and image.shape[0] == 3
    return image.permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("name", "options"), [("a.png", {}), ("a.webp", {"lossless": True}), ("a.bmp", {}), ("a", {})]
)
def test_files_without_loss_keep_every_bit(tmp_path, name, options):
    pixels = noise()
    format = None if "." in name else "PNG"
    Image.fromarray(pixels).save(tmp_path / name, format=format, **options)
    assert np.array_equal(as_array(from_file(tmp_path / name)), pixels)


def test_a_jpeg_is_close(tmp_path):
    grey = np.full((16, 24, 3), (200, 90, 30), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.jpg", quality=95)
    assert np.abs(as_array(from_file(tmp_path / "a.jpg")).astype(int) - grey).max() <= 3


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_and_palettes_become_colours(tmp_path, mode):
    picture = Image.fromarray(noise()).convert(mode)
    picture.save(tmp_path / "a.png")
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(as_array(from_file(tmp_path / "a.png")), expected)


def test_cmyk_becomes_what_it_shows(tmp_path):
    # No ink but cyan, half of it.
    Image.new("CMYK", (8, 8), (128, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    pixels = as_array(from_file(tmp_path / "a.jpg")).astype(int)
    assert np.abs(pixels - (127, 255, 255)).max() <= 3


def test_transparency_is_laid_over_white(tmp_path):
    pixels = noise(channels=4)
    pixels[0, :, 3], pixels[1, :, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    shown = as_array(from_file(tmp_path / "a.png"))
    alpha = pixels[..., 3:].astype(float) / 255
    expected = alpha * pixels[..., :3] + (1 - alpha) * 255
    assert np.abs(shown - expected).max() <= 1
    assert (shown[0] == 255).all() and np.array_equal(shown[1], pixels[1, :, :3])


def test_a_transparent_colour_of_a_palette_is_white(tmp_path):
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 20, 30])
    picture.putpixel((0, 0), 0)
    picture.save(tmp_path / "a.png", transparency=1)
    shown = as_array(from_file(tmp_path / "a.png"))
    assert (shown[0, 0] == 0).all() and (shown[1:] == 255).all()


def test_grey_of_16_bits_is_rounded_to_8(tmp_path):
    values = np.array([[0, 128, 129, 256, 32896, 65407, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").mode.startswith("I")
    shown = as_array(from_file(tmp_path / "a.png"))
    # 65535 / 255 = 257 values become one.
    assert shown[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255]
    assert (shown == shown[..., :1]).all()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def test_colours_of_16_bits_keep_their_upper_8(tmp_path):
    """A PNG of 16 bits a colour, which Pillow reads but does not write."""
    row = b"\0" + struct.pack(">6H", 0, 32896, 65535, 257 * 7, 257 * 200, 257 * 255)
    header = struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    assert as_array(from_file(tmp_path / "a.png")).tolist() == [[[0, 128, 255], [7, 200, 255]]]


def test_a_picture_is_turned_as_its_exif_says(tmp_path):
    pixels = noise(4, 6)
    exif = Image.Exif()
    # 6: shown after a quarter turn clockwise.
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(as_array(from_file(tmp_path / "a.png")), np.rot90(pixels, -1))


def frames(path: Path) -> None:
    pictures = [Image.fromarray(noise() // (i + 1)) for i in range(3)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


def cut(path: Path) -> None:
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[:-400])


def float_pixels(path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(path)


def of_text(path: Path) -> None:
    path.write_text("a photo of a cat")


BROKEN = {
    "truncated.png": (cut, "truncated"),
    "truncated.jpg": (cut, "truncated"),
    "truncated.webp": (cut, ""),
    "text.png": (of_text, "it is no picture that Pillow knows"),
    "empty.png": (lambda path: path.write_bytes(b""), "it is empty"),
    "header.png": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), ""),
    "animated.gif": (frames, "it has 3 frames"),
    "animated.png": (frames, "it has 3 frames"),
    "animated.webp": (frames, "it has 3 frames"),
    "pages.tiff": (frames, "it has 3 frames"),
    "floats.tiff": (float_pixels, "its pixels are numbers of 32 bits"),
    "folder.png": (lambda path: path.mkdir(), "directory"),
    "absent.png": (lambda path: None, "there is no such file"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_whole_picture_has_a_reason(tmp_path, name):
    write, words = BROKEN[name]
    write(tmp_path / name)
    with pytest.raises(ValueError) as error:
        from_file(tmp_path / name)
    text = str(error.value)
    assert words in text and text and "\n" not in text


@pytest.mark.parametrize("factor", [1.5, 3])
def test_a_bomb_is_no_picture(tmp_path, monkeypatch, factor):
    """Above Pillow's limit it warns, above twice the limit it raises."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(100 / factor))
    Image.fromarray(noise(10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="exceeds limit of"):
        from_file(tmp_path / "a.png")


def test_the_first_picture_of_a_camera_counts(tmp_path):
    """An MPO file is a JPEG with smaller copies behind it."""
    pixels = np.full((16, 16, 3), 90, dtype=np.uint8)
    copies = [Image.fromarray(pixels // 2)]
    Image.fromarray(pixels).save(
        tmp_path / "a.jpg", format="MPO", save_all=True, append_images=copies
    )
    assert Image.open(tmp_path / "a.jpg").n_frames == 2
    assert np.abs(as_array(from_file(tmp_path / "a.jpg")).astype(int) - 90).max() <= 2
