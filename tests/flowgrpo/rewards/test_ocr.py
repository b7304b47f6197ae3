"""The OCR reward: its rule, and RapidOCR's own models on real renders."""

import statistics

import numpy as np
import pytest
import torch

from experiments.ocr_renders import renders
from flowgrpo.prompts import sets
from flowgrpo.prompts.load import load_prompts
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
        # A straight quote after a digit is a length in inches.
        ('6" ruler with the text "HELLO"', "HELLO"),
        ('A 5½" by 8" card that says "HI", 2" thick', "HI"),
        ('a man of 5\' 10" with a sign “STOP” of 8"', "STOP"),
        # It may end the text, and be all there is.
        ('A sign that says "ROUTE 66" and "EXIT 9"', "ROUTE 66"),
        ('sign no. 4"HELLO"', "HELLO"),
        # Quotes around nothing are none.
        ('the "" sign says "OPEN"', "OPEN"),
        ('a "  " sign and “BAR”', "BAR"),
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
        # Typographic forms, kinds of space, and composed or decomposed letters.
        ("I'm here", "I’m here", 1.0),
        ("‘I’m’", "'I'm'", 1.0),
        ("caf\u0065\u0301", "café", 1.0),
        ("CAFÉ", "cafe\u0301", 1.0),
        ("10 000\u00a0km", "10\u202f000 km", 1.0),
        ("HELLO\nWORLD\r\n", "hello\tworld", 1.0),
        ("co\u00adope\u200bration", "cooperation", 1.0),
        ("A-B-C-D", "a‐b–c—d", 1.0),
        ("wait...", "Wait…", 1.0),
        ("Hello，World！", "Hello, World!", 1.0),
        ("İ", "i\u0307", 1.0),
        ("office ﬁre", "oﬃce fire", 1.0),
        ("l`art", "l´art", 1.0),
        ("a―b", "a-b", 1.0),
        ("I ❤\ufe0f NY", "I ❤ NY", 1.0),
        ("A\x00B\x7f", "AB", 1.0),
        ("\u202eOPEN\u202c", "OPEN", 1.0),
        # An accent that is not there is an error of one letter.
        ("cafe", "café", 0.75),
        ("l'm", "I’m", 2 / 3),
    ],
)
def test_the_rule_is_flow_grpos(read, wanted, score):
    assert similarity(read, wanted, distance) == pytest.approx(score)


def test_unknown_engine():
    image = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    with pytest.raises(RewardError, match="engine of reward 'ocr' is 'tesseract'"):
        load("ocr").configured(engine="tesseract")(image, ['"a"'], [{}])


# Of 24 renders: every font, size and paper.
CHOSEN = (0, 5, 7, 10, 14, 15, 18, 21)


@pytest.mark.slow
def test_clean_renders_are_read_and_others_are_not(monkeypatch):
    """The bounds of the project; `python benchmarks ocr` measures them on some hundred renders."""
    pytest.importorskip("rapidocr")
    lines = list(load_prompts(str(sets.folder("ocr")), "heldout").texts[:24])
    texts = [quoted_text(line) for line in lines]
    images, read = renders(texts)[list(CHOSEN)], {}

    def engine(own=ENGINES["rapidocr"]):
        reader = own()

        def lines_of(image):
            found = reader(image)
            read[image.tobytes()] = "".join(found)
            return found

        return lines_of

    monkeypatch.setitem(ENGINES, "rapidocr", engine)
    # By threads: the renders, one of them under another's prompt, and a blank sheet.
    blank = torch.full_like(images[0], 255)
    asked = [lines[i] for i in CHOSEN]
    rows, wanted = [*images, images[0] // 2, blank], [*asked, asked[1], asked[0]]
    found = load("ocr").configured(workers=2)(torch.stack(rows), wanted, [{}] * len(rows))
    own, wrong, nothing = found[: len(asked)], *found[len(asked) :]
    assert statistics.fmean(own) >= 0.95
    assert own[:3] == [1.0, 1.0, 1.0] and wrong < 0.5 and nothing == 0.0
    got = [read[to_pil(image).tobytes()] for image in images]
    own = [similarity(a, quoted_text(line), distance) for a, line in zip(got, asked, strict=True)]
    assert own == found[: len(asked)] and len(set(got)) == len(asked)
    others = [
        similarity(a, text, distance)
        for a, i in zip(got, CHOSEN, strict=True)
        for j, text in enumerate(texts)
        if j != i
    ]
    assert statistics.fmean(others) <= 0.2


@pytest.mark.slow
def test_an_image_that_is_one_line_is_read_without_detection():
    """Also where detection finds nothing; strict is right or wrong, and options are checked."""
    pytest.importorskip("rapidocr")
    from flowgrpo.nano.text.scenes import render as line

    zero = np.zeros((3, 2))
    images = torch.from_numpy(line(["K7P", "X4", "QQR"], np.zeros(3, int), np.arange(3), zero))
    prompts = ['"K7P"', '"X4"', '"QR"']
    whole = load("ocr", {"detect": "false"})(images, prompts, [{}] * 3)
    strict = load("ocr_strict", {"detect": "false"})(images, prompts, [{}] * 3)
    assert list(whole) == [1.0, 1.0, 1.0] and list(strict) == [1.0, 1.0, 0.0]
    with pytest.raises(RewardError, match="only rapidocr reads an image as one line"):
        load("ocr", {"detect": "false", "engine": "paddleocr"})(images, prompts, [{}] * 3)
    with pytest.raises(RewardError, match="no text in double quotes"):
        load("ocr_strict")(images, ["a dog"] * 3, [{}] * 3)
