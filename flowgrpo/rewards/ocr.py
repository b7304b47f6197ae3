"""Text rendering as in Flow-GRPO (Liu et al., https://arxiv.org/abs/2505.05470, section 4):

    score = max(0, 1 - d / n)         d: edit distance of the text read and the quoted text, n: its
                                      length; d = 0 if the quoted text is contained in what is read

Both without spaces and in lower case, as flow_grpo/ocr.py has it; lines are joined in reading
order. The quoted text is what stands between the first pair of straight quotes of the prompt, or
else of curly ones. Deliberate departures from flow_grpo/ocr.py:

1. What looks the same to a reader is the same (`plain`): typographic quotes, dashes and dots,
   full-width forms, all kinds of spaces and line breaks, composed and decomposed letters.
2. A straight quote after a digit opens no text: 6" is a length.

`strict` is the share of images that are right: 1 where the text read is the quoted one, in the form
in which the two are compared, and nothing else.

The engine is RapidOCR (https://github.com/RapidAI/RapidOCR: the PP-OCR models in ONNX, which its
wheel contains), or PaddleOCR if asked for. flow_grpo reads one image after the other; here
`workers` threads do, each with an engine of one thread. With `detect=False` the image as a whole is
one line of text, which RapidOCR recognises without looking for it first.
"""

from __future__ import annotations

import os
import re
import threading
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from flowgrpo.rewards.images import to_pil
from flowgrpo.rewards.interface import RewardError
from flowgrpo.rewards.options import check_numbers, configurable, library

Reader = Callable[[Any], list[str]]
"""A function Pillow image -> lines of text."""


def check(prompt: str, metadata: Mapping[str, Any]) -> None:
    """Raise RewardError for a prompt without quoted text."""
    quoted_text(prompt)


@configurable("ocr", check=check)
def score(*, engine: str = "rapidocr", workers: int = 0, detect: bool = True):
    """Build the text-rendering reward.

    engine: rapidocr or paddleocr. workers: threads; 0: one for each CPU core, at most 8. detect:
    look for lines of text; false: the image is one line (rapidocr alone).
    """
    distance = library("rapidfuzz.distance", "ocr").Levenshtein.distance
    read_all = _reading("ocr", engine, workers, detect)

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        targets = [quoted_text(prompt) for prompt in prompts]
        pairs = zip(read_all(images), targets, strict=True)
        return [similarity(text, target, distance) for text, target in pairs]

    return rate


@configurable("ocr_strict", check=check)
def strict(*, engine: str = "rapidocr", workers: int = 0, detect: bool = True):
    """Build the strict form of the text-rendering reward; options as of `score`."""
    read_all = _reading("ocr_strict", engine, workers, detect)

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        targets = [quoted_text(prompt) for prompt in prompts]
        pairs = zip(read_all(images), targets, strict=True)
        return [float(plain(text) == plain(target)) for text, target in pairs]

    return rate


def _reading(
    reward: str, engine: str, workers: int, detect: bool
) -> Callable[[Tensor], Iterable[str]]:
    """Build a function images uint8 [B, 3, H, W] -> the B texts in them.

    Raises:
        RewardError: an option is wrong or the engine is not installed.
    """
    if engine not in ENGINES:
        raise RewardError(
            f"the engine of reward {reward!r} is {engine!r}, but one of {', '.join(ENGINES)} is "
            "expected; name one of these."
        )
    if not detect and engine != "rapidocr":
        raise RewardError(
            f"the option detect of reward {reward!r} is False with engine {engine!r}, but only "
            "rapidocr reads an image as one line; leave one of the two out."
        )
    check_numbers(reward, {}, {"workers": workers})
    library(engine, reward)
    # An engine is not safe to share between threads.
    local = threading.local()
    workers = workers or min(8, _cores())
    pool = ThreadPoolExecutor(workers, thread_name_prefix="ocr")
    build = ENGINES[engine] if detect else _rapidocr_line

    def read(image: Tensor) -> str:
        if not hasattr(local, "reader"):
            local.reader = build()
        return "".join(local.reader(to_pil(image)))

    return lambda images: pool.map(read, images.cpu())


