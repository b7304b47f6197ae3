"""Pictures are cropped to the centre and resized; what is damaged says so."""

from __future__ import annotations

import functools
import io

import numpy as np
import pytest
import torch
from PIL import Image

from flowgrpo.curation import pictures
from flowgrpo.curation.pictures import UnreadableError


def columns(width: int, height: int) -> Image.Image:
    """A picture whose grey is the number of the column."""
    return Image.fromarray(np.tile(np.arange(width, dtype=np.uint8), (height, 1)))


def opened(picture: Image.Image, kind: str = "png", **options) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


def read(picture, size, upscale=False, **options):
    return pictures.read(functools.partial(opened, picture, **options), size, upscale)


@pytest.mark.parametrize(
    ("width", "height", "size", "left", "top"),
    [
        (6, 2, (2, 2), 2, 0),  # wide: columns 2 and 3
        (7, 3, (3, 5), 1, 0),
        (2, 6, (2, 2), 0, 2),  # tall: rows 2 and 3
        (5, 9, (3, 5), 0, 3),
        (4, 4, (4, 4), 0, 0),
    ],
)
def test_the_centre_is_cropped(width, height, size, left, top):
    """At scale 1, where every pixel is one of the source."""
    pixels = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    picture = read(Image.fromarray(pixels), size)
    assert picture.size == (width, height)
    expected = pixels[top : top + size[0], left : left + size[1]]
    assert torch.equal(picture.image, torch.from_numpy(expected.copy()).permute(2, 0, 1))


def lanczos(length: int, count: int, start: float, scale: float) -> np.ndarray:
    """Weights [count, length] of Lanczos with 3 lobes: pixel x has its centre at
    start + (x + 1/2) scale of the source, and a lobe is `scale` wide."""
    centres = start + (np.arange(count) + 0.5) * scale
    distance = (np.arange(length) + 0.5 - centres[:, None]) / scale
    weights = np.where(abs(distance) < 3, np.sinc(distance) * np.sinc(distance / 3), 0)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("width", "height", "size", "left", "top"),
    [(30, 12, (4, 6), 6, 0), (31, 12, (4, 4), 9.5, 0), (12, 31, (4, 6), 0, 11.5)],
)
def test_resized_by_lanczos(width, height, size, left, top):
    """The box is 18 x 12, 12 x 12 and 12 x 8 pixels; float64, from the definition."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = min(width / size[1], height / size[0])
    rows = lanczos(height, size[0], top, scale)
    columns = lanczos(width, size[1], left, scale)
    expected = np.einsum("yi,xj,ijc->cyx", rows, columns, pixels.astype(float))
    image = read(Image.fromarray(pixels), size).image.numpy()
    # Pillow rounds and clips after each of its two passes.
    assert abs(image - expected.clip(0, 255)).max() < 2


def test_smaller_pictures():
    for width, height in ((7, 8), (8, 7), (3, 20)):
        picture = read(columns(width, height), (8, 8))
        assert picture.image is None and picture.size == (width, height)
    assert read(columns(8, 8), (8, 8)).image is not None
    enlarged = read(columns(4, 4), (8, 8), upscale=True)
    assert enlarged.image.shape == (3, 8, 8) and enlarged.size == (4, 4)


def test_a_picture_is_turned_as_it_is_looked_at():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    picture = read(columns(4, 2), (4, 2), exif=exif)
    assert picture.size == (2, 4)
    # The left column has become the upper row.
    assert picture.image[0].tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


def test_modes_become_rgb():
    clear = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    image = read(clear, (2, 2)).image
    assert image[:, 0, 0].tolist() == [255, 0, 0] and image[:, 1, 1].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([9, 9, 9, 1, 2, 3])
    assert read(palette, (2, 2)).image[:, 0, 0].tolist() == [1, 2, 3]
    assert read(palette, (2, 2), transparency=1).image[:, 0, 0].tolist() == [255, 255, 255]
    deep = Image.fromarray(np.full((2, 2), 0x1280, dtype=np.uint16))
    assert read(deep, (2, 2)).image.unique().tolist() == [0x12]
    # Rounded, as evaluation reads the same file: 0x12F0 / 257 is 18.87.
    deep = Image.fromarray(np.full((2, 2), 0x12F0, dtype=np.uint16))
    assert read(deep, (2, 2)).image.unique().tolist() == [19]
    assert read(Image.new("L", (2, 2), 7), (2, 2)).image.unique().tolist() == [7]
    assert read(Image.new("CMYK", (2, 2)), (2, 2), kind="tiff").image.unique().tolist() == [255]
    first = {"save_all": True, "append_images": [Image.new("L", (2, 2), 200)]}
    assert read(Image.new("L", (2, 2), 10), (2, 2), kind="gif", **first).image[0, 0, 0] == 10


def test_pictures_that_cannot_be_read(tmp_path, monkeypatch):
    path = tmp_path / "a.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for content, reason in (
        (b"no picture", "cannot identify image file"),
        (whole[: len(whole) // 2], "truncated"),
        (b"", "cannot identify image file"),
    ):
        path.write_bytes(content)
        with pytest.raises(UnreadableError, match=reason) as error:
            pictures.read(functools.partial(Image.open, path), (8, 8), False)
        assert "\n" not in str(error.value) and not str(error.value).endswith(".")
    with pytest.raises(UnreadableError, match="No such file"):
        pictures.read(functools.partial(Image.open, tmp_path / "absent.png"), (8, 8), False)
    path.write_bytes(whole)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UnreadableError, match="decompression bomb"):
        pictures.read(functools.partial(Image.open, path), (8, 8), False)


def test_a_written_image_is_read_to_the_bit(tmp_path):
    from flowgrpo.curation.dataset import read_image

    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    path = tmp_path / "ab" / "image.png"
    pictures.write(path, image)
    assert torch.equal(read_image(path), image)
    small = Image.open(
        io.BytesIO(pictures.thumbnail(torch.zeros((3, 224, 112), dtype=torch.uint8)))
    )
    assert small.size == (56, 112) and small.format == "JPEG"
