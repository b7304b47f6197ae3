"""The http reward against real servers: the protocol, and one clear sentence for each failure."""

import json
import socket
import time

import pytest
import torch

from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load
from flowgrpo.rewards.images import from_png
from flowgrpo.rewards.remote.server import RemoteError
from support.servers import Answers, running

IMAGES = torch.randint(0, 256, (5, 3, 16, 12), dtype=torch.uint8)
PROMPTS = ["one", "zwei", "trois", "τέσσερα", "five"]
METADATA = [{"tag": "colors", "n": i} for i in range(5)]


def ask(url, **options):
    fast = {"timeout": 5.0, "retries": 2, "backoff": 0.01, "batch_size": 5, "wait": 0.3}
    return load("http").configured(url=url, **{**fast, **options})(IMAGES, PROMPTS, METADATA)


def scores(*values):
    return 200, json.dumps({"scores": list(values)}).encode()


def test_what_is_sent():
    app = Answers(scores(1, 2.5, -3, 0, 1e-9))
    with running(app) as url:
        found = ask(url + "/my/path", token="s3cret")
    assert found == [1, 2.5, -3, 0, 1e-9]
    [(headers, body)] = app.requests
    assert headers["authorization"] == "Bearer s3cret"
    assert headers["content-type"] == "application/json"
    sent = json.loads(body)
    assert sent["prompts"] == PROMPTS
    assert sent["metadata"] == METADATA
    assert torch.equal(torch.stack([from_png(image) for image in sent["images"]]), IMAGES)


def test_batches_come_back_in_order_with_bounded_concurrency():
    class Counting(Answers):
        async def __call__(self, scope, receive, send):
            self.answers = [scores(0.0)]
            await super().__call__(scope, receive, send)

    app = Counting(scores(0.0))
    app.delay = 0.05
    with running(app) as url:
        ask(url, batch_size=1, concurrency=2)
    assert len(app.requests) == 5
    assert app.most == 2
    # Each request carries its own row.
    sent = sorted(json.loads(body)["metadata"][0]["n"] for _, body in app.requests)
    assert sent == list(range(5))


def test_order_is_kept():
    from flowgrpo.rewards.remote.serve import app

    with running(app(lambda images, p, metadata: [m["n"] for m in metadata], "n")) as url:
        assert ask(url, batch_size=2, concurrency=3) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("status", [500, 503, 429])
def test_passing_failures_are_tried_again(status):
    app = Answers((status, b"busy"), (status, b"busy", {"retry-after": "0"}), scores(*range(5)))
    with running(app) as url:
        assert ask(url) == [0, 1, 2, 3, 4]
    assert len(app.requests) == 3


def test_tries_are_bounded_and_back_off():
    app = Answers((503, b'{"detail": "out of memory"}'))
    with running(app) as url:
        started = time.monotonic()
        with pytest.raises(RemoteError, match=r"after 3 tries .*answered 503 \(out of memory\)"):
            ask(url, backoff=0.1)
    # 0.1 s, then 0.2 s.
    assert 0.3 <= time.monotonic() - started < 3
    assert len(app.requests) == 3
    assert app.looks == 2


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((401, b'{"detail": "wrong"}'), RewardError, "asks for a token .401: wrong"),
        ((403, b"no"), RewardError, "refuses access without a token .403: no"),
        ((404, b"<html>Not\nhere"), RewardError, "status 404 .*Not here.*check the address"),
        ((302, b"", {"location": "/elsewhere"}), RewardError, "status 302"),
        ((413, b"large"), RewardError, "lower the option batch_size"),
        ((422, b'{"detail": "bad prompts"}'), RewardError, "bad prompts"),
        ((200, b"hello"), RemoteError, "'hello', but a JSON object"),
        ((200, b"[1, 2]"), RemoteError, "but a JSON object"),
        ((200, b"[" * 100_000), RemoteError, "but a JSON object"),
        ((404, b"[" * 100_000), RewardError, r"status 404 \(\[\["),
        ((200, b'{"score": 1}'), RemoteError, "a list under the key 'scores'"),
        (scores(1, 2), RewardError, "2 scores for 5 images"),
        (scores(1, 2, 3, 4, float("nan")), RemoteError, "nan for 1 of 5 images"),
        (scores(1, None, None, 4, 5), RemoteError, "None for 2 of 5 images"),
        (scores(1, 10**400, 3, 4, 5), RemoteError, "0 for 1 of 5 images"),
        (scores(1, "2", 3, 4, True), RemoteError, "'2' for 2 of 5 images"),
    ],
)
def test_one_sentence_for_each_failure(answer, error, message):
    app = Answers(answer)
    with running(app) as url, pytest.raises(error, match=f"(?s){message}") as info:
        ask(url)
    assert "\n" not in str(info.value)
    assert url in str(info.value)
    # None of these passes by itself.
    assert len(app.requests) == 1


