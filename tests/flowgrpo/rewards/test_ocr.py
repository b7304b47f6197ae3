"""The OCR reward: its rule, and RapidOCR's own models on real renders."""

import statistics

import pytest
import torch
from renders import renders

from flowgrpo import data, prompts
from flowgrpo.rewards import RewardError, load
from flowgrpo.rewards.images import to_pil
from flowgrpo.rewards.ocr import ENGINES, quoted_text, similarity

distance = pytest.importorskip("rapidfuzz.distance").Levenshtein.distance


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('A sign that says "Hello World" at night', "Hello World"),
        ('Two "first" texts "second"', "first"),
        ("A sign with “Open Late” on it", "Open Late"),
        ('Straight "before" curly “quotes”', "before"),
    ],
)
def test_quoted_text(prompt, text):
    assert quoted_text(prompt) == text


@pytest.mark.parametrize("prompt", ["a dog", 'one " quote', 'empty ""', 'blank "  "', "'single'"])
def test_a_prompt_without_quoted_text_is_an_error(prompt):
    with pytest.raises(RewardError, match="no text in double quotes"):
        quoted_text(prompt)
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    pytest.importorskip("rapidocr")
    with pytest.raises(RewardError, match="no text in double quotes"):
        load("ocr")(image, [prompt], [{}])


@pytest.mark.parametrize(
    ("read", "wanted", "score"),
    [
        ("Hello World", "hello world", 1.0),
        ("HELLOWORLD", "Hello World", 1.0),
        # Contained text costs nothing, whatever stands around it.
        ("xxhelloworldyy", "Hello World", 1.0),
        ("helloworlt", "Hello World", 0.9),
        ("", "Hello", 0.0),
        # The distance is at most the length.
        ("something else altogether", "Hello", 0.0),
        ("hel", "Hello", 0.6),
    ],
)
def test_the_rule_is_flow_grpos(read, wanted, score):
    assert similarity(read, wanted, distance) == pytest.approx(score)


def test_unknown_engine():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RewardError, match="engine of reward 'ocr' is 'tesseract'"):
        load("ocr").configured(engine="tesseract")(image, ['"a"'], [{}])


def test_clean_renders_are_read_and_others_are_not():
    """The bounds of the project; benchmarks/ocr.py measures them on some hundred renders."""
    pytest.importorskip("rapidocr")
    lines = list(prompts.load(str(data.folder("ocr")), "heldout").texts[:18])
    texts = [quoted_text(line) for line in lines]
    images = renders(texts)
    reader = ENGINES["rapidocr"]()
    read = ["".join(reader(to_pil(image))) for image in images[:14]]
    own = [similarity(found, text, distance) for found, text in zip(read, texts, strict=False)]
    assert statistics.fmean(own) >= 0.95
    others = [similarity(a, b, distance) for a in read for b in texts if texts[read.index(a)] != b]
    assert statistics.fmean(others) <= 0.2

    # The reward itself, by threads: two right, one wrong, and a blank sheet.
    images = torch.stack([*images[14:17], torch.full_like(images[0], 255)])
    asked = [lines[14], lines[15], lines[17], lines[14]]
    found = load("ocr").configured(workers=2)(images, asked, [{}] * 4)
    assert found[:2] == [1.0, 1.0]
    assert found[2] < 0.5
    assert found[3] == 0.0
