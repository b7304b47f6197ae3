"""The world of nano_text: glyphs, pictures, prompts, splits and quality figures."""

import hashlib

import numpy as np
import pytest
import torch

from flowgrpo.config import ConfigError
from flowgrpo.nano.text import prompts, verify
from flowgrpo.nano.text.glyphs import CHARACTERS, FRACTION, bake, stamps
from flowgrpo.nano.text.scenes import COLORS, LIGHT, PALETTE, SURFACES, paint, render
from flowgrpo.prompts.load import load_prompts
from flowgrpo.rewards.ocr import quoted_text


def test_stamps_are_moved_copies_of_one_shape():
    table = stamps()
    assert table.shape == (34, FRACTION, FRACTION, 25, 17)
    # A move leaves the amount of ink, and moves its centre by as much, up to the pixels.
    ink = table.sum((-2, -1))
    assert (ink == ink[:, :1, :1]).all() and (ink > 20).all()
    x = (table * (np.arange(17) + 0.5)).sum((-2, -1)) / ink
    y = (table * (np.arange(25) + 0.5)[:, None]).sum((-2, -1)) / ink
    steps = np.arange(FRACTION) / FRACTION
    np.testing.assert_allclose(x - x[:, :, :1], np.broadcast_to(steps, x.shape), atol=0.05)
    np.testing.assert_allclose(y - y[:, :1], np.broadcast_to(steps[:, None], y.shape), atol=0.05)
    assert len({stamp.tobytes() for stamp in table[:, 0, 0]}) == len(CHARACTERS) == 34


def test_baking_again_gives_the_file_up_to_the_edge_of_a_stroke(tmp_path):
    """FreeType's versions may differ in single points."""
    from safetensors.numpy import load_file

    from flowgrpo.nano.text.glyphs import FILE

    bake(tmp_path / "glyphs.safetensors")
    again = np.unpackbits(load_file(tmp_path / "glyphs.safetensors")["bits"])
    assert (again != np.unpackbits(load_file(FILE)["bits"])).mean() < 0.01


def test_a_picture_has_its_word_where_it_should_be():
    zero = np.zeros((1, 2))
    sign, card = (render(["H1"], np.array([s]), np.array([2]), zero)[0] for s in (0, 1))
    blue = np.array(COLORS["blue"])
    assert (sign[:, 0, 0] == blue).all() and (card[:, 0, 0] == LIGHT).all()
    # The left stem of the H is ink; sign and card are each other's negative.
    assert (sign[:, 16, 28] == LIGHT).all() and (card[:, 16, 28] == blue).all()
    assert (np.abs(sign.astype(int) + card - (blue + LIGHT)[:, None, None]) <= 1).all()
    moved = render(["H1"], np.array([0]), np.array([2]), np.array([[1.0, -2.0]]))[0]
    np.testing.assert_array_equal(moved[:, :-2, 1:], sign[:, 2:, :-1])
    # What leaves the picture is cut.
    away = render(["MMMM"], np.array([0]), np.array([2]), np.array([[9.0, 7.0]]))[0]
    assert away.shape == (3, 32, 80)


def test_pictures_are_the_same_everywhere():
    words, rng = ["K7", "9QX", "ABCZ"], np.random.default_rng(0)
    images = paint(words, np.array([0, 1, 0]), np.array([0, 3, 4]), rng)
    digest = hashlib.sha256(images.tobytes()).hexdigest()[:16]
    assert digest == "7553f052f9147c1e"


def test_prompts_parse_and_splits_share_no_word():
    words = {}
    for name, size in prompts.SIZES.items():
        entries = prompts.records(name)
        assert len(entries) == len({m["prompt"] for m in entries}) == size
        assert all(prompts.parse(m["prompt"]) == m for m in entries)
        assert all(quoted_text(m["prompt"]) == m["word"] for m in entries)
        tags = [m["tag"] for m in entries]
        assert all(tags.count(tag) == size // 3 for tag in prompts.TAGS.values())
        words[name] = {m["word"] for m in entries}
        assert {prompts.split_of(word) for word in words[name]} == {name}
    assert not words["train"] & words["heldout"] and not words["train"] & words["tune"]
    assert load_prompts("nano_text", "heldout").texts == prompts.split("heldout").texts


def test_a_word_that_is_drawn_or_misread_is_of_the_training_split():
    rng = np.random.default_rng(0)
    for _ in range(200):
        word = prompts.draw_word(rng)
        other = prompts.misread(word, rng)
        assert prompts.split_of(word) == prompts.split_of(other) == "train"
        assert len(word) == len(other)
        assert sum(a != b for a, b in zip(word, other, strict=True)) == 1


@pytest.mark.parametrize(
    "text",
    ["a sign", 'a sign that says "K"', 'a sign that says "K0"', 'a pink sign that says "K7"'],
)
def test_other_prompts_are_errors(text):
    with pytest.raises(ValueError, match="expected a"):
        prompts.parse(text)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ConfigError, match="the split is 'test'"):
        prompts.records("test")


def test_quality_of_true_pictures_is_good_and_of_others_is_not():
    rng = np.random.default_rng(0)
    records = [m for m in prompts.records("tune") if "color" in m][:60]
    surfaces = np.array([SURFACES.index(m["surface"]) for m in records])
    colors = np.array([list(COLORS).index(m["color"]) for m in records])
    words = [m["word"] for m in records]
    right = torch.from_numpy(paint(words, surfaces, colors, rng))
    figures = verify.quality(right, records)
    assert figures["obeyed"] == 1.0
    assert figures["palette"] < 0.002 and figures["background"] < 0.002
    swapped = torch.from_numpy(paint(words, 1 - surfaces, colors, rng))
    assert verify.quality(swapped, records)["obeyed"] == 0.0
    other = torch.from_numpy(paint(words, surfaces, (colors + 1) % len(COLORS), rng))
    assert verify.quality(other, records)["obeyed"] == 0.0
    noise = torch.from_numpy(rng.integers(-40, 41, right.shape))
    noisy = verify.quality((right + noise).clamp(0, 255).to(torch.uint8), records)
    assert noisy["background"] > 0.04
    faded = (right.float() * 0.8).to(torch.uint8)
    assert verify.quality(faded, records)["palette"] > 0.03
    assert len(PALETTE) == 5