def test_a_slow_server_times_out():
    app = Answers(scores(*range(5)))
    app.delay = 0.6
    with running(app) as url, pytest.raises(RemoteError, match=r"gave no answer .ReadTimeout"):
        ask(url, timeout=0.2, retries=1)


def test_an_unreachable_server():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with pytest.raises(
        RewardError, match=rf"0\.3 s .{url}/score gave no answer .ConnectError.*start"
    ):
        ask(url)


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://there/score"])
def test_an_address_that_is_none(url):
    with pytest.raises(RewardError, match=r"begins with http://.*FLOWGRPO_REWARD_HTTP_URL"):
        ask(url)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://", "with a host"),
        ("http:///score", "with a host"),
        ("http://[::1", "that can be read"),
        ("http://there:port/score", "that can be read"),
        ("http://a\x00b", "that can be read"),
    ],
)
def test_an_address_that_cannot_be_read(url, words):
    with pytest.raises(RewardError, match=f"address of reward 'http' is .* one {words}") as error:
        ask(url)
    with pytest.raises(RewardError, match="but a port below 65536 is expected"):
        ask("http://there:99999")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("end", ["", "/", "/score"])
def test_an_address_without_a_path_gets_score(end):
    app = Answers((200, b'{"scores": [1, 1, 1, 1, 1]}'))
    with running(app) as url:
        assert ask(url.replace("http", "HTTP") + end) == [1.0] * 5
        assert app.paths == ["/score"]


def test_a_refusal_says_no_more_than_is_known():
    for status, words in ((401, "refuses the token"), (403, "refuses access with a token")):
        server = running(Answers((status, b"no")))
        with server as url, pytest.raises(RewardError, match=words):
            ask(url, token="t")


@pytest.mark.parametrize("token", ["t\n", "g\u00e9heim", "a\x00b", "a\tb"])
def test_a_token_that_no_header_takes(token):
    with pytest.raises(RewardError, match="the token of reward 'http' has characters") as error:
        ask("http://127.0.0.1:9", token=token)
    assert token not in str(error.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"retries": -1}, "retries of reward 'http' is -1, but it must be at least 0"),
        ({"concurrency": 0}, "concurrency of reward 'http' is 0, but it must be greater than 0"),
        ({"batch_size": 0}, "batch_size of reward 'http' is 0"),
        ({"timeout": 0.0}, "timeout of reward 'http' is 0.0"),
        ({"timeout": float("nan")}, "timeout of reward 'http' is nan"),
        ({"backoff": -1.0}, "backoff of reward 'http' is -1.0"),
        ({"wait": -1.0}, "wait of reward 'http' is -1.0"),
        ({"tolerance": float("nan")}, "tolerance of reward 'http' is nan"),
        ({"offset": -1}, "offset of reward 'http' is -1"),
    ],
)
def test_options_out_of_range(options, words):
    with pytest.raises(RewardError, match=words):
        ask("http://127.0.0.1:9", **options)


def test_a_proxy_that_is_none(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "ftp://proxy:3128")
    with pytest.raises(RewardError, match=r"cannot be set up .*; correct HTTP_PROXY") as error:
        ask("http://127.0.0.1:9")
    assert "\n" not in str(error.value)


def test_the_scorer_drops_the_group_that_keeps_failing(monkeypatch):
    """Through the trainer's scorer: one image of one group never gets a number."""
    from flowgrpo.rewards.remote.serve import app

    def reward(images, prompts, metadata):
        return [float("nan") if m["n"] == 3 else float(m["n"]) for m in metadata]

    with running(app(reward, "flaky")) as url:
        monkeypatch.setenv("FLOWGRPO_REWARD_HTTP_URL", url)
        monkeypatch.setattr("flowgrpo.rewards.remote.http.score._reward", None)
        scorer = Scorer({"http": 1.0}, retries=1)
        found = scorer(IMAGES.repeat(2, 1, 1, 1), Prompts.of(PROMPTS, METADATA), 2)
    assert found.dropped.tolist() == [False, False, False, True, False]
    assert found.total.view(5, 2)[[0, 1, 2, 4]].tolist() == [[0, 0], [1, 1], [2, 2], [4, 4]]
