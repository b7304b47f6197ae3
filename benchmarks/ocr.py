"""How well the reward ocr reads clean renders of the shipped text prompts.

    python benchmarks/ocr.py [N]        writes benchmarks/results/ocr.json

N (default 300) prompts, test part first, are rendered by Pillow in six fonts, four sizes and four
pairs of colours, read by one engine of one thread, and scored against their own prompt and against
another's.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import defaultdict
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "flowgrpo" / "rewards"))

import records  # noqa: E402
from rapidfuzz.distance import Levenshtein  # noqa: E402
from renders import FONTS, SIZES, renders  # noqa: E402

from flowgrpo.prompts import sets  # noqa: E402
from flowgrpo.prompts.load import load_prompts  # noqa: E402
from flowgrpo.rewards import ocr  # noqa: E402
from flowgrpo.rewards.images import to_pil  # noqa: E402

LIBRARIES = ("rapidocr", "onnxruntime", "rapidfuzz", "pillow", "matplotlib")


def main(count: int) -> None:
    """Score, print the means and write the record."""
    folder = str(sets.folder("ocr"))
    texts = [*load_prompts(folder, "test").texts, *load_prompts(folder, "train").texts][:count]
    wanted = [ocr.quoted_text(text) for text in texts]
    read = ocr.ENGINES["rapidocr"]()
    images = [to_pil(image) for image in renders(wanted)]
    started = time.process_time()
    found = ["".join(read(image)) for image in images]
    seconds = time.process_time() - started
    # A third of the set away: no text meets itself.
    other = wanted[count // 3 :] + wanted[: count // 3]
    own, crossed = (
        [ocr.similarity(f, w, Levenshtein.distance) for f, w in zip(found, against, strict=True)]
        for against in (wanted, other)
    )

    rows = [
        row("all", "score", statistics.fmean(own), "1"),
        row("all", "share_of_exact", statistics.fmean(s == 1 for s in own), "1"),
        row("shuffled", "score", statistics.fmean(crossed), "1"),
        row("all", "renders", len(texts), "images"),
        row("all", "cpu_time", seconds / len(texts), "s/image"),
    ]
    for name, choices, step in (("font", FONTS, 1), ("size", SIZES, len(FONTS))):
        groups = defaultdict(list)
        for i, s in enumerate(own):
            groups[choices[i // step % len(choices)]].append(s)
        for value, scores in groups.items():
            case = f"{name} {value or 'Pillow'}"
            rows.append(row(case, "score", statistics.fmean(scores), "1"))
    versions = {**records.versions(), **{name: metadata.version(name) for name in LIBRARIES}}
    records.write(
        records.record(rows, "cpu", versions=versions), ROOT / "benchmarks" / "results" / "ocr.json"
    )
    for r in rows:
        print(f"{r['case']:28} {r['metric']:16} {r['value']:.4f} {r['unit']}")
    for want, text, s in zip(wanted, found, own, strict=True):
        if s < 1:
            print(f"{s:.2f} wanted {want!r}, read {text!r}")


def row(case: str, metric: str, value: float, unit: str) -> dict:
    """One figure of the record."""
    return records.row("ocr", case, "ours", metric, value, unit)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 300)