def quoted_text(prompt: str) -> str:
    """Find the text in quotes that the image should show.

    Raises:
        RewardError: there is none.
    """
    texts = (text for pattern in QUOTED for text in re.findall(pattern, prompt))
    # Quotes around nothing ask for nothing.
    text = next(filter(plain, texts), None)
    if text is None:
        raise RewardError(
            f"the prompt {prompt!r} has no text in double quotes, but reward 'ocr' compares what "
            'it reads with it; write the text as in: a sign that says "OPEN".'
        )
    return text


def similarity(read: str, target: str, distance: Callable[[str, str], int]) -> float:
    """Score in [0, 1] the text `read` where `target` should stand."""
    read, target = plain(read), plain(target)
    if target in read:
        return 1.0
    return max(0.0, 1.0 - distance(read, target) / len(target))


def _cores() -> int:
    # Only Linux tells which cores this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def plain(text: str) -> str:
    """Bring a text to the form in which it is compared: as a reader sees it, see above."""
    text = unicodedata.normalize("NFC", text.lower().translate(ALIKE))
    # Of the class Cf are zero-width characters, such as soft hyphens and byte order marks; of Cc
    # control characters. Neither has a shape.
    unseen = ("Cc", "Cf")
    return "".join(c for c in text if not c.isspace() and unicodedata.category(c) not in unseen)


def _rapidocr() -> Reader:
    from rapidocr import RapidOCR

    read = RapidOCR(params=_RAPIDOCR)
    return lambda image: list(read(image).txts or ())


def _rapidocr_line() -> Reader:
    from rapidocr import RapidOCR

    line = {
        "Global.use_det": False,
        # As wide as the image: the usual 320 pixels would mostly be padding, and take the time.
        "Rec.rec_img_shape": [3, 48, 48],
    }
    read = RapidOCR(params=_RAPIDOCR | line)
    return lambda image: list(read(image).txts or ())


def _paddleocr() -> Reader:
    import numpy
    from paddleocr import PaddleOCR

    read = PaddleOCR(
        lang="en",
        use_doc_orientation_classify=False,
        use_doc_unwarping=False,
        use_textline_orientation=False,
    )

    def lines(image: Any) -> list[str]:
        # PaddleOCR takes arrays as OpenCV has them: blue, green, red.
        pages = read.predict(numpy.asarray(image)[..., ::-1])
        return [text for page in pages for text in page["rec_texts"]]

    return lines


QUOTED = (r'(?<![\d¼½¾])"([^"]*)"', r"“([^”]*)”", r'"([^"]*)"')
"""Patterns of the quoted text in a prompt, the first that matches counts."""

ALIKE = str.maketrans(
    {
        **dict.fromkeys("\u0060\u00b4\u2018\u2019\u201b\u02bc\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe58\ufe63", "-"),
        "\u2026": "...",
        # Ligatures, which a font makes of the letters by itself.
        **{0xFB00 + n: letters for n, letters in enumerate(("ff", "fi", "fl", "ffi", "ffl"))},
        # Selectors of how the character before is drawn.
        **dict.fromkeys(range(0xFE00, 0xFE10)),
        # Full-width forms, which engines for Chinese read punctuation as.
        **{code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)},
    }
)
"""Typographic characters -> those of a keyboard."""

_RAPIDOCR = {
    "Global.log_level": "error",
    # Text is upright or wrong: flow_grpo's use_angle_cls=False.
    "Global.use_cls": False,
    "EngineConfig.onnxruntime.intra_op_num_threads": 1,
    "EngineConfig.onnxruntime.inter_op_num_threads": 1,
}

ENGINES: dict[str, Callable[[], Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
"""Name of the library -> function that makes a reader."""
