"""Pictures: every pixel of an image is in the grid, and the curve shows what was measured."""

from __future__ import annotations

import math
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageChops, ImageDraw, ImageFont

from flowgrpo.evaluation import pictures


def colour(name: str) -> tuple[int, int, int]:
    return tuple(int(name[i : i + 2], 16) for i in (1, 3, 5))


def images(count: int, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def find(picture: np.ndarray, part: np.ndarray) -> list[tuple[int, int]]:
    """(top, left) of every place where `part` is in `picture`."""
    height, width = part.shape[:2]
    corners = np.argwhere((picture[: -height + 1, : -width + 1] == part[0, 0]).all(-1))
    return [(y, x) for y, x in corners if (picture[y : y + height, x : x + width] == part).all()]


def test_every_image_is_enlarged_exactly_and_stands_under_its_other_row():
    rows = {"base": images(7), "after": images(8)[:7]}
    grid = np.asarray(pictures.grid(rows, [f"prompt {i}" for i in range(7)], columns=4))
    places = {}
    for label, row in rows.items():
        for i, image in enumerate(row):
            # 24 pixels become 120; the outermost pixel ring of a tile is its frame.
            tile = image.permute(1, 2, 0).numpy().repeat(5, 0).repeat(5, 1)[1:-1, 1:-1]
            [place] = find(grid, tile)
            places[label, i] = place
    for i in range(7):
        assert places["base", i][1] == places["after", i][1]
        assert 120 < places["after", i][0] - places["base", i][0] < 140
    assert places["base", 0][0] == places["base", 3][0] < places["base", 4][0]
    assert places["base", 4][1] == places["base", 0][1]


def test_frames_of_a_video_stand_side_by_side():
    videos = images(6).view(2, 3, 3, 24, 24)
    grid = np.asarray(
        pictures.grid({"base": videos, "after": videos.flip(1)}, ["a", "b"], columns=2)
    )
    for number, frames in enumerate(videos):
        places = []
        for frame in frames:
            tile = frame.permute(1, 2, 0).numpy().repeat(5, 0).repeat(5, 1)[1:-1, 1:-1]
            places.append(find(grid, tile))
        base, after = ([place[row] for place in places] for row in (0, 1))
        # 120 pixels and a gap of two, in the order of time; below it the other way round.
        assert [left - base[0][1] for _, left in base] == [0, 122, 244]
        assert len({top for top, _ in base}) == len({top for top, _ in after}) == 1
        assert after[0][1] - after[2][1] == 244 and after[0][0] > base[0][0]
        assert number == 0 or base[0][1] > 366
    with pytest.raises(ValueError, match=r"or \[1, f, 3, H, W\] is expected"):
        pictures.grid({"base": videos[None]}, ["a"])


def test_a_video_is_written_whole(tmp_path):
    """All frames, in time, again and again; and near to what they were."""
    y, x = torch.meshgrid(torch.arange(24), torch.arange(40), indexing="ij")
    ramp = torch.stack([4 * x, 6 * y, 3 * (x + y)])
    video = torch.stack([(ramp + 12 * t) for t in range(5)]).clamp(0, 255).to(torch.uint8)
    path = pictures.save_video(video, tmp_path / "deep" / "a.webp", 24)
    with Image.open(path) as picture:
        assert (picture.format, picture.n_frames, picture.info["loop"]) == ("WEBP", 5, 0)
        durations = []
        for number, frame in enumerate(video):
            picture.seek(number)
            picture.load()
            durations.append(picture.info["duration"])
            shown = torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
            assert (shown.float() - frame.float()).abs().mean() < 6
    assert durations == [42, 41, 42, 42, 41] and sum(durations) == round(5000 / 24)
    assert [file.name for file in path.parent.iterdir()] == ["a.webp"]


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)])
def test_images_that_are_not_square_keep_their_sides(shape):
    """Twice as large, 96 pixels on the longer side; columns hold a word under a narrow one."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, 256, (3, 3, *shape), dtype=torch.uint8, generator=generator)
    grid = np.asarray(pictures.grid({"base": row, "after": row}, ["prompt"] * 3))
    lefts = []
    for image in row:
        tile = image.permute(1, 2, 0).numpy().repeat(2, 0).repeat(2, 1)[1:-1, 1:-1]
        (top, left), (below, same) = find(grid, tile)
        assert same == left and below - top >= 2 * shape[0]
        lefts.append(left)
    assert lefts[1] - lefts[0] == lefts[2] - lefts[1] == 96 + pictures.GAP
    assert lefts[2] + 2 * shape[1] < grid.shape[1]


@pytest.mark.parametrize(("shape", "size"), [((512, 2048), (336, 84)), ((2048, 512), (84, 336))])
def test_a_large_image_is_shrunk_by_its_longer_side(shape, size):
    assert pictures._tile(torch.zeros(3, *shape, dtype=torch.uint8)).size == size
    assert pictures._tile(torch.zeros(3, 2000, 2, dtype=torch.uint8)).size == (1, 336)


def test_marks_are_green_for_one_and_red_for_less():
    row = torch.full((3, 3, 24, 24), 255, dtype=torch.uint8)
    grid = np.asarray(pictures.grid({"a": row}, ["x"] * 3, {"a": [1.0, 0.99, 0.0]}))
    green = (grid == colour(pictures.RIGHT)).all(-1)
    red = (grid == colour(pictures.WRONG)).all(-1)
    assert green.sum() == 120 * 3 and red.sum() == 2 * 120 * 3
    assert np.argwhere(green)[:, 1].max() < np.argwhere(red)[:, 1].min()


def written(text: str) -> np.ndarray:
    """The pixels of a text as it stands under an image."""
    canvas = Image.new("RGB", (100, 40), pictures.PAPER)
    font = ImageFont.load_default(pictures.TEXT)
    ImageDraw.Draw(canvas).text((50, 10), text, pictures.FAINT, font, anchor="ma")
    left, top, right, bottom = ImageChops.difference(
        canvas, Image.new("RGB", canvas.size, pictures.PAPER)
    ).getbbox()
    return np.asarray(canvas)[top:bottom, left:right]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scores", "texts", "bars"),
    [
        ([1.0, 0.0, math.nan], [], (1, 2)),
        ([1.0, 0.8421, math.nan], ["0.8421", "failed"], (1, 2)),
        ([21.534, -24.0, math.nan], ["21.53", "-24", "failed"], (0, 0)),
    ],
)
def test_scores_that_no_bar_can_show_are_written(scores, texts, bars):
    rows = {name: torch.full((3, 3, 24, 24), 255, dtype=torch.uint8) for name in ("a", "b")}
    picture = pictures.grid(rows, [""] * 3, dict.fromkeys(rows, scores))
    grid = np.asarray(picture)
    for colour_, count in zip((pictures.RIGHT, pictures.WRONG), bars, strict=True):
        assert (grid == colour(colour_)).all(-1).sum() == 2 * count * 120 * 3
    places = [find(grid, written(text)) for text in texts]
    # Once a row, from left to right, between the images.
    assert [len(place) for place in places] == [2] * len(texts)
    columns = [[x for _, x in place] for place in places]
    assert columns == sorted(columns) and all(x == y for x, y in columns)
    frames = (grid == colour("#d0d7de")).all(-1)
    for text, place in zip(texts, places, strict=True):
        for y, x in place:
            height, width = written(text).shape[:2]
            assert not frames[y - 1 : y + height + 1, x : x + width].any()
    if not texts:
        plain = pictures.grid(rows, [""] * 3, dict.fromkeys(rows, (1.0, 0.0, 0.0)))
        assert picture.tobytes() == plain.tobytes()


def test_captions_are_wrapped_inside_their_column():
    long = "a very long prompt about three red circles above one small blue square and more of it"
    short = pictures.grid({"a": images(2)}, ["one", "two"])
    tall = pictures.grid({"a": images(2)}, [long * 3, "two"])
    assert tall.size[0] == short.size[0] and tall.size[1] > short.size[1]
    pixels = np.asarray(tall)
    # Ink of the first caption stays left of the second column.
    second = find(pixels, np.asarray(pictures._tile(images(2)[1]))[1:-1, 1:-1])[0][1]
    below = (pixels[140:, :, :] < 120).all(-1)
    assert below[:, : second - 2].any()
    assert not below[40:, second - 2 :].any()


def test_large_images_are_made_smaller():
    picture = pictures.grid({"a": images(1, 1024)}, ["x"])
    assert picture.size[0] < 400


@pytest.mark.parametrize("bad", [images(3), images(2).float(), images(2)[:, 0]])
def test_wrong_images_are_refused(bad):
    with pytest.raises(ValueError, match=r"rows\['a'\] is .* one image a caption"):
        pictures.grid({"a": bad}, ["x", "y"])


def test_save_replaces_and_leaves_no_part(tmp_path):
    for count in (1, 2):
        pictures.save(pictures.grid({"a": images(count)}, ["x"] * count), tmp_path / "s" / "a.png")
    assert [p.name for p in (tmp_path / "s").iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "s" / "a.png").size[0] > 250


def test_a_picture_too_long_for_a_jpeg_is_a_png(tmp_path):
    long = Image.new("RGB", (2, pictures.LONGEST_JPEG + 1))
    assert pictures.save(long, tmp_path / "a.jpg") == tmp_path / "a.png"
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert Image.open(tmp_path / "a.png").size == long.size
    longest = long.crop((0, 0, 2, pictures.LONGEST_JPEG))
    assert Image.open(pictures.save(longest, tmp_path / "b.jpg")).size == longest.size


def evaluations(values, **extra):
    return [
        {"iteration": 50 * i, "accuracy": v, "interval": [v - 0.05, v + 0.05], **extra}
        for i, v in enumerate(values)
    ]


def blue_line(path) -> np.ndarray:
    """Pixels of the main line, as (row, column)."""
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return np.argwhere((np.abs(pixels - colour("#0969da")) < 8).all(-1))


@pytest.mark.slow
def test_curve_rises_with_the_accuracy(tmp_path):
    for name, values in (("up", (0.3, 0.5, 0.9)), ("down", (0.9, 0.5, 0.3))):
        entries = evaluations(values, tasks={"counting": 0.2, "colors": 0.9}, elapsed=60.0)
        line = blue_line(pictures.curve(tmp_path / f"{name}.png", entries, title="t"))
        line = line[line[:, 1] < 700]  # without the legend
        left = line[line[:, 1] < 150][:, 0].mean()
        right = line[line[:, 1] > 650][:, 0].mean()
        assert (left > right) == (name == "up")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["down.png", "up.png"]


@pytest.mark.slow
def test_the_last_value_is_inside_the_axes_and_iterations_are_whole(tmp_path, monkeypatch):
    figures = []
    drawn = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: (figures.append(f), drawn(f, *a, **k))
    )
    for values, label in (([0.2, 1.0], "accuracy"), ([1.6, 1.6765], "price"), ([20.0, -24.0], "p")):
        pictures.curve(tmp_path / "a.png", evaluations(values), label=label)
        axes = figures[-1].axes[0]
        [last] = [t for t in axes.texts if t.get_text()]
        assert last.get_window_extent().x1 <= axes.get_window_extent().x1
        ticks = [t.get_text() for t in axes.get_xticklabels()]
        assert len(ticks) > 1 and all(tick.isdigit() for tick in ticks)


@pytest.mark.slow
def test_curve_of_one_point_and_without_tasks(tmp_path):
    guided = {"accuracy": 0.7, "guidance_scale": 3.5}
    path = pictures.curve(tmp_path / "a.png", evaluations([0.4]), guided)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    assert (np.abs(pixels - colour("#bf8700")) < 8).all(-1).sum() > 100
    assert len(blue_line(path)) > 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["$", "a $b_{ $c", "10$ or \\$20$", "^{", "ä 猫", "\\frac"])
def test_names_are_text_and_no_formulas(tmp_path, monkeypatch, name):
    figures = []
    drawn = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda f, *a, **k: (figures.append(f), drawn(f, *a, **k))
    )
    entries = evaluations([0.2, 0.4], tasks={name: 0.3}, elapsed=60.0)
    path = pictures.curve(tmp_path / "a.png", entries, title=name, label=f"users:{name}")
    axes = figures[-1].axes[0]
    assert name.replace("_", " ") in [text.get_text() for text in axes.get_legend().get_texts()]
    assert axes.get_title(loc="left") == name and len(blue_line(path)) > 10


@pytest.mark.slow
def test_curve_of_a_reward_beyond_one(tmp_path):
    entries = evaluations([20.0, 24.0], tasks={"a": None, "b": 21.0})
    path = pictures.curve(tmp_path / "a.png", entries, label="shop:price")
    assert len(blue_line(path)) > 100


@pytest.mark.parametrize("text", ["w" * 100_000, "猫" * 5_000, "a " * 50_000, "http://" + "x" * 90])
def test_words_that_are_too_long_are_broken(text):
    """They would cover the captions beside them."""
    font = ImageFont.load_default(pictures.TEXT)
    lines = pictures._wrap(text, font, 100)
    assert len(lines) <= 4 and all(
        font.getlength(line.removesuffix(" ...")) <= 100 for line in lines
    )
    shown = "".join(lines).removesuffix(" ...").replace(" ", "")
    assert text.replace(" ", "").startswith(shown) and len(shown) >= 12
    assert (lines[-1].endswith(" ...")) == (len(shown) < len(text.replace(" ", "")))


@pytest.mark.slow
def test_a_curve_needs_no_latex(tmp_path):
    with matplotlib.rc_context({"text.usetex": True}):
        path = pictures.curve(tmp_path / "a.png", evaluations([0.2, 0.4]))
    assert len(blue_line(path)) > 10


def test_rows_of_an_evaluation_say_how_many_are_right(monkeypatch):
    """Those that all rows have: an evaluation of an earlier version has fewer."""
    grids = []
    monkeypatch.setattr(pictures, "grid", lambda *args, **kw: grids.append((args, kw)))
    evaluations = {
        "base": SimpleNamespace(shown=images(12), marks=[0.0, 1.0] * 6),
        "iteration 3": SimpleNamespace(shown=images(24), marks=[1.0] * 11 + [0.0] * 13),
    }
    texts = tuple(f"prompt {i}" for i in range(30))
    evaluation_set = SimpleNamespace(prompts=SimpleNamespace(texts=texts))
    pictures.evaluation_grid(evaluations, evaluation_set)
    [((rows, captions, marks), options)] = grids
    assert list(rows) == list(marks) == ["base\n6 of 12", "iteration 3\n11 of 12"]
    assert captions == texts[:12] and options == {"columns": 6}
    assert torch.equal(rows["iteration 3\n11 of 12"], images(24)[:12])
    evaluations["base"] = SimpleNamespace(shown=images(24), marks=[math.nan] + [1.0] * 23)
    pictures.evaluation_grid(evaluations, evaluation_set)
    (rows, captions, _), options = grids[1]
    assert list(rows) == ["base", "iteration 3\n11 of 24"]
    assert captions == texts[:24] and options == {"columns": 8}


def test_labels_of_several_lines_have_room():
    one = pictures.grid({"a": images(2), "the longest": images(2)}, ["x", "y"])
    two = pictures.grid({"a\nb": images(2), "the longest\n1 of 2": images(2)}, ["x", "y"])
    assert one.size == two.size


def test_captions_of_two_lines_write_no_score_in_the_next_block(monkeypatch):
    written = []
    monkeypatch.setattr(pictures, "_write", lambda *arguments: written.append(arguments))
    captions = ["a caption of more words than one line has room for"] * 4
    pictures.grid({"a": images(4)}, captions, {"a": [1.0, 0.0, 1.0, 1.0]}, columns=2)
    assert not written
