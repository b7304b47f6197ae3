"""Runs of several processes, each forked from one that has everything imported."""

from __future__ import annotations

import os
import random
from pathlib import Path

from support import processes


def start(folder: Path, size: int, function, *arguments) -> list[processes.Fork]:
    """Start `function(*arguments)` in the processes of a group, as torchrun starts them."""
    folder.mkdir(parents=True, exist_ok=True)
    port = random.randint(20000, 30000)
    return [
        processes.Fork(folder / f"rank-{rank}.log", _as_rank, rank, size, port, function, arguments)
        for rank in range(size)
    ]


def run(folder: Path, size: int, function, *arguments) -> list[str]:
    """Run `function(*arguments)` in `size` processes to the end, and return their output."""
    return [fork.wait() for fork in start(folder, size, function, *arguments)]


def _as_rank(rank: int, size: int, port: int, function, arguments) -> None:
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    function(*arguments)


def red_until_rank_one_errs(images, prompts, metadata):
    """`processes.red`, but after an iteration of `run_watched` rank 1 returns one score for all."""
    lines = Path(os.environ["FLOWGRPO_TEST_RUN"]) / "metrics.jsonl"
    begun = lines.exists() and '"iteration": 1, "kind": "train"' in lines.read_text()
    scores = processes.red(images, prompts, metadata)
    return scores[:1] if begun and os.environ["RANK"] == "1" else scores


def run_watched(config) -> None:
    """A run whose directory its rewards know."""
    os.environ["FLOWGRPO_TEST_RUN"] = str(config.out_dir)
    processes.run(config)
