"""Compiles the kernels that are shipped in images/, or checks that they are those of the sources.

    python -m flowgrpo_kernels.aot                 # records the table, compiles what has changed
    python -m flowgrpo_kernels.aot --jobs 8        # in eight processes
    python -m flowgrpo_kernels.aot --check         # exit 1 and a line for each thing that is stale
    python -m flowgrpo_kernels.aot --refresh       # only comments changed: a new digest of the text

Needs Triton, and no GPU. About a second a kernel and target at first; Triton's cache
(TRITON_CACHE_DIR) holds what is unchanged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..backends import triton


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m flowgrpo_kernels.aot", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument(
        "--out", type=Path, help="the folder of the packs; by default the package's"
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--check", action="store_true", help="compile nothing; say what is stale")
    parser.add_argument("--refresh", action="store_true", help="write the digest of the text anew")
    args = parser.parse_args(argv)
    if triton.interpreting():
        parser.error("TRITON_INTERPRET=1 replaces the compiler: unset it")
    from . import pack

    folder = args.out or pack.FOLDER
    if args.refresh:
        pack.refresh(folder)
    elif not args.check:
        pack.write(folder, jobs=args.jobs, report=pack.progress)
    problems = pack.check(folder)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        size = sum(path.stat().st_size for path in folder.iterdir())
        print(f"{folder}: {size / 1e6:.2f} MB, of the sources as they are")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
