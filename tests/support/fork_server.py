"""The server that `multiprocessing` forks processes from, itself forked from pytest's process.

What the tests have imported needs no second import, which takes seconds. It is forked before the
first test, since autograd cannot be used in a fork of a process that has used it, and sleeps until
somebody asks for a process; then it imports what is missing and prepares what every run would
(`support.process_imports`).
"""

from __future__ import annotations

import os
import select
import signal
import sys
from multiprocessing import forkserver, util
from unittest import mock

USERS = ("support.processes", "experiments.crash_drill")
"""Modules that start processes so."""


def start() -> None:
    """Fork the server where tests need it and a fork is safe: on Linux without CUDA."""
    import torch

    if sys.platform != "linux" or torch.cuda.is_available() or not {*USERS} & {*sys.modules}:
        return
    forkserver.set_forkserver_preload(["support.process_imports"])
    with mock.patch.object(util, "spawnv_passfds", _fork):
        forkserver.ensure_running()


def _fork(_, arguments: list[str], kept: list[int]) -> int:
    """Stand in for `util.spawnv_passfds`: run `python -c CODE` in a fork, with its `kept` files."""
    process = os.fork()
    if process:
        return process
    try:
        _let_go(kept)
        # The first is where clients call, another ends with pytest.
        called, _, _ = select.select(kept, [], [])
        if kept[0] in called:
            exec(arguments[-1], {})
    finally:
        os._exit(0)


def _let_go(kept: list[int]) -> None:
    """Leave pytest's files, whose numbers stay taken, and its way of taking signals."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        if number not in (1, 2, nothing, *kept):
            try:
                os.fstat(number)
            except OSError:
                continue
            os.dup2(nothing, number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
