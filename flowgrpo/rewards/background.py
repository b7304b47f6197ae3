"""Rewards beside the rollout: images of one chunk are scored while the next is sampled.

A reward compares nothing across images, so each chunk is handed on as it comes, also where its
first or last group is cut. That is so with and without a thread and with any number of processes,
and scores are put together in the order of the rows: all give the same bits, also where a reward's
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
from concurrent.futures import Future, wait
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from flowgrpo.records import Prompts, Scores
from flowgrpo.rewards import RewardError, Scorer


class RewardThread:
    """The thread of a run that computes rewards, and its stream."""

    def __init__(self, device: torch.device, waiting: int, limit: float | None = None) -> None:
        """limit: seconds after which rewards that have not come are an error; None: no such."""
        self.limit = limit
        self._slots = threading.BoundedSemaphore(waiting)
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
        """Queue work(images), to start once the images are decoded; waits for a free slot.

        Raises:
            RewardError: there was none within `limit`.
        """
        ready = None
        if self._stream is not None:
            ready = torch.cuda.Event()
            ready.record(torch.cuda.current_stream(images.device))
        if not self._slots.acquire(timeout=self.limit):
            raise self._late()
        future: Future = Future()
        future.add_done_callback(lambda _, slots=self._slots: slots.release())
        self._work.put(partial(_answer, future, work, images, self._stream, ready))
        return future

    def result(self, future: Future) -> dict[str, Tensor]:
        """Wait for what `submit` has queued.

        Raises:
            RewardError: it has not come within `limit`.
            Exception: what the work raised.
        """
        done, _ = wait([future], self.limit)
        if not done:
            raise self._late()
        return future.result()

    def _late(self) -> RewardError:
        return RewardError(
            f"the rewards of a chunk of images have not come within {self.limit:g} seconds, after "
            "which the other processes would give this one up; mend the reward that hangs, give it "
            "a time-out of its own, or raise run.rank_timeout."
        )


def _serve(work: queue.SimpleQueue[Callable[[], None] | None]) -> None:
    """Run queued calls one after the other, until None comes."""
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
    """Run work(images) and put its result or its error into `future`."""
    try:
        if ready is None:
            scores = work(images)
        else:
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                # The allocator must not reuse the images before this stream has read them.
                images.record_stream(stream)
                scores = work(images)
    # Any error, also SystemExit of a user's reward: it is raised where the result is asked for.
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(scores)


class BackgroundScoring:
    """The rewards of one iteration, computed while its images come.

    scoring = BackgroundScoring(scorer, prompts, group_size, reward_thread)
    scoring.add(images)                     the next rows, in order; any number
    scores = scoring.finish()
    """

    def __init__(
        self,
        scorer: Scorer,
        prompts: Prompts,
        group_size: int,
        thread: RewardThread | None = None,
        rows: Tensor | None = None,
        late: bool = False,
    ) -> None:
        """
        Args:
            prompts: K of them, of `group_size` images each.
            thread: computes the rewards; None: they are computed in `finish`.
            rows: int64 [b], those of the K G rows whose images come here; None: all.
            late: an error of a reward waits for `rewards`; else the next `add` raises it.
        """
        self.scorer, self.prompts = scorer, prompts
        self.group_size, self.thread, self.late = group_size, thread, late
        all_rows = torch.arange(len(prompts) * group_size)
        self._groups = ((all_rows if rows is None else rows) // group_size).tolist()
        self._added = 0
        self._portions: list[Callable[[], dict[str, Tensor]]] = []
        self._running: list[Future] = []

    def add(self, images: Tensor) -> None:
        """Add the images of the next b rows, uint8 [b, 3, H, W].

        Raises:
            Exception: what a reward raised for earlier images, unless `late`.
        """
        for future in () if self.late else self._running:
            if future.done():
                future.result()
        groups = self._groups[self._added : self._added + len(images)]
        self._added += len(images)
        counts = {group: len(list(rows)) for group, rows in groupby(groups)}
        prompts = self.prompts.take(list(counts))

        def score(images: Tensor) -> dict[str, Tensor]:
            return self.scorer.score_each(images, prompts, list(counts.values()))

        if self.thread is None:
            self._portions.append(partial(score, images))
        else:
            future = self.thread.submit(score, images)
            self._running.append(future)
            self._portions.append(partial(self.thread.result, future))

    def rewards(self) -> dict[str, Tensor]:
        """Wait for the scores of these rows, float64 [b] of each reward.

        Raises:
            ValueError: images are missing.
            Exception: what a reward raised.
        """
        if self._added != len(self._groups):
            raise ValueError(
                f"{self._added} images were added, but {len(self._groups)} are expected"
            )
        scores = [portion() for portion in self._portions]
        return {name: torch.cat([portion[name] for portion in scores]) for name in scores[0]}

    def finish(self) -> Scores:
        """Wait for the scores of all rows, which are here.

        Raises:
            ValueError: images are missing.
            Exception: what a reward raised.
        """
        return self.scorer.combine(self.rewards(), self.group_size)
