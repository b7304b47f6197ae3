"""The verifier against scenes whose content is known, and against ways to cheat it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo.nano import draw, prompts, scenes, verify


@pytest.fixture(scope="module")
def real():
    """One clean picture for every prompt of the task, and a few outside it."""
    extra = (
        "three red circles",
        "two red circles and a blue square",
        "one red circle above a blue square",
    )
    records = [m for name in prompts.SPLITS for m in prompts.records(name)]
    records += [prompts.parse(text) for text in extra for _ in range(20)]
    return draw.draw(records, np.random.default_rng(0)), records


@pytest.mark.slow
@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05])
def test_real_pictures_fulfil_their_prompts(real, noise):
    images, records = real
    noisy = images + np.random.default_rng(1).normal(0, 255 * noise, images.shape)
    scores = verify.score(noisy.round().clip(0, 255).astype(np.uint8), records)
    assert scores["strict"].mean() >= 0.99
    assert scores["partial"].mean() >= 0.99


def test_pictures_of_other_prompts_do_not(real):
    images, records = real
    order = np.random.default_rng(2).permutation(len(records))
    scores = verify.score(images, [records[i] for i in order])
    assert scores["strict"].mean() <= 0.06
    assert scores["partial"].mean() <= 0.35


def paint(*objects):
    """A picture of (shape, colour, x, y) objects of scale 1."""
    names, colors = zip(*[(o[0], o[1]) for o in objects], strict=True)
    shapes = np.array([[scenes.SHAPES.index(n) for n in names]])
    paints = np.array([[list(scenes.COLORS).index(c) for c in colors]])
    centers = np.array([[(o[2], o[3]) for o in objects]], dtype=float)
    return scenes.render(shapes, paints, centers, np.ones(shapes.shape))


def one(image, text):
    scores = verify.score(image, [prompts.parse(text)])
    return float(scores["strict"][0]), float(scores["partial"][0])


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("color", scenes.COLORS)
def test_finds_place_shape_and_color_at_any_subpixel_position(shape, color):
    rng = np.random.default_rng(3)
    for x, y in rng.uniform(6, 18, (20, 2)):
        (found,) = verify.find_objects(paint((shape, color, x, y))[0])
        assert (found.shape, found.color) == (shape, color)
        # The centroid of the triangle lies below the centre of its box.
        assert abs(found.center[0] - x) < 0.35
        assert -0.4 < found.center[1] - y < 1.7


def test_partial_credit_is_the_share_of_requirements_met():
    two = paint(("circle", "red", 6, 6), ("circle", "red", 18, 18))
    assert one(two, "two circles") == (1, 1)
    assert one(two, "three circles") == (0, pytest.approx(2 / 3))
    assert one(two, "a circle") == (0, 0)
    pair = paint(("circle", "red", 6, 12), ("square", "blue", 18, 12))
    assert one(pair, "a red circle and a blue square") == (1, 1)
    assert one(pair, "a red circle and a green square") == (0, pytest.approx(3 / 4))
    assert one(pair, "a circle left of a square") == (1, 1)
    assert one(pair, "a square left of a circle") == (0, pytest.approx(2 / 3))
    assert one(pair, "a circle above a square") == (0, pytest.approx(2 / 3))
    assert one(pair, "a circle") == (0, pytest.approx(1 / 2))


def test_swapped_colors_are_no_attribute_binding():
    swapped = paint(("circle", "blue", 6, 12), ("square", "red", 18, 12))
    assert one(swapped, "a red circle and a blue square") == (0, pytest.approx(1 / 2))


def test_a_diagonal_neighbour_is_beside_and_above():
    pair = paint(("circle", "red", 6, 6), ("square", "blue", 18, 18))
    assert one(pair, "a circle left of a square")[0] == 1
    assert one(pair, "a circle above a square")[0] == 1
    assert one(pair, "a circle below a square")[0] == 0


@pytest.mark.parametrize("value", [0, 128, 246, 255])
def test_a_uniform_picture_scores_nothing(value):
    flat = np.full((1, 3, 24, 24), value, dtype=np.uint8)
    assert one(flat, "a circle") == (0, 0)


def test_noise_and_blobs_are_junk():
    rng = np.random.default_rng(4)
    noise = rng.integers(0, 256, (8, 3, 24, 24)).astype(np.uint8)
    assert verify.score(noise, [prompts.parse("a circle")] * 8)["strict"].max() == 0
    blob = paint(("circle", "red", 8.5, 12), ("square", "red", 14.5, 12))
    assert one(blob, "a circle")[0] == 0
    speck = paint(("circle", "red", 12, 12))
    speck[0, :, 1:3, 1:3] = 0
    assert one(speck, "a circle") == (0, pytest.approx(1 / 2))


def test_quality_sees_dirt_drift_and_sameness(real):
    images, records = real
    images, records = images[:60], records[:60]
    clean = verify.quality(images, records)
    assert clean["palette"] == 0 and clean["background"] == 0
    dirty = images.astype(int) + np.random.default_rng(5).normal(0, 8, images.shape).round()
    assert verify.quality(dirty.clip(0, 255).astype(np.uint8), records)["background"] > 0.02
    drifted = (images.astype(int) + np.array([0, 25, 0])[:, None, None]).clip(0, 255)
    assert verify.quality(drifted.astype(np.uint8), records)["palette"] > 0.02
    same = [records[0]] * 5
    varied = draw.draw(same, np.random.default_rng(6))
    assert verify.quality(varied, same)["diversity"] > 0.1
    assert verify.quality(varied[:1].repeat(5, axis=0), same)["diversity"] == 0


def test_tensors_and_arrays_score_alike(real):
    images, records = real
    a = verify.score(images[:20], records[:20])
    b = verify.score(torch.from_numpy(images[:20]), records[:20])
    assert all(np.array_equal(a[k], b[k]) for k in a)


def test_bad_input():
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B, 3, 24, 24\], got float32"):
        verify.score(np.zeros((1, 3, 24, 24), np.float32), [{}])
    with pytest.raises(ValueError, match="metadata: expected 2 records"):
        verify.score(np.zeros((2, 3, 24, 24), np.uint8), [prompts.parse("a circle")])


def test_incomplete_captions_are_true_but_not_all():
    records = [m for m in prompts.records("train")[:60] if m["tag"] != "counting"]
    rng = np.random.default_rng(7)
    images = draw.draw([draw.with_more(m, rng) for m in records], rng)
    for image, record in zip(images, records, strict=True):
        objects = verify.find_objects(image)
        assert len(objects) > sum(entry["count"] for entry in record["include"])
        for entry in record["include"]:
            own = [o for o in objects if o.shape == entry["class"]]
            assert any("color" not in entry or o.color == entry["color"] for o in own)


def test_layouts_keep_their_distance():
    for count in (1, 2, 3, 4):
        layout = scenes.random_layouts(100, count, np.random.default_rng(count))
        reach = scenes.HALF_EXTENT * layout.scales
        assert (layout.centers >= reach[..., None]).all()
        assert (layout.centers <= scenes.IMAGE_SIZE - reach[..., None]).all()
        for i in range(count):
            for j in range(i):
                apart = np.abs(layout.centers[:, i] - layout.centers[:, j]).max(-1)
                assert (apart >= reach[:, i] + reach[:, j] + scenes.GAP).all()
