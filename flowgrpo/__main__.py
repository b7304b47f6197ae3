"""The ``flowgrpo`` command, also as ``python -m flowgrpo``.

The kernels install without the trainer's requirements. The command needs them, and says so in one
sentence where they are missing.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys


def missing_requirements() -> list[str]:
    """Names of the packages in the extra ``train`` that are not installed."""
    missing = []
    for requirement in importlib.metadata.requires("flowgrpo") or []:
        name, _, marker = requirement.partition(";")
        if re.search(r"""extra\s*==\s*["']train["']""", marker):
            name = re.split(r"[^\w.-]", name.strip())[0]
            if not any(importlib.metadata.distributions(name=name)):
                missing.append(name)
    return missing


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code; 2 without the extra ``train``."""
    try:
        from flowgrpo.cli.main import main as run

        return run(argv)
    except ModuleNotFoundError as error:
        # A module that is missing for another reason, one of ours among them, is a bug to be seen.
        module = (error.name or "").partition(".")[0]
        if module in ("", "flowgrpo", "flowgrpo_kernels") or not (
            missing := missing_requirements()
        ):
            raise
        print(
            f"flowgrpo: the trainer needs {', '.join(missing)}: pip install 'flowgrpo[train]'",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
