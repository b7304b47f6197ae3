"""Videos over HTTP, by real servers: whole, as frames, and to a server that knows images alone."""

from __future__ import annotations

import json

import pytest
import torch

from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load
from flowgrpo.rewards.images import from_png
from flowgrpo.rewards.motion import smoothness
from flowgrpo.rewards.remote.serve import app
from support.servers import Answers, running

httpx, _ = pytest.importorskip("httpx"), pytest.importorskip("fastapi")

VIDEOS = torch.randint(
    0, 256, (3, 5, 3, 8, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
PROMPTS = Prompts.of(["a", "b", "c"])
TEXTS, NOTHING = ["a", "b", "c"], [{}] * 3


def means(images, prompts, metadata):
    return images.double().mean(dim=(1, 2, 3))


def test_a_served_reward_of_videos_is_the_local_one():
    with running(app(smoothness, "motion_smoothness")) as url:
        # Ten images a request are two videos.
        options = {"http": {"url": url, "frames": "true", "batch_size": "10"}}
        scorer = Scorer({"http": 1.0}, options=options)
        scorer.try_out(PROMPTS, torch.zeros(5, 3, 8, 6, dtype=torch.uint8))
        found = scorer.score_each(VIDEOS, PROMPTS, 1)["http"]
        assert found.tolist() == smoothness(VIDEOS, TEXTS, NOTHING)
        # Frames that are sent as images are no videos, and the answer says what to do.
        with pytest.raises(RewardError, match=r"422 .*judges videos, but the request has no frame"):
            load("http").configured(url=url)(VIDEOS[:, 0], TEXTS, NOTHING)
        for frames, problem in (
            ([["x"]] * 3, "frame 0: not base64"),
            ([["x"]] * 2, "frames, prompts and metadata differ"),
            ([["x"], ["x", "x"], ["x"]], "videos differ in their number of frames"),
            ([[]] * 3, "or have none"),
        ):
            request = {"images": ["x"] * 3, "prompts": TEXTS, "metadata": NOTHING, "frames": frames}
            reply = httpx.post(url + "/score", json=request)
            assert reply.status_code == 422 and problem in reply.json()["detail"]
    with running(app(smoothness, "motion_smoothness", max_images=14)) as url:
        remote = load("http").configured(url=url, frames=True)
        with pytest.raises(RewardError, match=r"there are 15 frames, but at most 14 .*batch_size"):
            remote(VIDEOS, TEXTS, NOTHING)


def test_what_is_sent_and_what_a_server_of_images_makes_of_it():
    answers = Answers((200, b'{"scores": [1, 2, 3]}'))
    with running(answers) as url:
        assert load("http").configured(url=url, frames=True)(VIDEOS, TEXTS, NOTHING) == [1, 2, 3]
    [(_, sent)] = answers.requests
    sent = json.loads(sent)
    frames = torch.stack([torch.stack(list(map(from_png, video))) for video in sent["frames"]])
    assert torch.equal(frames, VIDEOS)
    assert torch.equal(torch.stack(list(map(from_png, sent["images"]))), VIDEOS[:, 2])
    with running(app(means, "means")) as url:
        # It does not know the key, and scores the middle frames.
        whole = load("http").configured(url=url, frames=True)
        assert whole(VIDEOS, TEXTS, NOTHING) == means(VIDEOS[:, 2], [], []).tolist()
        # Without the option it gets images, of which the client takes the mean.
        scorer = Scorer({"http": 1.0}, options={"http": {"url": url}}, frames=2)
        found = scorer.score_each(VIDEOS, PROMPTS, 1)["http"]
        assert torch.equal(found, (means(VIDEOS[:, 1], 0, 0) + means(VIDEOS[:, 3], 0, 0)) / 2)


def test_servers_of_videos_are_compared_by_one():
    """A still picture would be perfectly smooth to both."""

    def other(videos, prompts, metadata):
        return [score / 2 for score in smoothness(videos, prompts, metadata)]

    other.frames = True
    with (
        running(app(smoothness, "motion_smoothness")) as first,
        running(app(other, "motion_smoothness")) as second,
    ):
        options = {"http": {"url": f"{first},{second}", "frames": "true"}}
        scorer = Scorer({"http": 1.0}, options=options)
        with pytest.raises(RewardError, match=r"scores a picture .* scores within 0\.001 are"):
            scorer.try_out(PROMPTS, torch.zeros(5, 3, 8, 6, dtype=torch.uint8))
