"""The verifier against scenes whose content is known, and against ways to cheat it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowgrpo.nano import draw, prompts, scenes, verify


@pytest.fixture(scope="module")
def real():
    """Clean pictures of 240 prompts of all splits, and of a few outside the six tasks."""
    extra = (
        "two red circles and a blue square",
        "a star above a blue square",
        "two stars and two crosses",
    )
    records = [m for name in prompts.SPLITS for m in prompts.balanced(name, 80)]
    records += [prompts.parse(text) for text in extra for _ in range(20)]
    return draw.draw(records, np.random.default_rng(0)), records


@pytest.mark.parametrize("noise", [0.0, 0.02, 0.05, 0.1])
def test_real_pictures_fulfil_their_prompts(real, noise):
    images, records = real
    noisy = images + np.random.default_rng(1).normal(0, 255 * noise, images.shape)
    scores = verify.score(noisy.round().clip(0, 255).astype(np.uint8), records)
    assert scores["strict"].mean() >= 0.99
    assert scores["partial"].mean() >= 0.99


@pytest.mark.slow
def test_pictures_of_other_prompts_do_not(real):
    images, records = real
    order = np.random.default_rng(2).permutation(len(records))
    scores = verify.score(images, [records[i] for i in order])
    assert scores["strict"].mean() <= 0.06
    assert scores["partial"].mean() <= 0.35


def paint(*objects):
    """A picture of (shape, colour, x, y) objects."""
    names, colors = zip(*[(o[0], o[1]) for o in objects], strict=True)
    shapes = np.array([[scenes.SHAPES.index(n) for n in names]])
    paints = np.array([[list(scenes.COLORS).index(c) for c in colors]])
    centers = np.array([[(o[2], o[3]) for o in objects]], dtype=float)
    return scenes.render(shapes, paints, centers)


def one(image, text):
    scores = verify.score(image, [prompts.parse(text)])
    return float(scores["strict"][0]), float(scores["partial"][0])


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("color", scenes.COLORS)
def test_finds_place_shape_and_color_at_any_subpixel_position(shape, color):
    rng = np.random.default_rng(3)
    below = scenes.centroid(scenes.SHAPES.index(shape))[1]
    for x, y in rng.uniform(14, 50, (10, 2)):
        found = verify.find_objects(paint((shape, color, x, y)))
        assert found.names(0) == [(shape, color)]
        assert abs(found.center[0, 0] - x) < 0.5
        assert abs(found.center[0, 1] - y - below) < 0.5


def test_partial_credit_is_the_share_of_requirements_met():
    two = paint(("circle", "red", 16, 16), ("circle", "red", 48, 48))
    assert one(two, "two circles") == (1, 1)
    assert one(two, "three circles") == (0, pytest.approx(2 / 3))
    assert one(two, "a circle") == (0, 0)
    pair = paint(("circle", "red", 16, 32), ("square", "blue", 48, 32))
    assert one(pair, "a red circle and a blue square") == (1, 1)
    assert one(pair, "a red circle and a green square") == (0, pytest.approx(3 / 4))
    assert one(pair, "a circle left of a square") == (1, 1)
    assert one(pair, "a square left of a circle") == (0, pytest.approx(2 / 3))
    assert one(pair, "a circle above a square") == (0, pytest.approx(2 / 3))
    assert one(pair, "a circle") == (0, pytest.approx(1 / 2))


def test_swapped_colors_are_no_attribute_binding():
    swapped = paint(("circle", "blue", 16, 32), ("square", "red", 48, 32))
    assert one(swapped, "a red circle and a blue square") == (0, pytest.approx(1 / 2))


def test_a_diagonal_neighbour_is_beside_and_above():
    pair = paint(("circle", "red", 16, 16), ("square", "blue", 48, 48))
    assert one(pair, "a circle left of a square")[0] == 1
    assert one(pair, "a circle above a square")[0] == 1
    assert one(pair, "a circle below a square")[0] == 0


@pytest.mark.parametrize("value", [0, 128, 246, 255])
def test_a_uniform_picture_scores_nothing(value):
    flat = np.full((1, 3, 64, 64), value, dtype=np.uint8)
    assert one(flat, "a circle") == (0, 0)


def test_noise_and_blobs_are_junk():
    rng = np.random.default_rng(4)
    noise = rng.integers(0, 256, (8, 3, 64, 64)).astype(np.uint8)
    assert verify.score(noise, [prompts.parse("a circle")] * 8)["strict"].max() == 0
    blob = paint(("circle", "red", 24, 32), ("square", "red", 40, 32))
    assert one(blob, "a circle")[0] == 0
    speck = paint(("circle", "red", 32, 32))
    speck[0, :, 2:6, 2:6] = 0
    assert one(speck, "a circle") == (0, pytest.approx(1 / 2))


def test_quality_sees_dirt_drift_and_sameness(real):
    images, records = real
    images, records = images[:60], records[:60]
    clean = verify.quality(images, records)
    assert clean["palette"] < 0.005 and clean["background"] < 1e-6
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
    with pytest.raises(ValueError, match=r"images: expected uint8 \[B, 3, 64, 64\], got float32"):
        verify.score(np.zeros((1, 3, 64, 64), np.float32), [{}])
    with pytest.raises(ValueError, match="metadata: expected 2 records"):
        verify.score(np.zeros((2, 3, 64, 64), np.uint8), [prompts.parse("a circle")])


def test_batches_score_as_single_images_do(real):
    images, records = real
    whole = verify.score(images[:24], records[:24])
    single = [verify.score(images[i : i + 1], records[i : i + 1]) for i in range(24)]
    for name in ("strict", "partial"):
        assert np.array_equal(whole[name], np.concatenate([one[name] for one in single]))


@pytest.mark.parametrize("tag", prompts.TAGS)
def test_a_mistake_is_one_but_for_positions_by_chance(tag):
    records = [m for m in prompts.records("train") if m["tag"] == tag]
    rng = np.random.default_rng(7)
    records = [records[i] for i in rng.integers(len(records), size=60)]
    wrong = [draw.mistake(m, rng) for m in records]
    assert [m["prompt"] for m in wrong] == [m["prompt"] for m in records]
    scores = verify.score(draw.draw(wrong, rng), records)
    # A colour that the prompt leaves open cannot be wrong, and position is right in one of three.
    bound = {"position": 0.45}.get(tag, 0.0)
    assert scores["strict"].mean() <= bound
    # Most of a picture with several objects is right.
    assert tag == "single_object" or scores["partial"].mean() > 0.3


def test_mistakes_leave_the_record_as_it_was():
    record = prompts.parse("a red circle and a blue square")
    before = str(record)
    for seed in range(10):
        draw.mistake(record, np.random.default_rng(seed))
    assert str(record) == before


def test_objects_stay_in_their_cells():
    rng = np.random.default_rng(8)
    cells = rng.integers(len(scenes.SHAPES) * len(scenes.COLORS), size=(50, 4))
    images = scenes.paint(cells, rng).astype(int)
    background = np.array(scenes.BACKGROUND)[:, None]
    for edge in (images[:, :, 0], images[:, :, -1], images[:, :, 31], images[:, :, :, 32]):
        assert (edge == background).all()
    found = verify.find_objects(images.astype(np.uint8))
    assert len(found.image) == 200 and (found.shape >= 0).all()


def test_the_distance_to_a_polygon_is_that_of_its_corners_and_sides():
    square = scenes.coverage(1, np.array([[16.0, 16.0]]), scale=1.0)
    assert square[0, 16, 16] == 1 and square[0, 0, 0] == 0
    # The area of a shape is that of its polygon, to a few per cent.
    for k, name in enumerate(scenes.SHAPES):
        painted = scenes.coverage(k, np.array([[16.3, 15.9]])).sum()
        corners = scenes.CORNERS.get(name)
        if corners is None:
            area = np.pi * 11**2
        else:
            x, y = corners.T
            area = abs((x * np.roll(y, -1) - y * np.roll(x, -1)).sum()) / 2
        assert painted == pytest.approx(area, rel=0.03)
