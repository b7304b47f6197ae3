"""Pictures of a record: bars on a log axis for kernels, lines over the batch size for rollouts.

python benchmarks plot benchmarks/results/kernels-cpu.json [--out FILE.png] [--cases b16]
python benchmarks plot benchmarks/results/rollout-cuda.json [--cases sd3.5-m]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

from reporting import records

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ORDER = (
    *("eager", "compile", "reference"),
    *("ours-loop", "ours-captured", "ours-compiled", "ours-fused", "ours", "ceiling"),
)
COLOURS = {
    "eager": "#8c8c8c",
    "compile": "#c9a227",
    "reference": "#b0c4de",
    "ours-loop": "#7fb3d5",
    "ours-captured": "#4a90c4",
    "ours-compiled": "#3a9a8f",
    "ours-fused": "#2f5fa8",
    "ours": "#1f6fb2",
    "ceiling": "#d9d9d9",
}


def providers(rows: list[dict]) -> list[str]:
    """Providers that have rows, in the order of the bars."""
    return [p for p in ORDER if any(r["provider"] == p for r in rows)]


def tick(case: str) -> str:
    """Label of a case in three short lines: op, shape and batch, dtypes."""
    op, model, batch, dtypes = case.split()
    return f"{op}\n{model} {batch}\n{dtypes}"


def bars(record: dict, cases: list[str], out: Path) -> None:
    """Draw a group of bars a case, a bar a provider: microseconds on a log axis."""
    names = providers(record["rows"])
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


def batches(cases: list[str]) -> dict[str, dict[int, str]]:
    """Title (model, steps, guidance) -> batch size -> case."""
    titles: dict[str, dict[int, str]] = {}
    for case in cases:
        model, steps, batch, guidance = case.split()
        title = f"{model}, {steps.removeprefix('t')} steps, {guidance}"
        titles.setdefault(title, {})[int(batch.removeprefix("b"))] = case
    return titles


def lines(record: dict, cases: list[str], out: Path) -> None:
    """Draw a panel for each model, number of steps and guidance: images a second by denoising."""
    rows, panels = record["rows"], batches(cases)
    names = providers(rows)
    figure, grid = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 0.6, 3.4), dpi=150, squeeze=False
    )
    for axes, (title, sizes) in zip(grid[0], panels.items(), strict=True):
        for name in names:
            points = [
                (batch, value)
                for batch, case in sorted(sizes.items())
                if (value := records.find(rows, case=case, provider=name, metric="images"))
            ]
            if not points:
                continue
            if name == "ceiling":
                # Operations an image over the rate of a matrix product: the same at every batch.
                axes.axhline(points[0][1], linestyle="--", color="#555555", label=name)
                continue
            axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[name], label=name, ms=4)
        axes.set_title(title, fontsize=8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted(sizes), [str(b) for b in sorted(sizes)], fontsize=7)
        axes.tick_params(axis="y", labelsize=7)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of a forward", fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel("images/s, denoising", fontsize=7)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=7, frameon=False, ncols=len(labels), loc="lower center",
                  bbox_to_anchor=(0.5, -0.08))  # fmt: skip
    figure.suptitle(record["device"], fontsize=8)
    figure.tight_layout()
    figure.savefig(out, bbox_inches="tight")
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--out", type=Path, help="default: the record's name with .png")
    parser.add_argument(
        "--cases", help="cases that contain this; default: sd3-512 b16 float32 of kernels, else all"
    )
    args = parser.parse_args(argv)
    record = records.read(args.record)
    suite = {r["suite"] for r in record["rows"]}
    if suite not in ({"kernels"}, {"rollout"}):
        raise SystemExit(f"{args.record} is of {', '.join(sorted(suite))}, not kernels or rollout")
    pattern = args.cases
    if pattern is None:
        pattern = "sd3-512 b16 float32" if suite == {"kernels"} else ""
    cases = dict.fromkeys(r["case"] for r in record["rows"] if r["case"] != "device")
    chosen = [case for case in cases if pattern in case]
    if not chosen:
        raise SystemExit(f"--cases {pattern!r} matches no case of {args.record}")
    out = args.out or args.record.with_suffix(".png")
    (bars if suite == {"kernels"} else lines)(record, chosen, out)
    print(f"wrote {out}")
    return 0
