"""Serve a reward to other machines, by the protocol of flowgrpo.rewards.remote.http.

    POST /score     {"images": [base64 PNG], "prompts": [...], "metadata": [...]}
                    -> {"scores": [...]}
    GET  /health    {"reward": name, "frames": whether it judges videos}
    GET  /docs      the OpenAPI page

With a token every request to /score must carry it; without one the server listens on the loopback
interface only. Requests that are too long, or do not tell their length, are refused before they are
read, and what still comes of them is dropped; images and pixels are limited before anything is
decompressed. One batch is scored at a time. A score that is not finite leaves as null. Nothing that
arrives is ever executed or unpickled.
"""

# No `from __future__ import annotations`: FastAPI reads the annotations of functions inside `app`.

import asyncio
import contextlib
import hmac
import ipaddress
import json
import logging
import math
import os
import socket
import threading
from typing import Any

import torch

from flowgrpo.records import without_nulls
from flowgrpo.rewards import Reward, RewardError, load
from flowgrpo.rewards.frames import takes_videos
from flowgrpo.rewards.images import from_png
from flowgrpo.rewards.options import library
from flowgrpo.rewards.scorer import call_users

log = logging.getLogger("flowgrpo")

MAX_BYTES = 256 * 2**20
MAX_IMAGES = 256
MAX_PIXELS = 4096 * 4096
INSTALL = "'flowgrpo[serve]'"

LINGER = 5.0
"""Seconds for which a refused request is still read and dropped: a connection that is closed over
unread bytes is reset, and its client sees that in place of the answer."""


def serve(
    name: str,
    host: str = "127.0.0.1",
    port: int = 8400,
    token: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_images: int = MAX_IMAGES,
) -> None:
    """Serve the reward `name` until interrupted.

    token: default, the environment variable FLOWGRPO_SERVE_TOKEN, which no process list shows.

    Raises:
        RewardError: the reward is unknown or cannot be built, `host` is not the loopback interface
            and there is no token, or the port is taken.
    """
    uvicorn = library("uvicorn", name, INSTALL)
    token = token or os.environ.get("FLOWGRPO_SERVE_TOKEN")
    if not token and not is_loopback(host):
        raise RewardError(
            f"the reward server is to listen on {host} without a token, but without one it listens "
            "on 127.0.0.1 only; give a token or set FLOWGRPO_SERVE_TOKEN."
        )
    reward = load(name)
    application = app(reward, name, token=token, max_bytes=max_bytes, max_images=max_images)
    with bind(host, port) as sock:
        # Models are loaded before the first request, so that a missing one shows at once.
        if hasattr(reward, "build"):
            call_users(reward.build, name, "be built")
        address = f"[{host}]" if ":" in host else host
        print(f"reward {name!r} on http://{address}:{sock.getsockname()[1]}/score", flush=True)
        # Nothing is to be done before and after; its task would answer Ctrl-C with a traceback.
        settings = uvicorn.Config(application, log_level="warning", lifespan="off")
        with contextlib.suppress(KeyboardInterrupt):
            uvicorn.Server(settings).run(sockets=[sock])


