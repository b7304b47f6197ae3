"""Suite `compile`: every Triton kernel and dtype variant compiled for each target, without a GPU.

    python benchmarks/bench_compile.py                    # all targets, some minutes
    python benchmarks/bench_compile.py --target sm_90     # replaces the rows of that target
    python benchmarks/bench_compile.py --kernels heads    # replaces the rows of those kernels

Writes results/compile.json and its page, results/compile.md: registers a thread, bytes of shared
memory, lines of PTX or AMD assembly, bytes of stack and local memory; for NVIDIA's GPUs also what
its assembler makes of the lines: instructions, and the barriers among them. Exits with 1 when a
kernel has float64 arithmetic, a fused multiply-add, local memory or no 128-bit accesses (see
flowgrpo_kernels/aot).
"""

from __future__ import annotations

import argparse
import os
import sys

os.environ["TRITON_INTERPRET"] = "0"
# As the shipped kernels are compiled.
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"

from flowgrpo_kernels import aot
from reporting import records, tables

PATH = records.RESULTS / "compile.json"
UNITS = {
    "registers": "registers/thread",
    "shared": "bytes",
    "instructions": "lines",
    "local": "bytes",
    "machine": "instructions",
    "barriers": "instructions",
}


def compiled(target: str, kernels: str) -> tuple[list[dict], list[str]]:
    """(rows, problems) of every variant on one target whose name contains `kernels`."""
    rows, problems = [], []
    for variant in aot.all_variants():
        if kernels not in variant.name:
            continue
        report = aot.compile_variant(variant, aot.TARGETS[target])
        case = f"{target} {variant.name} {variant.velocity}/{variant.sample}"
        problems += [f"{case}: {problem}" for problem in aot.problems(report)]
        for metric, unit in UNITS.items():
            value = getattr(report, metric)
            if value is not None:
                rows.append(records.row("compile", case, "ours", metric, value, unit))
    return rows, problems


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=list(aot.TARGETS), action="append")
    parser.add_argument("--kernels", default="", help="only those whose name contains this")
    args = parser.parse_args(argv)
    targets = args.target or list(aot.TARGETS)
    rows: list[dict] = []
    if (args.kernels or set(targets) != set(aot.TARGETS)) and PATH.exists():
        rows = [
            r
            for r in records.read(PATH)["rows"]
            if r["case"].split()[0] not in targets or args.kernels not in r["case"]
        ]
    problems: list[str] = []
    for target in targets:
        new_rows, new_problems = compiled(target, args.kernels)
        rows += new_rows
        problems += new_problems
        content = records.record(rows, "cpu")
        content["device"] = "none (compiled ahead of time)"
        records.write(content, PATH)
        registers = [r["value"] for r in new_rows if r["metric"] == "registers"]
        print(f"{target}: {len(registers)} kernels, up to {max(registers):.0f} registers a thread")
    page = tables.write("compile.md")
    print("\n".join(problems) or f"no problems; wrote {PATH.name}, {page.name}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
