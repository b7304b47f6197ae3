"""The reward server, by real HTTP: protocol, token, limits, and what it refuses."""

import base64
import http.client
import io
import json
import pickle
import re
import signal
import socket
import sys
import time
import urllib.request
from contextlib import suppress
from functools import partial

import pytest
import torch
from PIL import Image

from flowgrpo.rewards import RewardError, load
from flowgrpo.rewards.images import to_png
from flowgrpo.rewards.options import configurable
from flowgrpo.rewards.remote import serve as server
from flowgrpo.rewards.remote.serve import app, bind, is_loopback, serve
from support import processes
from support.servers import running

pytest.importorskip("fastapi")

IMAGES = torch.randint(0, 256, (3, 3, 16, 24), dtype=torch.uint8)


def body(**changes):
    full = {
        "images": [to_png(image) for image in IMAGES],
        "prompts": ["a", "b", "c"],
        "metadata": [{"n": i} for i in range(3)],
    }
    return json.dumps({**full, **changes}).encode()


def post(url, data, **headers):
    """(status, JSON) of a POST by the standard library."""
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request("POST", "/score", data, {"content-type": "application/json", **headers})
    response = connection.getresponse()
    return response.status, json.loads(response.read() or b"null")


def means(images, prompts, metadata):
    return images.double().mean(dim=(1, 2, 3))


def test_scores_equal_the_local_reward():
    with running(app(means, "means")) as url:
        status, reply = post(url, body())
        assert (status, reply) == (200, {"scores": means(IMAGES, [], []).tolist()})
        remote = load("http").configured(url=url)
        assert remote(IMAGES, ["a", "b", "c"], [{}] * 3) == reply["scores"]
        with urllib.request.urlopen(url + "/health") as response:
            assert json.load(response) == {"reward": "means", "frames": False}
        with urllib.request.urlopen(url + "/docs") as response:
            assert b"swagger" in response.read().lower()
        with urllib.request.urlopen(url + "/openapi.json") as response:
            assert "/score" in json.load(response)["paths"]


def test_the_token_is_required():
    with running(app(means, "means", token="s3cret")) as url:
        for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            assert post(url, body(), **given)[0] == 401
        assert post(url, body(), authorization="Bearer s3cret")[0] == 200
        nothing = [{}] * 3
        with pytest.raises(RewardError, match="refuses the token"):
            load("http").configured(url=url, token="other")(IMAGES, ["a"] * 3, nothing)
        remote = load("http").configured(url=url, token="s3cret")
        assert len(remote(IMAGES, ["a"] * 3, nothing)) == 3


def test_limits():
    with running(app(means, "means", max_bytes=20_000, max_images=2)) as url:
        assert post(url, b"x" * 20_001)[0] == 413
        # Longer than what lies in buffers: the client is still sending when it is refused.
        assert post(url, b"x" * 5_000_000)[0] == 413
        status, reply = post(url, body())
        assert status == 422
        assert "at most 2" in str(reply)
        # A request that does not tell its length is refused before it is read.
        assert post(url, iter([body()]), **{"transfer-encoding": "chunked"})[0] == 411
        with pytest.raises(RewardError, match="lower the option batch_size"):
            big = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
            load("http").configured(url=url)(big, ["a", "b"], [{}, {}])
    with running(app(means, "means", max_pixels=16 * 24 - 1)) as url:
        status, reply = post(url, body())
        assert (status, reply["detail"]) == (
            422,
            "image 0: 24 x 16 pixels, but at most 383 are allowed",
        )


def test_a_refused_request_that_does_not_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "LINGER", 0.2)
    head = b"POST /score HTTP/1.1\r\nhost: x\r\ncontent-length: 20001\r\n\r\n"
    with running(app(means, "means", max_bytes=20_000)) as url:
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=20) as client:
            client.sendall(head + b"x")
            got = b"".join(iter(lambda: client.recv(4096), b""))
    assert got.startswith(b"HTTP/1.1 413 ") and got.endswith(b'longer than 20000 bytes"}')


