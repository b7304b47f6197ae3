"""Draws a record of bench_kernels.py as bars on a log axis.

python benchmarks/plot.py benchmarks/results/kernels-cpu.json [--out kernels-cpu.png] [--cases b16]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
import records

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ORDER = ("eager", "compile", "reference", "ours-loop", "ours", "ceiling")
COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#c9a227",
    "reference": "#b0c4de",
    "ours-loop": "#7fb3d5",
    "ours": "#1f6fb2",
    "ceiling": "#d9d9d9",
}


def tick(case: str) -> str:
    """A case's name in three short lines: op, shape and batch, dtypes."""
    op, model, batch, dtypes = case.split()
    return f"{op}\n{model} {batch}\n{dtypes}"


def draw(record: dict, cases: list[str], out: Path) -> None:
    """One group of bars a case, one bar a provider; time in microseconds, log axis."""
    names = [p for p in ORDER if any(r["provider"] == p for r in record["rows"])]
    figure, axes = plt.subplots(figsize=(max(6.0, 1.1 + 1.5 * len(cases)), 3.6), dpi=150)
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for at, case in enumerate(cases):
            value = records.find(record["rows"], case=case, provider=name, metric="time")
            if value is None:
                continue
            x = at + (i - (len(names) - 1) / 2) * width
            label = name if at == 0 else None
            axes.bar(x, value, width * 0.94, color=COLOURS[name], label=label)
            axes.annotate(
                f"{value:.0f}" if value >= 10 else f"{value:.1f}",
                (x, value), ha="center", va="bottom", fontsize=6,
            )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylabel("µs a call (log)")
    axes.set_xticks(range(len(cases)), [tick(c) for c in cases], fontsize=7)
    axes.set_title(record["device"], fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False, ncols=len(names), loc="upper center",
                bbox_to_anchor=(0.5, -0.2))  # fmt: skip
    figure.savefig(out, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draws a record of bench_kernels.py.")
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, help="default: the record's name with .png")
    parser.add_argument("--cases", default="sd3-512 b16 float32", help="cases that contain this")
    args = parser.parse_args(argv)
    record = records.read(args.record)
    cases = [c for c in dict.fromkeys(r["case"] for r in record["rows"]) if args.cases in c]
    if not cases:
        raise SystemExit(f"--cases {args.cases!r} matches no case of {args.record}")
    out = args.out or args.record.with_suffix(".png")
    draw(record, cases, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
