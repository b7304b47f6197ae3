"""JSON over HTTP with bearer token, time-outs, bounded retries and bounded concurrency.

What may pass by itself (no connection, time-out, 429, 5xx) is tried again, after `backoff` seconds,
then twice as long, and so on, or as long as the server's Retry-After says, never more than
`MAX_WAIT`. What remains, and a reply that makes no sense, raises RemoteError, which the trainer
treats as the failure of some groups. What will not pass (token refused, wrong address, request
refused) raises RewardError, which ends the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from flowgrpo.rewards.interface import RemoteError as RemoteError
from flowgrpo.rewards.interface import ReplyError, RewardError
from flowgrpo.rewards.options import check_numbers, library

MAX_WAIT = 30.0
PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses that are tried again."""

T = TypeVar("T")


class Server:
    """One address that takes JSON by POST."""

    def __init__(
        self,
        reward: str,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        retries: int = 3,
        backoff: float = 0.5,
        concurrency: int = 8,
    ) -> None:
        httpx = library("httpx", reward)
        _check_address(httpx, reward, url)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise RewardError(
                f"the token of reward {reward!r} has characters beside those of ASCII that are "
                f"printed, but a header takes no others; set FLOWGRPO_REWARD_{reward.upper()}_TOKEN"
                " to the token alone, without a line break."
            )
        positive = {"timeout": timeout, "concurrency": concurrency}
        check_numbers(reward, positive, {"retries": retries, "backoff": backoff})
        self.reward, self.url = reward, url
        self.retries, self.backoff, self.timeout = retries, backoff, timeout
        self.concurrency, self.has_token = concurrency, bool(token)
        self._failures = httpx.TransportError
        try:
            self._client = httpx.Client(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx.Timeout(timeout, connect=min(timeout, 10.0)),
                limits=httpx.Limits(max_connections=concurrency),
            )
        # Proxies and certificates of the environment are read here.
        except (ImportError, OSError, ValueError, httpx.InvalidURL) as error:
            raise RewardError(
                f"the connection of reward {reward!r} cannot be set up ({error}), but proxies and "
                "certificates that httpx can use are expected; correct HTTP_PROXY, HTTPS_PROXY, "
                "ALL_PROXY, SSL_CERT_FILE or SSL_CERT_DIR in the environment."
            ) from error

    def post(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Send JSON and return the JSON object that the server answers.

        Raises:
            RemoteError: no answer after all tries, or one that is no JSON object.
            RewardError: the server refuses the request or the token.
        """
        problem = ""
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt
            try:
                response = self._client.post(self.url, json=payload)
            except self._failures as error:
                problem = f"gave no answer ({type(error).__name__}: {error})"
            else:
                if response.status_code not in PASSING:
                    return self._read(response)
                problem = f"answered {response.status_code} ({_detail(response)})"
                wait = _retry_after(response, wait)
            if attempt < self.retries:
                time.sleep(min(wait, MAX_WAIT))
        raise RemoteError(
            f"the server {self.url} of reward {self.reward!r} {problem} after {self.retries + 1} "
            f"tries of at most {self.timeout:g} s; check that it runs and can be reached."
        )

    def reach(self) -> None:
        """Raise RewardError unless something answers at the address, whatever it answers."""
        try:
            self._client.get(self.url)
        except self._failures as error:
            raise RewardError(
                f"the server {self.url} of reward {self.reward!r} cannot be reached "
                f"({type(error).__name__}: {error}), but one that answers is expected; start it or "
                "correct the address."
            ) from error

    def each(self, call: Callable[[T], Any], values: Sequence[T]) -> list[Any]:
        """Call `call` with each value, at most `concurrency` at once; the first error is raised."""
        with ThreadPoolExecutor(self.concurrency, thread_name_prefix=self.reward) as pool:
            calls = [pool.submit(call, value) for value in values]
            try:
                return [future.result() for future in calls]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _read(self, response: Any) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            # 403 may come of a proxy or of rights that the token does not give.
            refusal = "refuses the token" if self.has_token else "asks for a token"
            if status == 403:
                refusal = "refuses access with" if self.has_token else "refuses access without"
                refusal += " a token"
            raise RewardError(
                f"the server {self.url} of reward {self.reward!r} {refusal} "
                f"({status}: {_detail(response)}), but one that lets requests pass is expected; "
                f"set FLOWGRPO_REWARD_{self.reward.upper()}_TOKEN or the option token."
            )
        if status == 413:
            raise RewardError(
                f"the server {self.url} of reward {self.reward!r} finds a request too large "
                f"({_detail(response)}); lower the option batch_size or raise the server's limit."
            )
        if not response.is_success:
            raise RewardError(
                f"the server {self.url} of reward {self.reward!r} refuses the request with status "
                f"{status} ({_detail(response)}); check the address, the protocol and the prompts."
            )
        try:
            reply = response.json()
        # A nesting of thousands is a RecursionError.
        except (ValueError, RecursionError):
            reply = None
        if not isinstance(reply, dict):
            raise ReplyError(
                f"the server {self.url} of reward {self.reward!r} answered {response.text[:80]!r}, "
                "but a JSON object is expected; check that the address is that of a reward server."
            )
        return reply


def _check_address(httpx: Any, reward: str, url: str) -> None:
    """Raise RewardError unless `url` is the address of a web server."""
    reason = ""
    try:
        address = httpx.URL(url)
        # As the socket does it, which raises where a name is empty or too long.
        address.host.encode("idna")
        if address.scheme not in ("http", "https"):
            reason = "one that begins with http:// or https://"
        elif not address.host:
            reason = "one with a host, such as http://127.0.0.1:8400,"
        elif (address.port or 0) >= 2**16:
            reason = "a port below 65536"
    # UnicodeError: a host that is no name.
    except (httpx.InvalidURL, ValueError) as error:
        reason = f"one that can be read ({error})"
    if reason:
        raise RewardError(
            f"the address of reward {reward!r} is {url!r}, but {reason} is expected; set "
            f"FLOWGRPO_REWARD_{reward.upper()}_URL or the option url."
        )


def _detail(response: Any) -> str:
    """Read the server's account of an error, on one line."""
    try:
        reply = response.json()
        detail = reply.get("detail") or reply.get("error") or reply
    except (ValueError, AttributeError, RecursionError):
        detail = response.text or response.reason_phrase
    return " ".join(str(detail).split())[:300]


def _retry_after(response: Any, default: float) -> float:
    """Read the seconds of the header Retry-After."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return default
