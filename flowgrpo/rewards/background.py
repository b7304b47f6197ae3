"""Rewards beside the rollout: images of one chunk are scored while the next is sampled.

A reward compares nothing across images, but a group is kept or dropped as a whole, so images are
handed on in whole groups: those that a chunk completes. That is so with and without a thread, and
scores are put together in the order of the rows, so both give the same bits also where a reward's
network computes other bits for another number of images.

One thread computes the rewards. At most `waiting` portions of images are with it; then `add` waits,
which bounds the memory. On CUDA the thread has a stream of its own, which starts on a portion when
the images are decoded and does not hold up the sampling. A process that ends, because a run was
aborted or failed, does not wait for the rewards that are still under way.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial

import torch
from torch import Tensor

from flowgrpo.records import Prompts, Scores
from flowgrpo.rewards import Scorer


class RewardThread:
    """The thread that computes rewards, and its stream. One for a run."""

    def __init__(self, device: torch.device, waiting: int) -> None:
        self._free = threading.BoundedSemaphore(waiting)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # No ThreadPoolExecutor: its threads are waited for at the end of the process, and a reward
        # may take minutes.
        self.thread = threading.Thread(
            target=_serve, args=(self._work,), name="flowgrpo-rewards", daemon=True
        )
        self.thread.start()
        weakref.finalize(self, self._work.put, None)

    def submit(self, work: Callable[[Tensor], dict[str, Tensor]], images: Tensor) -> Future:
        """Start work(images) when the images are there; waits while too much is under way."""
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(images.device))
        self._free.acquire()
        future: Future = Future()
        future.add_done_callback(lambda _, free=self._free: free.release())
        self._work.put(partial(_answer, future, work, images, self._stream, ready))
        return future


def _serve(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Do one after the other, until None comes."""
    while (call := work.get()) is not None:
        call()
        # Its images would stay in memory until the next one comes.
        del call


def _answer(
    future: Future,
    work: Callable[[Tensor], dict[str, Tensor]],
    images: Tensor,
    stream: torch.cuda.Stream | None,
    ready: torch.cuda.Event | None,
) -> None:
    """Put what work(images) returns or raises into `future`."""
    try:
        if ready is None:
            found = work(images)
        else:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                # The allocator must not reuse the images before this stream has read them.
                images.record_stream(stream)
                found = work(images)
    # Whatever it is, also SystemExit of a user's reward: whoever asks for the result gets it.
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(found)


class BackgroundScoring:
    """The rewards of one iteration.

    scoring = Scoring(scorer, prompts, group_size, worker)
    scoring.add(images)                     the next rows, in order; any number
    scores = scoring.finish()
    """

    def __init__(
        self, scorer: Scorer, prompts: Prompts, group_size: int, worker: RewardThread | None = None
    ) -> None:
        self.scorer, self.prompts = scorer, prompts
        self.group_size, self.worker = group_size, worker
        self._rest: list[Tensor] = []
        self._scored = 0
        self._portions: list[Callable[[], dict[str, Tensor]]] = []
        self._running: list[Future] = []

    def add(self, images: Tensor) -> None:
        """Take uint8 images [b, 3, H, W] of the next b rows.

        Raises:
            Exception: what a reward raised for earlier images.
        """
        for future in self._running:
            if future.done():
                future.result()
        self._rest.append(images)
        groups = sum(map(len, self._rest)) // self.group_size
        if groups == 0:
            return
        ready = torch.cat(self._rest)
        count = groups * self.group_size
        self._rest = [ready[count:]] if len(ready) > count else []
        prompts = self.prompts.take(range(self._scored, self._scored + groups))
        self._scored += groups

        def work(portion: Tensor) -> dict[str, Tensor]:
            return self.scorer.parts(portion, prompts, self.group_size)

        if self.worker is None:
            self._portions.append(lambda: work(ready[:count]))
        else:
            future = self.worker.submit(work, ready[:count])
            self._running.append(future)
            self._portions.append(future.result)

    def finish(self) -> Scores:
        """The scores of all rows, when they are there.

        Raises:
            ValueError: images are missing.
            Exception: what a reward raised.
        """
        if self._scored != len(self.prompts) or self._rest:
            raise ValueError(
                f"{self._scored} groups of images were added and {sum(map(len, self._rest))} "
                f"images beyond, but {len(self.prompts)} groups of {self.group_size} are expected"
            )
        found = [portion() for portion in self._portions]
        parts = {name: torch.cat([part[name] for part in found]) for name in found[0]}
        return self.scorer.combine(parts, self.group_size)