def bind(host: str, port: int) -> socket.socket:
    """Open a listening socket; port 0 takes a free one."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    # A port that is no port is an OverflowError, and a host that is no name a TypeError.
    except (OSError, OverflowError, TypeError, ValueError) as error:
        raise RewardError(
            f"the reward server cannot listen on {host} port {port} ({error}); choose another port "
            "or address."
        ) from error


def is_loopback(host: str) -> bool:
    """Tell whether only this machine reaches `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def app(
    reward: Reward,
    name: str,
    *,
    token: str | None = None,
    max_bytes: int = MAX_BYTES,
    max_images: int = MAX_IMAGES,
    max_pixels: int = MAX_PIXELS,
) -> Any:
    """Build the ASGI application."""
    fastapi = library("fastapi", name, INSTALL)
    from fastapi.exceptions import RequestValidationError
    from fastapi.security import HTTPBearer
    from pydantic import BaseModel, Field

    class Request(BaseModel):
        """One prompt and one metadata for each image; all images of one size."""

        images: list[str] = Field(min_length=1, max_length=max_images, description="base64 PNG")
        prompts: list[str]
        metadata: list[dict[str, Any]]
        frames: list[list[str]] | None = Field(
            default=None,
            description="base64 PNG of each frame of each video, whose middle frames `images` are; "
            "read by rewards of videos alone",
        )

    class Reply(BaseModel):
        """One score for each image; null where the reward gave no finite number."""

        scores: list[float | None]

    api = fastapi.FastAPI(title=f"flowgrpo reward {name}", version="1")
    lock = threading.Lock()
    # AuthMiddleware checks the token; this shows it on the OpenAPI page.
    documented = [fastapi.Depends(HTTPBearer(auto_error=False))] if token else []

    @api.exception_handler(RequestValidationError)
    def refuse(request: Any, error: RequestValidationError) -> Any:
        # FastAPI's own answer has the input in it, which may be long, and no UTF-8.
        problems = [{name: e[name] for name in ("type", "loc", "msg")} for e in error.errors()]
        body = json.dumps({"detail": problems})
        return fastapi.Response(body, 422, media_type="application/json")

    @api.get("/health")
    def health() -> dict[str, str | bool]:
        return {"reward": name, "frames": takes_videos(reward)}

    @api.post("/score", dependencies=documented)
    def score(request: Request) -> Reply:
        if takes_videos(reward):
            images = _videos(fastapi, request, name, max_images, max_pixels)
        else:
            images = _images(fastapi, request, max_pixels)
        try:
            with lock:
                metadata = [without_nulls(entry) for entry in request.metadata]
                scores = reward(images, request.prompts, metadata)
            values = torch.as_tensor(scores, dtype=torch.float64, device="cpu")
        # A reward may raise anything, sys.exit too: the client hears what, and the server goes on.
        except (Exception, SystemExit) as error:
            log.exception("reward %r failed", name)
            # Metadata may hold a lone surrogate, and the message the metadata.
            reason = str(error).encode("utf-8", "backslashreplace").decode()
            raise fastapi.HTTPException(500, f"{type(error).__name__}: {reason}") from error
        if values.shape != (len(images),):
            problem = f"the reward returned scores of shape {tuple(values.shape)}"
            raise fastapi.HTTPException(500, f"{problem} for {len(images)} images")
        return Reply(scores=[v if math.isfinite(v) else None for v in values.tolist()])

    return AuthMiddleware(api, token, max_bytes)


class AuthMiddleware:
    """ASGI middleware in front of /score: token and length, before the body is read."""

    def __init__(self, application: Any, token: str | None, max_bytes: int) -> None:
        self.application, self.max_bytes = application, max_bytes
        self.expected = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Let the request pass, or answer it."""
        refusal = None
        if scope["type"] == "http" and scope["method"] == "POST":
            refusal = self._refusal(dict(scope["headers"]))
        if refusal is None:
            await self.application(scope, receive, send)
            return
        status, detail = refusal
        body = json.dumps({"detail": detail}).encode()
        headers = [(b"content-type", b"application/json"), (b"connection", b"close")]
        headers.append((b"content-length", str(len(body)).encode()))
        if status == 401:
            headers.append((b"www-authenticate", b"Bearer"))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_drop(receive), LINGER)
        await send({"type": "http.response.body", "body": b""})

    def _refusal(self, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        authorization = headers.get(b"authorization", b"")
        if self.expected and not hmac.compare_digest(authorization, self.expected):
            return 401, "the bearer token is missing or wrong"
        if b"content-length" not in headers:
            return 411, "the request has no Content-Length"
        # The web server below has refused a length that is no number.
        if int(headers[b"content-length"]) > self.max_bytes:
            return 413, f"the request is longer than {self.max_bytes} bytes"
        return None


async def _drop(receive: Any) -> None:
    """Read the rest of a request and discard it."""
    while (await receive()).get("more_body", False):
        pass


def _images(fastapi: Any, request: Any, max_pixels: int) -> torch.Tensor:
    """Decode the images of a request, uint8 [B, 3, H, W]; status 422 if that fails."""
    counts = {len(request.images), len(request.prompts), len(request.metadata)}
    if len(counts) > 1:
        raise fastapi.HTTPException(422, "images, prompts and metadata differ in number")
    return _decoded(fastapi, request.images, "image", max_pixels)


def _videos(
    fastapi: Any, request: Any, name: str, max_images: int, max_pixels: int
) -> torch.Tensor:
    """Decode the videos of a request, uint8 [B, F, 3, H, W]; status 422 if that fails."""
    if request.frames is None:
        problem = f"the reward {name!r} judges videos, but the request has no frames; set the"
        raise fastapi.HTTPException(422, f"{problem} option frames of reward http to true")
    counts = {len(request.frames), len(request.prompts), len(request.metadata)}
    if len(counts) > 1:
        raise fastapi.HTTPException(422, "frames, prompts and metadata differ in number")
    lengths = {len(video) for video in request.frames}
    if len(lengths) > 1 or 0 in lengths:
        raise fastapi.HTTPException(422, "videos differ in their number of frames, or have none")
    frames = [frame for video in request.frames for frame in video]
    if len(frames) > max_images:
        problem = f"there are {len(frames)} frames, but at most {max_images} are allowed"
        raise fastapi.HTTPException(422, f"{problem}; lower the option batch_size")
    decoded = _decoded(fastapi, frames, "frame", max_pixels)
    return decoded.view(len(request.frames), -1, *decoded.shape[1:])


def _decoded(fastapi: Any, texts: list[str], kind: str, max_pixels: int) -> torch.Tensor:
    """Decode PNG files of one size, uint8 [N, 3, H, W]; status 422 if that fails."""
    images = []
    for number, text in enumerate(texts):
        try:
            images.append(from_png(text, max_pixels))
        except ValueError as error:
            raise fastapi.HTTPException(422, f"{kind} {number}: {error}") from error
        if images[-1].shape != images[0].shape:
            raise fastapi.HTTPException(422, f"{kind} {number} has another size than {kind} 0")
    return torch.stack(images)