def bomb():
    """A small PNG file of 20000 x 20000 pixels."""
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def jpeg():
    buffer = io.BytesIO()
    Image.new("RGB", (24, 16)).save(buffer, format="JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize(
    ("changes", "detail"),
    [
        ({"prompts": ["a"]}, "differ in number"),
        ({"images": []}, "at least 1"),
        ({"images": ["???"] * 3}, "image 0: not base64 of a PNG"),
        ({"images": [jpeg()] * 3}, "image 0: not base64 of a PNG"),
        ({"images": [bomb()] * 3}, "are allowed"),
        ({"images": [base64.b64encode(pickle.dumps([1])).decode()] * 3}, "image 0: not base64"),
        (
            {"images": [to_png(IMAGES[0]), to_png(IMAGES[0, :, :8]), "x"]},
            "image 1 has another size",
        ),
        ({"metadata": "none"}, "valid list"),
    ],
)
def test_requests_that_make_no_sense(changes, detail):
    with running(app(means, "means")) as url:
        status, reply = post(url, body(**changes))
        assert status == 422
        assert detail in str(reply)
        # The server goes on.
        assert post(url, body())[0] == 200
        assert post(url, pickle.dumps({"images": []}))[0] in (400, 422)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"\x80" * 10_000, "text/plain"),
        (b'{"images": ["a"], "prompts": {"\\ud800": 1}, "metadata": [{}]}', "application/json"),
        (json.dumps({"images": "a" * 10_000}).encode(), "application/json"),
    ],
)
def test_what_is_refused_is_not_sent_back(data, kind):
    with running(app(means, "means")) as url:
        status, reply = post(url, data, **{"content-type": kind})
        assert status == 422 and len(json.dumps(reply)) < 1000
        assert {"type", "loc", "msg"} == set(reply["detail"][0])


@pytest.mark.parametrize(
    ("reward", "detail"),
    [
        (lambda i, p, m: 1 / 0, "ZeroDivisionError"),
        (lambda i, p, m: [1.0], "shape (1,) for 3 images"),
        (lambda i, p, m: RewardError, "Error"),
        (lambda i, p, m: sys.exit("enough"), "SystemExit: enough"),
        # A lone surrogate, which a prompt set may hold, is no UTF-8.
        (lambda i, p, m: {}["\ud800"], "ud800"),
    ],
)
def test_a_reward_that_fails(reward, detail):
    with running(app(reward, "bad")) as url:
        status, reply = post(url, body())
        assert status == 500
        assert detail in str(reply)


def test_scores_that_are_not_finite_leave_as_null():
    values = [1.0, float("nan"), float("inf")]
    with running(app(lambda i, p, m: values, "bad")) as url:
        assert post(url, body()) == (200, {"scores": [1.0, None, None]})


def test_null_is_absent_in_metadata():
    """As a caller in another language may send it; rewards look for keys."""

    def keys(images, prompts, metadata):
        return [len(entry) + len(entry["include"][0]) for entry in metadata]

    entry = {"exclude": None, "include": [{"class": "dog", "color": None}]}
    with running(app(keys, "keys")) as url:
        assert post(url, body(metadata=[entry] * 3)) == (200, {"scores": [2.0] * 3})


def test_without_a_token_only_the_loopback_interface():
    with pytest.raises(RewardError, match=r"listen on 0\.0\.0\.0 without a token"):
        serve("jpeg_compressibility", host="0.0.0.0")
    hosts = {"127.0.0.1": True, "localhost": True, "::1": True, "0.0.0.0": False, "::": False}
    assert {host: is_loopback(host) for host in hosts} == hosts
    assert not is_loopback("example.org")


@configurable("broken")
def broken(*, path: str = "there"):
    sys.exit(f"no {path}")


def test_a_reward_of_the_users_that_cannot_be_built_is_one_sentence():
    with pytest.raises(RewardError, match=r"cannot be built \(SystemExit: no there"):
        serve(f"{__name__}:broken", port=0)


def test_errors_before_it_listens():
    with pytest.raises(RewardError, match="reward 'beauty' is unknown"):
        serve("beauty")
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(RewardError, match=f"port {port} .*choose another"):
            serve("jpeg_compressibility", port=port)


@pytest.mark.slow
def test_serve_in_a_process_of_its_own(tmp_path):
    """It tells its address, which with port 0 nobody else knows."""
    served = processes.Fork(tmp_path / "log", partial(serve, port=0), "jpeg_compressibility")
    try:
        deadline, status = time.monotonic() + 120, 0
        while not status:
            assert served.process.is_alive() and time.monotonic() < deadline
            time.sleep(0.02)
            told = served.log.read_text() if served.log.exists() else ""
            url = re.fullmatch(r".*'jpeg_compressibility' on (http://[\d.]+:\d+)/score\n", told)
            if url:
                with suppress(ConnectionError):
                    status, reply = post(url[1], body())
        local = load("jpeg_compressibility")(IMAGES, ["a"] * 3, [{}] * 3)
        assert (status, reply["scores"]) == (200, local)
    finally:
        served.kill(signal.SIGINT)
    # Ctrl-C is how it ends, and nothing more is said.
    assert served.wait() == told
