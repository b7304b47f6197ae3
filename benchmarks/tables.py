"""Writes the tables of benchmarks/README.md from the records, between their markers.

    python benchmarks/tables.py            # rewrite the page
    python benchmarks/tables.py --check    # exit with 1 where the page differs from the records

A table stands between `<!-- NAME -->` and `<!-- end -->`; NAME is a key of TABLES.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import records

PAGE = Path(__file__).resolve().parent / "README.md"
# The type pairs that a trainer meets: float32 throughout, and a 16-bit model.
PAIRS = ("fp32/fp32", "bf16/fp32", "bf16/bf16")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def provenance(record: dict) -> str:
    versions = record["versions"]
    made = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton") if name in versions)
    return f"{record['device']}; {made}; commit {record['commit']}; {record['date'][:10]}."


def compile_table() -> str:
    """Registers a thread / bytes of shared memory / instructions of each kernel and target."""
    record = records.read(records.RESULTS / "compile.json")
    values: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in record["rows"]:
        target, *name, pair = row["case"].split()
        cell = values.setdefault((" ".join(name), pair), {}).setdefault(target, {})
        cell[row["metric"]] = row["value"]
    targets = list(dict.fromkeys(t for cells in values.values() for t in cells))
    lines = []
    for (name, pair), cells in values.items():
        if pair not in PAIRS:
            continue
        line = [name, pair]
        for target in targets:
            found = cells.get(target, {})
            parts = (found.get(m) for m in ("registers", "shared", "instructions"))
            line.append(" / ".join("?" if v is None else f"{v:.0f}" for v in parts))
        lines.append(line)
    count = len(values)
    local = {r["value"] for r in record["rows"] if r["metric"] == "local"}
    note = (
        f"{count} variants for each target, local memory at most {max(local):.0f} bytes; shown are "
        f"{len(lines)} (velocity / sample of {', '.join(PAIRS)}). A cell: registers a thread / "
        "bytes of shared memory / instructions."
    )
    head = ["kernel", "velocity/sample", *targets]
    return "\n\n".join([note, markdown(head, lines), provenance(record)])


def memory_table() -> str:
    """Bytes an element of one call's tensors, at batch 16."""
    record = records.read(records.RESULTS / "kernels-memory-cpu.json")
    elements = 16 * 16 * 64 * 64
    cases = dict.fromkeys(r["case"] for r in record["rows"] if "sd3-512 b16" in r["case"])
    lines = []
    for case in cases:
        found = {r["provider"]: r["value"] for r in record["rows"] if r["case"] == case}
        each = [f"{found[name] / elements:.1f}" for name in ("ours", "eager")]
        lines.append([case, *each])
    head = ["one call", "ours, bytes an element", "eager"]
    return "\n\n".join([markdown(head, lines), provenance(record)])


TABLES: dict[str, Callable[[], str]] = {"compile": compile_table, "memory": memory_table}


def filled(text: str) -> str:
    """The page with every table made anew."""

    def table(match: re.Match) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", table, text, flags=re.S)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args(argv)
    text = PAGE.read_text(encoding="utf-8")
    made = filled(text)
    if args.check:
        if made != text:
            print("benchmarks/README.md differs from the records: run benchmarks/tables.py")
        return int(made != text)
    PAGE.write_text(made, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
