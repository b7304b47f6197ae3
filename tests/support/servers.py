"""Real web servers on 127.0.0.1 for the tests: uvicorn in a thread of its own."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from typing import Any

from flowgrpo.rewards.remote.serve import bind


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of `app` while it runs."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    with bind("127.0.0.1", 0) as sock:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


class Answers:
    """An ASGI application that gives prepared answers in turn, the last one for ever, and keeps
    what it is sent: (headers, body) of each request."""

    def __init__(self, *answers: tuple[int, bytes] | tuple[int, bytes, dict[str, str]]) -> None:
        self.answers, self.requests, self.paths = list(answers), [], []
        self.active = self.most = 0
        self.delay = 0.0
        self._lock = threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        import asyncio

        if scope["type"] != "http":
            raise NotImplementedError
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        with self._lock:
            self.active += 1
            self.most = max(self.most, self.active)
            self.paths.append(scope["path"])
            self.requests.append(({k.decode(): v.decode() for k, v in scope["headers"]}, body))
            answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        await asyncio.sleep(self.delay)
        status, content, *headers = answer
        headers = [(k.encode(), v.encode()) for k, v in (headers[0] if headers else {}).items()]
        start = {"type": "http.response.start", "status": status, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": content})
        with self._lock:
            self.active -= 1
