"""Runs a program of this folder that is no suite: `python benchmarks NAME [options]`."""

from __future__ import annotations

import importlib
import sys

PROGRAMS = {
    "plot": "reporting.plots",
    "tables": "reporting.tables",
    "ocr": "experiments.ocr",
    "crash-drill": "experiments.crash_drill",
    "counted-cards": "experiments.counted_cards",
    "ranks-choices": "experiments.ranks_choices",
    "ranks-drill": "experiments.ranks_drill",
    "fuzz": "experiments.fuzz",
    "quantized": "experiments.quantized",
    "sanitize": "experiments.sanitize",
    "single-pass-loss": "experiments.single_pass_loss",
}


def main(argv: list[str]) -> int:
    """Run the program that argv[0] names with the other arguments; its exit code."""
    name = argv[0] if argv else "--help"
    if name in PROGRAMS:
        return importlib.import_module(PROGRAMS[name]).main(argv[1:])
    listing = f"python benchmarks NAME [options], NAME one of {', '.join(PROGRAMS)}"
    if name in ("-h", "--help"):
        print(listing)
        return 0
    print(f"there is no program {name!r}: {listing}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
