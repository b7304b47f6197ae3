"""Tables of README.md, each between two comments: of the models, and of the studies (`flowgrpo
compare`).

A study's figures come from results/nano/STUDY/comparison.json; `python benchmarks tables` writes
them, and with --check compares.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reporting import models, records

README = records.BENCHMARKS.parent / "README.md"
NANO = records.RESULTS / "nano"
ALL_SEEDS = "seeds, lowest to highest"


class Study:
    """The record of one study."""

    def __init__(self, name: str) -> None:
        self.record = records.read(NANO / name / "comparison.json")
        self.arms = list(self.record["arms"])
        self.budgets = {n: b["value"] for n, b in self.record["budgets"].items()}

    def row(self, case: str, arm: str, metric: str) -> dict[str, Any]:
        """The row of a metric over all seeds at a budget, "images" or "seconds"; case "start": of
        the base."""
        return self._rows(case, arm, metric)[0]

    def _rows(self, case: str, arm: str, metric: str) -> list[dict[str, Any]]:
        """The row over all seeds, then those of each seed, where the record has them."""
        rows = (r for r in self.record["rows"] if (r["case"], r["provider"]) == (case, arm))
        return sorted((r for r in rows if r["metric"] == metric), key=lambda r: -len(r["runs"]))

    def value(self, case: str, arm: str, metric: str) -> float:
        """The value of a row."""
        return self.row(case, arm, metric)["value"]

    def accuracy(self, case: str, arm: str) -> str:
        """Accuracy in percent with its interval."""
        row = self.row(case, arm, "accuracy")
        low, high = row["interval"]
        return f"{100 * row['value']:.1f} ({100 * low:.1f} to {100 * high:.1f})"

    def seeds(self, case: str, arm: str) -> str:
        """Lowest and highest accuracy of a seed, in percent."""
        seeds = self._rows(case, arm, "accuracy")[1:]
        accuracies = [100 * row["value"] for row in seeds]
        return f"{min(accuracies):.1f} to {max(accuracies):.1f}"

    def quality(self, case: str, arm: str) -> str:
        """Say if the quality figures stayed within their tolerances, in how many seeds."""
        row = self.row(case, arm, "quality_held")
        outside = ", ".join(
            f"{n.removeprefix('quality: ')} in {c}" for n, c in row["outside"].items()
        )
        return "yes" if row["value"] == 1 else f"no: {outside}"


def methods() -> tuple[list[str], list[list[str]]]:
    """Methods at equal images and at equal seconds."""
    study = Study("methods")
    images, seconds = study.budgets["images"], study.budgets["seconds"]
    head = [
        "",
        f"after {images:,} images",
        ALL_SEEDS,
        "seconds",
        f"after {seconds:.0f} s",
        "quality held",
    ]
    base = ["base", study.accuracy("start", "base"), *["-"] * 4]
    lines = [
        [
            arm,
            study.accuracy("images", arm),
            study.seeds("images", arm),
            f"{study.value('images', arm, 'seconds'):.0f}",
            study.accuracy("seconds", arm),
            study.quality("images", arm),
        ]
        for arm in study.arms
    ]
    return head, [base, *lines]


def kl() -> tuple[list[str], list[list[str]]]:
    """Accuracy, the reward that can be hacked, quality and diversity by beta."""
    study, size, diversity = Study("kl"), "score: jpeg_compressibility", "quality: diversity"
    smallest = study.value("start", "base", size)
    head = ["", "accuracy", ALL_SEEDS, "size of a JPEG, %", "diversity", "quality held", "KL"]
    first = f"{study.value('start', 'base', diversity):.3f}"
    base = ["base", study.accuracy("start", "base"), "-", "100", first, "-", "-"]
    lines = [
        [
            arm,
            study.accuracy("images", arm),
            study.seeds("images", arm),
            f"{100 * study.value('images', arm, size) / smallest:.0f}",
            f"{study.value('images', arm, diversity):.3f}",
            study.quality("images", arm),
            f"{study.value('images', arm, 'kl'):.2f}",
        ]
        for arm in study.arms
    ]
    return head, [base, *lines]


def steps() -> tuple[list[str], list[list[str]]]:
    """Sampling steps in training, at equal images and at equal seconds."""
    study = Study("steps")
    images, seconds = study.budgets["images"], study.budgets["seconds"]
    head = ["", f"after {images:,} images", ALL_SEEDS, "seconds", f"after {seconds:.0f} s"]
    base = ["base", study.accuracy("start", "base"), *["-"] * 3]
    lines = [
        [
            arm,
            study.accuracy("images", arm),
            study.seeds("images", arm),
            f"{study.value('images', arm, 'seconds'):.0f}",
            study.accuracy("seconds", arm),
        ]
        for arm in study.arms
    ]
    return head, [base, *lines]


TABLES: dict[str, Callable[[], tuple[list[str], list[list[str]]]]] = {
    "models": models.table,
    "methods": methods,
    "kl": kl,
    "steps": steps,
}


def with_tables(text: str, markdown: Callable[[list[str], list[list[str]]], str]) -> str:
    """Put the tables into a page, each between `<!-- table: NAME -->` and `<!-- end -->`."""
    for name, table in TABLES.items():
        begin = f"<!-- table: {name} -->\n"
        pattern = re.compile(f"({re.escape(begin)}).*?(<!-- end -->)", re.DOTALL)
        if len(pattern.findall(text)) != 1:
            raise ValueError(f"{begin.strip()} ... <!-- end --> is not there once")
        text = pattern.sub(lambda m, t=table: m[1] + markdown(*t()) + "\n" + m[2], text)
    return text


def write(markdown: Callable[[list[str], list[list[str]]], str]) -> Path:
    """Write the tables into README.md."""
    README.write_text(with_tables(README.read_text(encoding="utf-8"), markdown), encoding="utf-8")
    return README


def is_current(markdown: Callable[[list[str], list[list[str]]], str]) -> bool:
    """Tell if README.md has the tables of the records."""
    text = README.read_text(encoding="utf-8")
    return text == with_tables(text, markdown)
