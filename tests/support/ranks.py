"""Several processes of one run on this machine, without a launcher.

    with Ranks(folder, 2, function, argument) as ranks: ...
    ranks.kill(1, signal.SIGKILL)
    outputs = ranks.wait()              # of each rank, which all ended with code 0

All are forked from the server of `processes.Fork`, so that nothing is imported anew. Each has the
environment that a launcher would give it, and ends as a process does that Python ends.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from support.processes import Fork

STORE_GONE = re.compile(
    r"^(?:\[rank\d+\]:\[W.*|Exception raised from .*|frame #\d+: .*|<omitting python frames>)\n+",
    re.MULTILINE,
)
"""Lines in which torch warns of a store whose keeper has ended."""


class Ranks:
    """`function(*arguments)` in `count` processes; `changes`: rank -> environment variables."""

    def __init__(
        self,
        folder: Path,
        count: int,
        function: Callable,
        *arguments,
        changes: dict[int, dict[str, str]] | None = None,
        start: Sequence[int] | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        port, changes = free_port(), changes or {}
        self.forks = {
            rank: Fork(
                folder / f"rank-{rank}.log",
                as_rank,
                {**environment(rank, count, port), **changes.get(rank, {})},
                function,
                arguments,
            )
            for rank in (range(count) if start is None else start)
        }

    def kill(self, rank: int, number: int) -> None:
        """Send a signal to a rank."""
        self.forks[rank].kill(number)

    def codes(self, limit: float = 120.0) -> list[int | None]:
        """Wait for all ranks; their exit codes, None for one that has not ended within `limit`."""
        end = time.monotonic() + limit
        for fork in self.forks.values():
            fork.process.join(max(end - time.monotonic(), 0.0))
        return [fork.process.exitcode for fork in self.forks.values()]

    def outputs(self) -> list[str]:
        """What each rank has printed so far, without what torch says of one that is gone."""
        logs = [fork.log for fork in self.forks.values()]
        texts = [log.read_text() if log.exists() else "" for log in logs]
        return [STORE_GONE.sub("", text) for text in texts]

    def wait(self, code: int = 0) -> list[str]:
        """Wait for the end, check the exit codes, and return the outputs."""
        codes, outputs = self.codes(), self.outputs()
        assert codes == [code] * len(codes), "\n".join(outputs)
        return outputs

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exception: object) -> None:
        for fork in self.forks.values():
            if fork.process.is_alive():
                fork.process.kill()
            fork.process.join()


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def as_rank(variables: dict[str, str], function: Callable, arguments: Sequence) -> None:
    """Be one rank; the body of a process."""
    os.environ.update(variables)
    from flowgrpo.distributed import world

    try:
        function(*arguments)
    finally:
        # Python calls it at the end of a process, but not of a fork.
        world.leave()


def flowgrpo(*words: str) -> None:
    """`flowgrpo WORDS`."""
    import sys

    from flowgrpo.cli import main

    sys.argv = ["flowgrpo", *words]
    sys.exit(main.main(list(words)))
