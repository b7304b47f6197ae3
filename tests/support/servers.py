"""Real web servers on 127.0.0.1 for the tests: uvicorn in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest import mock

from flowgrpo.rewards.remote.serve import bind


@contextlib.contextmanager
def running(app: Any) -> Iterator[str]:
    """The address of `app` while it runs."""
    import uvicorn

    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds / 20)

    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    # It looks every tenth of a second if it is to end, and then waits for as long.
    impatient = SimpleNamespace(**{**vars(asyncio), "sleep": sleep})
    with mock.patch("uvicorn.server.asyncio", impatient), bind("127.0.0.1", 0) as sock:
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
    what it is sent: (headers, body) of each request. A GET, by which it is looked at, is counted in
    `looks` and answered 200."""

    def __init__(self, *answers: tuple[int, bytes] | tuple[int, bytes, dict[str, str]]) -> None:
        self.answers, self.requests, self.paths = list(answers), [], []
        self.active = self.most = self.looks = 0
        self.delay = 0.0
        self._lock = threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError
        if scope["method"] == "GET":
            self.looks += 1
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})
            return
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


class FaultyServer:
    """A reward server on the standard library that scores an image by `metadata["n"]` and can be
    told how to fail, by the functions `score` and `health`, of status, reply and perhaps headers,
    or None for no answer. `kill` cuts its connections, and `start` listens at the same address
    again."""

    def __init__(self, name: str = "n") -> None:
        self.name, self.port = name, 0
        self.requests: list[list[int]] = []
        """`metadata["n"]` of the images of each request."""
        self.looks: list[float] = []
        """Seconds of time.monotonic() at each GET."""
        self.active = self.most = 0
        self.score: Callable[[list[dict]], tuple | None] = self.right
        self.health: Callable[[], tuple | None] = lambda: (200, {"reward": self.name})
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def right(self, metadata: list[dict]) -> tuple[int, Any]:
        return 200, {"scores": [entry.get("n", 0.5) for entry in metadata]}

    def start(self) -> None:
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def setup(self):
                owner._open.add(self.request)
                super().setup()

            def finish(self):
                with contextlib.suppress(OSError):
                    super().finish()
                owner._open.discard(self.request)

            def do_GET(self):
                owner.looks.append(time.monotonic())
                self._answer(owner.health())

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with owner._lock:
                    metadata = body.get("metadata", [])
                    owner.requests.append([entry.get("n") for entry in metadata])
                    owner.active += 1
                    owner.most = max(owner.most, owner.active)
                try:
                    answer = owner.score(metadata)
                finally:
                    with owner._lock:
                        owner.active -= 1
                self._answer(answer)

            def _answer(self, answer):
                if answer is None:
                    # As a process does that ends.
                    return
                status, reply, *fields = answer
                data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    for name, value in dict(*fields).items():
                        self.send_header(name, value)
                    self.send_header("content-length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads, self._server.block_on_close = True, False
        self.port = self._server.server_port
        serve = self._server.serve_forever
        self._thread = threading.Thread(target=serve, kwargs={"poll_interval": 0.005}, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self.kill()

    def kill(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
