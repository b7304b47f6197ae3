"""The report shows what became of the images, and holds all that it shows."""

from __future__ import annotations

import base64
import io
import re

import pytest
from PIL import Image

from flowgrpo import files
from flowgrpo.curation import report, store
from flowgrpo.curation.curate import curate
from flowgrpo.curation.options import CurateOptions
from support.grey_pictures import captioned

# matplotlib is loaded.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def curated(tmp_path_factory, rewards):
    """Forty pictures with the greys 0, 5, ... 195, those below 50 dropped, then a fifth."""
    folder = tmp_path_factory.mktemp("report")
    greys = {f"{i:02d}.png": (5 * i, f"<prompt> & {i // 2}") for i in range(40)}
    name = rewards["brightness"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "sync", lambda descriptor: None)
        patch.setattr(store, "SYNCHRONOUS", "OFF")
        options = CurateOptions(
            (str(captioned(folder / "photos", greys)),),
            str(folder / "out"),
            resolution=8,
            rewards={name: 1.0},
            min={name: 50.0},
            top={name: 0.8},
            shares=(1.0, 0.0, 0.0),
        )
        return name, folder / "out", curate(options)


def sections(page: str) -> dict[str, list[tuple[float, str, int]]]:
    """Title -> (score, reason, grey of the thumbnail) of each picture under it."""
    rows = {}
    for block in page.split("<h3>")[1:]:
        title, _, figures = block.partition("</h3>")
        pictures = re.findall(
            r"base64,([^\"]+)\".*?<b>([\d.]+)</b>(?: <i>(.*?)</i>)?<br>", figures, re.DOTALL
        )
        rows[title] = [
            (float(score), reason, Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4)))
            for data, score, reason in pictures
        ]
    return rows


def test_best_worst_and_nearest(curated):
    """Thumbnails are of the images that the scores belong to, those of dropped images too."""
    name, out, _ = curated
    rows = sections((out / "report.html").read_text())
    scores = {title: [score for score, _, _ in row] for title, row in rows.items()}
    assert scores == {
        "best": [195, 190, 185, 180, 175, 170, 165, 160],
        "worst": [0, 5, 10, 15, 20, 25, 30, 35],
        "above min 50": [50, 55, 60, 65, 70, 75, 80, 85],
        "below min 50": [45, 40, 35, 30, 25, 20, 15, 10],
        "last inside top 0.8": [80, 85, 90, 95, 100, 105, 110, 115],
        "first outside top 0.8": [75, 70, 65, 60, 55, 50],
    }
    for row in rows.values():
        for score, reason, pixel in row:
            assert all(abs(channel - score) <= 2 for channel in pixel)
            expected = f"min {name}" if score < 50 else f"top {name}" if score < 80 else ""
            assert reason == expected


def test_the_page_is_whole_and_escaped(curated):
    _, out, about = curated
    page = (out / "report.html").read_text()
    assert "Curated set: 24 of 40 images" in page and about["counts"]["images"] == 24
    assert "&lt;prompt&gt; &amp; 19" in page and "<prompt>" not in page
    assert re.findall(r'(?:src|href)="(?!data:image/(?:png|jpeg);base64,)', page) == []
    histograms = base64.b64encode((out / "histograms.png").read_bytes()).decode()
    assert histograms in page


def test_histograms(curated):
    picture = Image.open(curated[1] / "histograms.png").convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 20)}
    # Images in the set, dropped ones, and the lines of the thresholds.
    assert {(9, 105, 218), (208, 215, 222)} <= colors
    assert any(r > 180 and g < 90 and b < 90 for r, g, b in colors)


def test_counts(curated):
    name, _, about = curated
    assert report.count_lines(about) == [
        ("images read", 40),
        (f"dropped: {name} below 50", 10),
        (f"dropped: {name} outside the best 0.8", 6),
        ("images in the set", 24),
        ("  train", 24),
        ("  validation", 0),
        ("  test", 0),
    ]


def test_without_rewards(tmp_path):
    source = captioned(tmp_path / "photos", {"a.png": (1, "one"), "b.png": (2, "two")})
    about = curate(CurateOptions((str(source),), str(tmp_path / "out"), resolution=4))
    assert about["counts"]["images"] == 2 and about["thresholds"] == {}
    assert "<h2>Scores" not in (tmp_path / "out" / "report.html").read_text()
    assert Image.open(tmp_path / "out" / "histograms.png").size[0] > 100
