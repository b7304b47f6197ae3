"""Tables of the records as pages of Markdown beside them.

    python benchmarks tables            # write compile.md and kernels-memory-cpu.md in results, and
                                        # the tables of README.md (studies.py, models.py)
    python benchmarks tables --check    # exit with 1 where a page differs from its record

bench_compile.py writes its page itself.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from reporting import records, studies

# The type pairs that a trainer meets: float32 throughout, and a 16-bit model.
PAIRS = ("fp32/fp32", "bf16/fp32", "bf16/bf16")


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table of Markdown."""
    cells = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def provenance(record: dict) -> str:
    """Device, versions, commit and date of a record in one line."""
    names = [name for name in ("torch", "triton") if name in record["versions"]]
    versions = ", ".join(f"{name} {record['versions'][name]}" for name in names)
    return f"{record['device']}; {versions}; commit {record['commit']}; {record['date'][:10]}."


def compiled_kernels() -> str:
    """Registers, shared memory and instructions of each kernel, a column a target."""
    record = records.read(records.RESULTS / "compile.json")
    variants: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in record["rows"]:
        target, *name, pair = row["case"].split()
        targets = variants.setdefault((" ".join(name), pair), {})
        targets.setdefault(target, {})[row["metric"]] = row["value"]
    columns = list(dict.fromkeys(t for targets in variants.values() for t in targets))
    lines = []
    for (name, pair), targets in variants.items():
        if pair not in PAIRS:
            continue
        line = [name, pair]
        for target in columns:
            metrics = targets.get(target, {})
            names = ["registers", "shared", "instructions"]
            if "machine" in metrics:
                names[2:] = ["machine", "barriers"]
            values = (metrics.get(m) for m in names)
            line.append(" / ".join("?" if v is None else f"{v:.0f}" for v in values))
        lines.append(line)
    local = {r["value"] for r in record["rows"] if r["metric"] == "local"}
    note = (
        f"{len(variants)} variants for each target, local memory at most {max(local):.0f} bytes. "
        f"Shown are {len(lines)}: velocity / sample of {', '.join(PAIRS)}. A cell: registers a "
        "thread / bytes of shared memory / instructions"
    )
    counted = any(r["metric"] == "barriers" for r in record["rows"])
    note += ", and for NVIDIA's GPUs the barriers among them." if counted else "."
    head = ["kernel", "velocity/sample", *columns]
    return page("The compiled kernels", "compile.json", note, markdown(head, lines), record)


def kernel_memory() -> str:
    """Bytes an element of one call's tensors, at batch 16."""
    record = records.read(records.RESULTS / "kernels-memory-cpu.json")
    elements = 16 * 16 * 64 * 64
    cases = dict.fromkeys(r["case"] for r in record["rows"] if "sd3-512 b16" in r["case"])
    lines = []
    for case in cases:
        peaks = {r["provider"]: r["value"] for r in record["rows"] if r["case"] == case}
        lines.append([case, *(f"{peaks[name] / elements:.1f}" for name in ("ours", "eager"))])
    note = "Bytes of tensors, beyond its arguments, that one call has at a time, for each element."
    table = markdown(["one call", "ours, bytes an element", "eager"], lines)
    return page("Memory of the kernels", "kernels-memory-cpu.json", note, table, record)


def page(title: str, source: str, note: str, table: str, record: dict) -> str:
    """A page of one table."""
    written = f"Written from [{source}]({source}) by `python benchmarks tables`."
    return "\n\n".join([f"# {title}", written, note, table, provenance(record)]) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "compile.md": compiled_kernels,
    "kernels-memory-cpu.md": kernel_memory,
}


def write(name: str) -> Path:
    """Write one page beside its record."""
    path = records.RESULTS / name
    path.write_text(PAGES[name](), encoding="utf-8")
    return path


def outdated() -> list[str]:
    """Names of the pages that differ from their records."""
    paths = {name: records.RESULTS / name for name in PAGES}
    names = [
        name
        for name, path in paths.items()
        if not path.exists() or path.read_text(encoding="utf-8") != PAGES[name]()
    ]
    return names if studies.is_current(markdown) else [*names, studies.README.name]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    args = parser.parse_args(argv)
    if args.check:
        names = outdated()
        if names:
            print(f"{', '.join(names)} differ from the records: run python benchmarks tables")
        return int(bool(names))
    for name in PAGES:
        print(f"wrote {write(name)}")
    print(f"wrote {studies.write(markdown)}")
    return 0
