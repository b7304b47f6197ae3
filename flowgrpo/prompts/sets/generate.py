"""Write the prompt sets of this folder: python -m flowgrpo.prompts.sets.generate [FOLDER]

Every set is a choice from all the prompts that its grammar can make. The choice is by a hash of the
content, so the files are the same on any machine and any version of Python.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from flowgrpo.prompts.sets import general_prompts, geneval_prompts, ocr_prompts

Line = dict[str, Any]

GRAMMARS = {"geneval": geneval_prompts, "ocr": ocr_prompts, "general": general_prompts}
"""Prompt set -> module with `tasks` (candidates, counts) and `key` (the splits never share one)."""


def deal(
    candidates: Iterable[Line], train: int, test: int, key: Callable[[Line], str]
) -> tuple[list[Line], list[Line]]:
    """Choose `train` and `test` lines, none with the same `key`, in the order of a hash."""
    lines: dict[str, Line] = {}
    for line in sorted(candidates, key=lambda line: _hash(line["prompt"])):
        lines.setdefault(key(line), line)
    order = sorted(lines, key=_hash)
    if len(order) < train + test:
        raise ValueError(f"{len(order)} different prompts, but {train} + {test} are wanted.")
    return [lines[k] for k in order[:train]], [lines[k] for k in order[train : train + test]]


def sets() -> dict[str, list[Line]]:
    """Make all sets: file name -> its lines."""
    files: dict[str, list[Line]] = {}
    for name, module in GRAMMARS.items():
        train: list[Line] = []
        test: list[Line] = []
        for candidates, n_train, n_test in module.tasks():
            more_train, more_test = deal(candidates, n_train, n_test, module.key)
            train += more_train
            test += more_test
        files[f"{name}/train_metadata.jsonl"] = _mixed(train)
        files[f"{name}/test_metadata.jsonl"] = _mixed(test)
    return files


def text(lines: Sequence[Line]) -> str:
    """Format a set as JSONL."""
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _mixed(lines: list[Line]) -> list[Line]:
    return sorted(lines, key=lambda line: _hash("order " + line["prompt"]))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def main(folder: Path) -> None:
    """Write every file under `folder`."""
    for name, lines in sets().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text(lines), encoding="utf-8")
        print(f"{path}: {len(lines)} prompts")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
