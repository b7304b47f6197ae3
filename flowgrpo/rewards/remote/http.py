"""Any reward behind an address.

    POST url    Authorization: Bearer TOKEN
    {"images": [base64 of a PNG file, ...], "prompts": [text, ...], "metadata": [{...}, ...]}
    -> {"scores": [number, ...]}

one prompt, metadata and score for each image, all images of one size. PNG keeps every bit, and JSON
runs nothing on either side. With the option `frames` a request of videos has one key more,

    "frames": [[base64 of a PNG file, ... of each frame], ... for each video]

and "images" are their middle frames, so that a server of images scores them as before. Without the
option such a server gets the frames of reward.frames as images.

`flowgrpo.rewards.remote.serve` is the other end for any reward of this package. An address without
a path gets /score. Several addresses with commas between them are servers of one reward that share
the requests (servers.py); GET of `health` beside the path says whether one serves, and in
{"reward": name} which reward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from flowgrpo.rewards.frames import is_video, positions
from flowgrpo.rewards.images import to_png
from flowgrpo.rewards.interface import ReplyError, RewardError
from flowgrpo.rewards.options import check_numbers, configurable
from flowgrpo.rewards.remote.server import RemoteError, Server
from flowgrpo.rewards.remote.servers import Servers, addresses


@configurable("http", frames="frames")
def score(
    *,
    url: str = "",
    token: str | None = None,
    batch_size: int = 16,
    concurrency: int = 4,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 0.5,
    wait: float = 300.0,
    tolerance: float = 1e-3,
    offset: int = 0,
    frames: bool = False,
):
    """Build a remote reward: `batch_size` images a request, `concurrency` requests to a server.

    frames: send whole videos; a request has as many as come to `batch_size` images, at least one.
    url: one address, or several with commas between them. retries, backoff, wait, tolerance and
    offset: see servers.py.
    """
    check_numbers("http", positive={"batch_size": batch_size})

    def score_one(server: Server, image: Tensor, prompt: str, metadata: dict[str, Any]) -> float:
        return score_batch(server, image[None], [prompt], [metadata], finite=False)[0]

    servers = Servers(
        "http",
        [_with_path(address) for address in addresses(url)],
        score_one,
        token=token,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        concurrency=concurrency,
        wait=wait,
        tolerance=tolerance,
        offset=offset,
    )

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        size = max(batch_size // images.shape[1], 1) if frames else batch_size

        def ask(server: Server, start: int) -> list[float]:
            rows = slice(start, start + size)
            return score_batch(server, images[rows], prompts[rows], metadata[rows])

        servers.compare_by_first(images, prompts, metadata)
        batches = servers.each(ask, range(0, len(images), size))
        return [value for values in batches for value in values]

    rate.reach, rate.servers = servers.reach, servers
    return rate


def score_batch(
    server: Server,
    images: Tensor,
    prompts: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    finite: bool = True,
) -> list[float]:
    """Score images, uint8 [b, 3, H, W], or videos, uint8 [b, F, 3, H, W], by one request; see
    `scores_in`."""
    payload: dict[str, Any] = {"prompts": list(prompts), "metadata": list(metadata)}
    if is_video(images):
        (middle,) = positions(images.shape[1], 1)
        payload["frames"] = [[to_png(frame) for frame in video] for video in images]
        payload["images"] = [video[middle] for video in payload["frames"]]
    else:
        payload["images"] = [to_png(image) for image in images]
    return scores_in(server, server.post(payload), len(images), finite)


def scores_in(
    server: Server, reply: dict[str, Any], count: int, finite: bool = True
) -> list[float]:
    """Read the scores of a reply; with `finite` False NaN for those that are no finite numbers.

    Raises:
        RewardError: there are not `count` of them.
        RemoteError: there are none, or some are no finite numbers.
    """
    scores = reply.get("scores")
    where = f"the server {server.url} of reward {server.reward!r}"
    if not isinstance(scores, list):
        raise ReplyError(
            f"{where} answered {str(reply)[:80]!r}, but a list under the key 'scores' is expected; "
            "correct the server.",
            f"answered {str(reply)[:80]!r}",
        )
    if len(scores) != count:
        raise RewardError(
            f"{where} returned {len(scores)} scores for {count} images, but one for each image is "
            "expected; correct the server."
        )
    bad = [i for i, value in enumerate(scores) if not _finite(value)]
    if bad and finite:
        raise RemoteError(
            f"{where} returned {scores[bad[0]]!r} for {len(bad)} of {count} images, but finite "
            "numbers are expected; correct the server."
        )
    return [math.nan if i in bad else float(value) for i, value in enumerate(scores)]


def _with_path(url: str) -> str:
    """Add /score to an address without a path."""
    # One that cannot be read is refused by Server.
    with suppress(ValueError):
        if url and not urlsplit(url).path.strip("/"):
            return urlsplit(url)._replace(path="/score").geturl()
    return url


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return number and math.isfinite(value)
    # An integer above the range of float64.
    except OverflowError:
        return False
