"""A process that times one provider of a suite, a round whenever it is asked to.

    python -m measuring.worker SUITE PROVIDER DEVICE [--smoke]

compare.py runs one for each of two commits: the benchmarks are the same, and the packages those on
PYTHONPATH. A line of JSON is answered by a line of JSON:

    {"list": true}      ->  {"cases": [...], "packages": folder}
    {"ready": case}     ->  {"ready": case}       makes buffers, warms up
    {"round": true}     ->  {"seconds": ...}
    {"leave": true}     ->  the process ends

What fails is answered by {"error": text}, and the next line is read.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any, TextIO

import torch

import flowgrpo_kernels
from measuring import memory
from measuring.timers import Timed
from measuring.timing import Options, Timing


class Worker:
    """The cases of a suite, and the one that is ready."""

    def __init__(self, timings: list[Timing], provider: str, device: str) -> None:
        self.cases = {timing.case: timing for timing in timings if provider in timing.providers}
        self.provider, self.device, self.threads = provider, device, torch.get_num_threads()
        self.timed: Timed | None = None

    def answer(self, message: dict[str, Any]) -> dict[str, Any]:
        """Do what a message asks for."""
        if "list" in message:
            folder = Path(flowgrpo_kernels.__file__).resolve().parents[1]
            return {"cases": list(self.cases), "packages": str(folder)}
        if "ready" in message:
            self.timed = None
            memory.release(self.device)
            timing = self.cases[message["ready"]]
            torch.set_num_threads(timing.threads or self.threads)
            self.timed = timing.ready([self.provider])[self.provider]
            # One more: on a GPU the first replay of a graph.
            self.timed()
            return {"ready": message["ready"]}
        if self.timed is None:
            raise ValueError("no case is ready: ask for one first")
        return {"seconds": self.timed()}


def serve(worker: Worker, source: TextIO, target: TextIO) -> None:
    """Answer line by line until there are no more, or one asks to leave."""
    for line in source:
        message = json.loads(line)
        if "leave" in message:
            return
        try:
            reply = worker.answer(message)
        # Whatever a commit's packages raise; the comparison goes on with the next case.
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(reply), file=target, flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("suite")
    parser.add_argument("provider")
    parser.add_argument("device", choices=("cpu", "cuda"))
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args(argv)
    # What a suite prints is no answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    module = importlib.import_module(f"bench_{args.suite}")
    timings = module.timings(Options(args.device, args.smoke))
    serve(Worker(timings, args.provider, args.device), sys.stdin, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
