"""Any reward behind an address.

    POST url    Authorization: Bearer TOKEN
    {"images": [base64 of a PNG file, ...], "prompts": [text, ...], "metadata": [{...}, ...]}
    -> {"scores": [number, ...]}

one prompt, metadata and score for each image, all images of one size. PNG keeps every bit, and JSON
runs nothing on either side. `flowgrpo.rewards.remote.serve` is the other end for any reward of this
package. An address without a path gets /score.
"""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

from torch import Tensor

from flowgrpo.rewards.images import to_png
from flowgrpo.rewards.interface import ReplyError, RewardError
from flowgrpo.rewards.options import check_numbers, configurable
from flowgrpo.rewards.remote.server import RemoteError, Server


@configurable("http")
def score(
    *,
    url: str = "",
    token: str | None = None,
    batch_size: int = 16,
    concurrency: int = 4,
    timeout: float = 60.0,
    retries: int = 3,
    backoff: float = 0.5,
):
    """Build a remote reward: `batch_size` images a request, `concurrency` requests at once."""
    check_numbers("http", positive={"batch_size": batch_size})
    # One that cannot be read is refused by Server.
    with suppress(ValueError):
        if url and not urlsplit(url).path.strip("/"):
            url = urlsplit(url)._replace(path="/score").geturl()
    server = Server(
        "http",
        url,
        token=token,
        timeout=timeout,
        retries=retries,
        backoff=backoff,
        concurrency=concurrency,
    )

    def rate(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        def score_batch(start: int) -> list[float]:
            rows = slice(start, start + batch_size)
            payload = {
                "images": [to_png(image) for image in images[rows]],
                "prompts": list(prompts[rows]),
                "metadata": list(metadata[rows]),
            }
            return scores_in(server, server.post(payload), len(payload["images"]))

        batches = server.each(score_batch, range(0, len(images), batch_size))
        return [value for values in batches for value in values]

    rate.reach = server.reach
    return rate


def scores_in(server: Server, reply: dict[str, Any], count: int) -> list[float]:
    """Read the scores of a reply.

    Raises:
        RewardError: there are not `count` of them.
        RemoteError: there are none, or some are no finite numbers.
    """
    scores = reply.get("scores")
    where = f"the server {server.url} of reward {server.reward!r}"
    if not isinstance(scores, list):
        raise ReplyError(
            f"{where} answered {str(reply)[:80]!r}, but a list under the key 'scores' is expected; "
            "correct the server."
        )
    if len(scores) != count:
        raise RewardError(
            f"{where} returned {len(scores)} scores for {count} images, but one for each image is "
            "expected; correct the server."
        )
    bad = [i for i, value in enumerate(scores) if not _finite(value)]
    if bad:
        raise RemoteError(
            f"{where} returned {scores[bad[0]]!r} for {len(bad)} of {count} images, but finite "
            "numbers are expected; correct the server."
        )
    return [float(value) for value in scores]


def _finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    try:
        return number and math.isfinite(value)
    # An integer above the range of float64.
    except OverflowError:
        return False
