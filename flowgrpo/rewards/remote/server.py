"""One address that takes JSON by POST, with bearer token and time-outs; a request is one try.

What may pass by itself (no connection, time-out, 408, 429, 500, 502, 503, 504) raises
UnavailableError, and an answer that is none of the protocol ReplyError: another server, or another
time, may do better (servers.py). What will not pass (token refused, wrong address, request refused)
raises RewardError, which ends the run.
"""

from __future__ import annotations

from typing import Any

from flowgrpo.rewards.interface import RemoteError as RemoteError
from flowgrpo.rewards.interface import ReplyError, RewardError
from flowgrpo.rewards.options import check_numbers, library

PASSING = (408, 429, 500, 502, 503, 504)
"""Statuses of a request that may pass another time."""
AWAY = (502, 503, 504)
"""Statuses by which a server, or a proxy in front of it, says that it does not serve."""
LOOK = 10.0
"""Seconds for a connection, and for an answer whether a server is there, at most."""
KEEP = 4.0
"""Seconds that an idle connection is kept: less than the 5 after which uvicorn closes it."""


class UnavailableError(RemoteError):
    """A server did not do a request, for a reason that may pass.

    `reason`: what it said, "answered 503 (...)". `retry_after`: seconds that it asks for, or None.
    """

    def __init__(self, message: str, reason: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason, self.retry_after = reason, retry_after


class Server:
    """One address that takes JSON by POST."""

    def __init__(
        self,
        reward: str,
        url: str,
        *,
        token: str | None = None,
        timeout: float = 60.0,
        concurrency: int = 8,
        health: str = "health",
    ) -> None:
        """concurrency: connections at once. health: where GET says if it serves, from `url`."""
        httpx = library("httpx", reward)
        _check_address(httpx, reward, url)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise RewardError(
                f"the token of reward {reward!r} has characters beside those of ASCII that are "
                f"printed, but a header takes no others; set FLOWGRPO_REWARD_{reward.upper()}_TOKEN"
                " to the token alone, without a line break."
            )
        check_numbers(reward, {"timeout": timeout, "concurrency": concurrency})
        self.reward, self.url, self.timeout = reward, url, timeout
        self.has_token = bool(token)
        self._health = httpx.URL(url).join(health)
        self._failures = httpx.RequestError
        try:
            self._client = httpx.Client(
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx.Timeout(timeout, connect=min(timeout, LOOK)),
                # One more, so that a look at it never waits for requests that hang.
                limits=httpx.Limits(max_connections=concurrency + 1, keepalive_expiry=KEEP),
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
            UnavailableError: no answer, or one of `PASSING`.
            ReplyError: the answer is no JSON object.
            RewardError: the server refuses the request or the token.
        """
        try:
            response = self._client.post(self.url, json=payload)
        except self._failures as error:
            raise self._unavailable(_no_answer(error)) from error
        if response.status_code in PASSING:
            raise self._unavailable(_answered(response), _retry_after(response))
        return self._read(response)

    def look(self) -> str:
        """Ask if it serves, without a request; return the name of its reward, "" if it has none.

        Any answer but those of `AWAY` counts: the protocol does not ask for a place of health.

        Raises:
            UnavailableError: it does not serve.
        """
        try:
            response = self._client.get(self._health, timeout=min(self.timeout, LOOK))
        except self._failures as error:
            raise self._unavailable(_no_answer(error)) from error
        if response.status_code in AWAY:
            raise self._unavailable(_answered(response), _retry_after(response))
        try:
            name = response.json().get("reward")
        except (ValueError, AttributeError, RecursionError):
            name = None
        return name if response.is_success and isinstance(name, str) else ""

    def _unavailable(self, reason: str, retry_after: float | None = None) -> UnavailableError:
        message = f"the server {self.url} of reward {self.reward!r} {reason}; see what it logs."
        return UnavailableError(message, reason, retry_after)

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
                "but a JSON object is expected; check that the address is that of a reward server.",
                f"answered {response.text[:80]!r}",
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


def _no_answer(error: Exception) -> str:
    return f"gave no answer ({type(error).__name__}: {error})"


def _answered(response: Any) -> str:
    return f"answered {response.status_code} ({_detail(response)})"


def _detail(response: Any) -> str:
    """Read the server's account of an error, on one line."""
    try:
        reply = response.json()
        detail = reply.get("detail") or reply.get("error") or reply
    except (ValueError, AttributeError, RecursionError):
        detail = response.text or response.reason_phrase
    return " ".join(str(detail).split())[:300]


def _retry_after(response: Any) -> float | None:
    """Read the seconds of the header Retry-After; None without one."""
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None
