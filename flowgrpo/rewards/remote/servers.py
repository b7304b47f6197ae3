"""Several servers of one reward: requests are dealt out, and one that fails is put aside.

    dealing     the next server in turn that serves and has a free place takes a request, so equal
                servers take turns and a slow one takes fewer; at most `concurrency` requests are
                with each. The turn goes on from call to call; `offset` is the first, so that the
                processes of one run need not all begin with the same server
    failing     a server that gives no answer, 408, 429, 500, 502, 503 or 504, or an answer that is
                none of the protocol, is put aside and its request goes to another. After `backoff`
                seconds, then twice as long each time, at most `MAX_WAIT`, or as long as its
                Retry-After says, it is looked at: GET of its health, and the picture for comparison
    giving up   a request that failed in max(retries + 1, number of servers) tries raises
                RemoteError, which the trainer treats as the failure of some groups. If all servers
                are aside for `wait` seconds while requests wait, that is a RewardError, which ends
                the run after it is saved
    comparison  all servers score one picture, at the start and when they come back. Scores more
                than `tolerance` apart, relative where they are above 1, are refused

Which server scores which request is left to time, so a run has equal numbers only where all servers
score with equal bits: the same weights, versions and kind of device. One server is the case of one.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from torch import Tensor

from flowgrpo.rewards.interface import RemoteError, ReplyError, RewardError, describe_error
from flowgrpo.rewards.options import check_numbers
from flowgrpo.rewards.remote.server import Server, UnavailableError

log = logging.getLogger("flowgrpo")

MAX_WAIT = 30.0
"""Seconds for which a server is put aside, at most."""
MIN_WAIT = 0.05
"""The least, also with `backoff` 0, so that no processor is kept busy by looking."""

T = TypeVar("T")
V = TypeVar("V")
ScoreOne = Callable[[Server, Tensor, str, dict[str, Any]], float]
"""server, image uint8 [3, H, W], prompt, metadata -> its score, or NaN."""


@dataclass(eq=False)
class Member:
    """One of the servers, and how it is."""

    server: Server
    free: int
    """Requests that it takes beside those it has."""
    aside: bool = False
    looked_at: bool = False
    """A thread is looking whether it serves again."""
    failures: int = 0
    """Times in a row that it was put aside or was not back."""
    until: float = 0.0
    """Seconds of time.monotonic() before which it is left alone."""
    said: str = ""
    """Why it was put aside."""
    name: str = ""
    """The reward that it says it serves, without folders."""


class _StoppedError(Exception):
    """Another request of the call failed, so this one is not sent."""


class Servers:
    """The servers of one reward."""

    def __init__(
        self,
        reward: str,
        urls: Sequence[str],
        score_one: ScoreOne,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 8,
        wait: float = 300.0,
        tolerance: float = 1e-3,
        offset: int = 0,
        health: str = "health",
    ) -> None:
        """urls: of the requests. health: of a look, from each of them."""
        zero = {"retries": retries, "backoff": backoff, "wait": wait}
        zero |= {"tolerance": tolerance, "offset": offset}
        positive = {"timeout": timeout, "concurrency": concurrency}
        check_numbers(reward, positive, zero)
        for number, url in enumerate(urls):
            if url in urls[:number]:
                raise RewardError(
                    f"the address {url} of reward {reward!r} is named twice, but different servers "
                    "are expected; leave one out, and raise the option concurrency for more "
                    "requests at once."
                )
        options = {"token": token, "timeout": timeout, "concurrency": concurrency, "health": health}
        self.members = [Member(Server(reward, url, **options), concurrency) for url in urls]
        self.reward, self.score_one = reward, score_one
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.wait, self.tolerance, self.concurrency = wait, tolerance, concurrency
        self._turn = offset
        self._changed = threading.Condition()
        self._all_aside_since = 0.0
        self._picture: tuple[Tensor, str, dict[str, Any]] | None = None
        self._reference: tuple[str, float] | None = None
        """Address and score that the others' are compared with."""
        self._warned = False

    def each(self, ask: Callable[[Server, V], T], values: Sequence[V]) -> list[T]:
        """Compute ask(server, value) for each value by whichever server; the first error is raised.

        Raises:
            RemoteError: a request failed in all tries.
            RewardError: a server refuses a request; or none has answered for `wait` seconds.
        """
        waiting = iter(enumerate(values))
        results: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        stop, lock = threading.Event(), threading.Lock()

        def work() -> None:
            while not stop.is_set():
                with lock:
                    number, value = next(waiting, (None, None))
                if number is None:
                    return
                try:
                    answer = self._send(partial(_swapped, ask, value), stop)
                except BaseException as error:
                    results.put((number, None, error))
                else:
                    results.put((number, answer, None))

        # No ThreadPoolExecutor: its threads are waited for at the end of the process, and a request
        # may take minutes.
        for _ in range(min(len(values), self.concurrency * len(self.members))):
            threading.Thread(target=work, name=f"flowgrpo-{self.reward}", daemon=True).start()
        answers: list[Any] = [None] * len(values)
        try:
            for _ in values:
                number, answers[number], error = results.get()
                if error is not None:
                    raise error
        finally:
            stop.set()
            with self._changed:
                self._changed.notify_all()
        return answers

    def reach(self) -> None:
        """Look at all servers, and put those that do not serve aside.

        Raises:
            RewardError: none of them serves, or they say that they serve different rewards.
        """
        answers = self._at_once(lambda member: self._look(member.server), self.members)
        errors = [error for _, error in answers]
        if all(errors):
            said = "; ".join(
                f"{member.server.url} {_reason(error)}"
                for member, error in zip(self.members, errors, strict=True)
            )
            raise RewardError(
                f"no server of reward {self.reward!r} can be reached ({said}), but one that "
                "answers is expected; start it or correct the address."
            )
        names: dict[str, Member] = {}
        for member, (name, error) in zip(self.members, answers, strict=True):
            if error is not None:
                self._put_aside(member, error)
                continue
            with self._changed:
                member.name = name
                self._bring_back(member)
            if name:
                names.setdefault(name, member)
        if len(names) > 1:
            (one, first), (other, second), *_ = names.items()
            raise RewardError(
                f"the servers {first.server.url} and {second.server.url} of reward "
                f"{self.reward!r} serve {one!r} and {other!r}, but one reward is expected; serve "
                "the same on all, or name them as two rewards."
            )

    def compare(self, image: Tensor, prompt: str, metadata: dict[str, Any]) -> None:
        """Let all servers score an image, uint8 [3, H, W]; with one server nothing happens.

        The picture is kept, and a server that comes back scores it again.

        Raises:
            RewardError: two of them score it differently, or one refuses it.
        """
        if len(self.members) == 1:
            return
        picture = self._picture = (image.cpu().clone(), prompt, metadata)
        members = [member for member in self.members if not member.aside]
        answers = self._at_once(lambda member: self.score_one(member.server, *picture), members)
        scores: dict[str, float] = {}
        for member, (score, error) in zip(members, answers, strict=True):
            if isinstance(error, RewardError):
                raise error
            if error is not None:
                self._put_aside(member, error)
            else:
                scores[member.server.url] = score
        finite = [(url, score) for url, score in scores.items() if math.isfinite(score)]
        self._reference = finite[0] if finite else None
        if self._reference is None and not self._warned:
            self._warned = True
            log.warning(
                "reward %r: no server gave a number for a picture to compare them by, so they will "
                "be compared by another",
                self.reward,
            )
        for url, score in scores.items():
            if reason := self._differs(score):
                raise RewardError(
                    f"the server {url} of reward {self.reward!r} {reason}, but scores within "
                    f"{self.tolerance:g} are expected; serve the same reward with the same weights "
                    "and versions on both, or raise the option tolerance."
                )

    def compare_by_first(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
    ) -> None:
        """Compare the servers by the first of these images, unless they have been compared."""
        if self._reference is None and len(images):
            self.compare(images[0], prompts[0], metadata[0])

    def describe(self) -> str:
        """Describe which servers serve, and what the others said."""
        with self._changed:
            members = [(m.server.url, m.name, m.said if m.aside else "") for m in self.members]
        serving = [f"{url} ({name})" if name else url for url, name, said in members if not said]
        texts = [", ".join(serving)] if serving else []
        texts += [f"{url} {said}" for url, _, said in members if said]
        share = f"{len(serving)} of {len(members)} serve: " if len(members) > 1 else ""
        return share + "; ".join(texts)

    def _send(self, ask: Callable[[Server], T], stop: threading.Event) -> T:
        """Send one request: to another server after each failure."""
        failed: dict[str, RemoteError] = {}
        tries = max(self.retries + 1, len(self.members))
        for _ in range(tries):
            member = self._take(failed, stop)
            try:
                answer = ask(member.server)
            except (UnavailableError, ReplyError) as error:
                self._put_aside(member, error)
                failed[member.server.url] = error
                replies = [e for e in failed.values() if isinstance(e, ReplyError)]
                if len(replies) == len(self.members):
                    raise
            else:
                with self._changed:
                    member.failures = 0
                    self._bring_back(member)
                return answer
            finally:
                with self._changed:
                    member.free += 1
                    self._changed.notify_all()
        said = "; ".join(f"{url} {_reason(error)}" for url, error in failed.items())
        raise RemoteError(
            f"a request of reward {self.reward!r} failed after {tries} tries of at most "
            f"{self.timeout:g} s ({said}); see what the servers log."
        )

    def _take(self, failed: Iterable[str], stop: threading.Event) -> Member:
        """Wait for a place with a server, if there is one with none that has `failed`."""
        began = time.monotonic()
        with self._changed:
            while True:
                if stop.is_set():
                    raise _StoppedError
                due = self._look_at_those_due()
                serving = [member for member in self._in_turn() if not member.aside]
                fresh = [m for m in serving if m.server.url not in failed] or serving
                for member in fresh:
                    if member.free:
                        member.free -= 1
                        self._turn = self.members.index(member) + 1
                        return member
                if not serving:
                    left = max(began, self._all_aside_since) + self.wait - time.monotonic()
                    if left <= 0:
                        raise RewardError(self._none_left())
                    due = min(due, left)
                self._changed.wait(due)

    def _in_turn(self) -> list[Member]:
        first = self._turn % len(self.members)
        return self.members[first:] + self.members[:first]

    def _look_at_those_due(self) -> float:
        """Start to look at servers whose time aside is over; return the seconds to the next."""
        now = time.monotonic()
        left = [MAX_WAIT]
        for member in self.members:
            if not member.aside or member.looked_at:
                continue
            if member.until > now:
                left.append(member.until - now)
                continue
            member.looked_at = True
            # Beside the requests, which go to the other servers meanwhile.
            threading.Thread(target=self._look_again, args=(member,), daemon=True).start()
        return min(left)

    def _look_again(self, member: Member) -> None:
        """Look at a server that is aside, and bring it back or leave it there for longer."""
        error: BaseException | None = None
        try:
            self._check(member)
        # RewardError too: the run goes on without a server that has come back as another.
        except BaseException as reason:
            error = reason
        with self._changed:
            member.looked_at = False
            if error is None:
                self._bring_back(member)
            elif member.aside:
                self._leave_aside(member, error)
            self._changed.notify_all()

    def _check(self, member: Member) -> None:
        """Raise unless a server serves, and as it did."""
        name = self._look(member.server)
        known = {m.name for m in self.members if m.name}
        if name and known and name not in known:
            raise RemoteError(f"serves {name!r}, but {', '.join(map(repr, known))} is expected")
        if self._reference is not None:
            score = self.score_one(member.server, *self._picture)
            if reason := self._differs(score):
                raise RemoteError(reason)
        member.name = name

    def _look(self, server: Server) -> str:
        """Ask a server which reward it serves; its name without folders, or ""."""
        return server.look().rpartition("/")[2]

    def _differs(self, score: float) -> str:
        """Say how a score of the picture differs from the reference; "" if it does not."""
        if self._reference is None:
            return ""
        url, expected = self._reference
        # Written so that NaN differs.
        if abs(score - expected) <= self.tolerance * max(1.0, abs(score), abs(expected)):
            return ""
        return f"scores a picture {score:.6g} that {url} scores {expected:.6g}"

    def _put_aside(self, member: Member, error: BaseException) -> None:
        """Give a server no requests for a while."""
        with self._changed:
            if member.aside:
                # Another request found it so.
                return
            member.aside = True
            self._leave_aside(member, error)
            serving = sum(not m.aside for m in self.members)
            if not serving:
                self._all_aside_since = time.monotonic()
            self._changed.notify_all()
        log.warning(
            "reward %r: the server %s is put aside: it %s; %d of %d serve",
            self.reward,
            member.server.url,
            member.said,
            serving,
            len(self.members),
        )

    def _leave_aside(self, member: Member, error: BaseException) -> None:
        """Set when a server is looked at next."""
        seconds = self.backoff * 2.0 ** min(member.failures, 30)
        asked = getattr(error, "retry_after", None)
        seconds = min(max(seconds if asked is None else asked, MIN_WAIT), MAX_WAIT)
        member.failures += 1
        member.until, member.said = time.monotonic() + seconds, _reason(error)

    def _bring_back(self, member: Member) -> None:
        """Give a server requests again."""
        if not member.aside:
            return
        member.aside = False
        self._changed.notify_all()
        serving = sum(not m.aside for m in self.members)
        log.warning(
            "reward %r: the server %s serves again; %d of %d serve",
            self.reward,
            member.server.url,
            serving,
            len(self.members),
        )

    def _none_left(self) -> str:
        said = "; ".join(f"{m.server.url} {m.said}" for m in self.members)
        return (
            f"no server of reward {self.reward!r} has served for {self.wait:g} s ({said}), but one "
            "that scores is expected; start it, or correct the addresses in the option url."
        )

    def _at_once(
        self, call: Callable[[Member], T], members: Sequence[Member]
    ) -> list[tuple[Any, BaseException | None]]:
        """Call `call` with all members at once: its value and None, or None and its error."""
        answers: list[tuple[Any, BaseException | None]] = [(None, None)] * len(members)

        def work(number: int) -> None:
            try:
                answers[number] = (call(members[number]), None)
            except BaseException as error:
                answers[number] = (None, error)

        numbers = range(len(members))
        threads = [threading.Thread(target=work, args=(n,), daemon=True) for n in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return answers


def addresses(text: str) -> list[str]:
    """Read the option url: one address, or several with commas between them."""
    return [part.strip() for part in text.split(",")]


def _swapped(ask: Callable[[Server, V], T], value: V, server: Server) -> T:
    return ask(server, value)


def _reason(error: BaseException) -> str:
    """Say what a server did: "answered 503 (...)", or the sentence of another error."""
    if reason := getattr(error, "reason", ""):
        return reason
    if isinstance(error, RemoteError | RewardError):
        return str(error).rstrip(".")
    return f"failed ({describe_error(error)})"
