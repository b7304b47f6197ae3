"""Accuracy of the reward `ocr` on clean renders of the shipped text prompts.

    python benchmarks ocr [N]        # writes results/ocr.json

N (default 300) prompts, test part first, are rendered by Pillow in six fonts, four sizes and four
pairs of colours, read by one engine of one thread, and scored against their own prompt and against
another's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from importlib import metadata

from rapidfuzz.distance import Levenshtein

from experiments.ocr_renders import FONTS, SIZES, renders
from flowgrpo.prompts import sets
from flowgrpo.prompts.load import load_prompts
from flowgrpo.rewards import ocr
from flowgrpo.rewards.images import to_pil
from reporting import records

LIBRARIES = ("rapidocr", "onnxruntime", "rapidfuzz", "pillow", "matplotlib")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("count", nargs="?", type=int, default=300, help="prompts, default: 300")
    count = parser.parse_args(argv).count
    folder = str(sets.folder("ocr"))
    texts = [*load_prompts(folder, "test").texts, *load_prompts(folder, "train").texts][:count]
    targets = [ocr.quoted_text(text) for text in texts]
    read = ocr.ENGINES["rapidocr"]()
    images = [to_pil(image) for image in renders(targets)]
    start = time.process_time()
    readings = ["".join(read(image)) for image in images]
    seconds = time.process_time() - start
    # A third of the set away: no text meets itself.
    others = targets[count // 3 :] + targets[: count // 3]
    matched, crossed = (
        [
            ocr.similarity(text, target, Levenshtein.distance)
            for text, target in zip(readings, against, strict=True)
        ]
        for against in (targets, others)
    )

    rows = [
        row("all", "score", statistics.fmean(matched), "1"),
        row("all", "share_of_exact", statistics.fmean(s == 1 for s in matched), "1"),
        row("shuffled", "score", statistics.fmean(crossed), "1"),
        row("all", "renders", len(texts), "images"),
        row("all", "cpu_time", seconds / len(texts), "s/image"),
    ]
    for name, choices, step in (("font", FONTS, 1), ("size", SIZES, len(FONTS))):
        groups = defaultdict(list)
        for i, s in enumerate(matched):
            groups[choices[i // step % len(choices)]].append(s)
        for value, scores in groups.items():
            case = f"{name} {value or 'Pillow'}"
            rows.append(row(case, "score", statistics.fmean(scores), "1"))
    versions = {**records.versions(), **{name: metadata.version(name) for name in LIBRARIES}}
    records.write(records.record(rows, "cpu", versions=versions), records.RESULTS / "ocr.json")
    for r in rows:
        print(f"{r['case']:28} {r['metric']:16} {r['value']:.4f} {r['unit']}")
    for target, text, s in zip(targets, readings, matched, strict=True):
        if s < 1:
            print(f"{s:.2f} {target!r} was read as {text!r}")
    return 0


def row(case: str, metric: str, value: float, unit: str) -> dict:
    """One figure of the record."""
    return records.row("ocr", case, "ours", metric, value, unit)
