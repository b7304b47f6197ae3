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
