"""Several servers of one reward, against real servers that are killed, hang, flap and lie."""

import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, contextmanager

import pytest
import torch

from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load
from flowgrpo.rewards.images import comparison_picture
from flowgrpo.rewards.interface import RemoteError, ReplyError
from support.servers import FaultyServer

COUNT = 12
IMAGES = torch.arange(COUNT, dtype=torch.uint8).view(COUNT, 1, 1, 1).repeat(1, 3, 8, 8)
PROMPTS = [f"prompt {n}" for n in range(COUNT)]
METADATA = [{"n": n / 4} for n in range(COUNT)]
EXPECTED = [n / 4 for n in range(COUNT)]
# Time-outs that no server which is well comes near, on a machine that is busy too.
FAST = {"timeout": 30.0, "backoff": 0.05, "wait": 30.0, "batch_size": 1, "concurrency": 2}


@contextmanager
def servers(count):
    """`count` servers that work, to be told otherwise."""
    with ExitStack() as stack:
        started = [FaultyServer() for _ in range(count)]
        for server in started:
            stack.callback(server.kill)
        yield started


def remote(servers, **options):
    """The reward, built, as a run begins with it: its servers have been looked at, and compared by
    a picture that scores 0.5 everywhere and is not in their count."""
    url = ",".join(server.url for server in servers)
    reward = load("http").configured(url=url, **{**FAST, **options}).build()
    reward.reach()
    reward.servers.compare(comparison_picture(8, 8), "", {})
    for server in servers:
        server.requests.clear()
    return reward


def rate(reward, rows=slice(None)):
    return reward(IMAGES[rows], PROMPTS[rows], METADATA[rows])


def until(condition, seconds=30.0):
    """Wait for a condition that another thread brings about."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def counts(servers):
    return [len(server.requests) for server in servers]


# Dealing


@pytest.mark.parametrize("offset", [0, 1, 5])
def test_servers_take_turns_from_call_to_call(offset):
    with servers(3) as three:
        reward = remote(three, offset=offset)
        asked = []
        for _ in range(7):
            before = counts(three)
            rate(reward, slice(0, 1))
            changed = [a != b for a, b in zip(counts(three), before, strict=True)]
            asked.append(changed.index(True))
    assert asked == [(offset + n) % 3 for n in range(7)]


def test_scores_come_back_in_order_whichever_server_answered():
    def slowly(server, seed):
        draw = random.Random(seed)

        def score(metadata):
            time.sleep(draw.random() * 0.01)
            return server.right(metadata)

        return score

    with servers(3) as three:
        for seed, server in enumerate(three):
            server.score = slowly(server, seed)
        assert rate(remote(three)) == EXPECTED
        assert min(counts(three)) > 0 and sum(counts(three)) == COUNT
        # The chunks are those of one server, whose scores of an image may depend on the others.
        for some in (three[:1], three):
            reward = remote(some, batch_size=5)
            for server in three:
                server.requests.clear()
            assert rate(reward) == EXPECTED
            sent = sorted(request for server in some for request in server.requests)
            assert sent == [EXPECTED[0:5], EXPECTED[5:10], EXPECTED[10:]]


def test_requests_at_once_are_bounded_and_a_slow_server_gets_fewer():
    with servers(2) as (slow, fast):

        def wait(seconds, server):
            return lambda metadata: (time.sleep(seconds), server.right(metadata))[1]

        slow.score, fast.score = wait(0.06, slow), wait(0.005, fast)
        assert rate(remote([slow, fast])) == EXPECTED
        assert slow.most == 2 and fast.most <= 2
        assert counts([slow])[0] < counts([fast])[0]


# Failing


def test_a_server_that_is_killed_is_put_aside_and_comes_back(caplog):
    with servers(2) as (dying, other):
        reward = remote([dying, other])

        def die(metadata):
            if len(dying.requests) == 3:
                dying.kill()
            return dying.right(metadata)

        dying.score = die
        assert rate(reward) == EXPECTED
        until(lambda: "1 of 2 serve" in reward.servers.describe())
        described = reward.servers.describe()
        assert described.startswith(f"1 of 2 serve: {other.url}/score (n); {dying.url}/score gave")
        assert f"{dying.url}/score is put aside: it gave no answer" in caplog.text
        dying.score = dying.right
        dying.start()
        until(lambda: rate(reward, slice(0, 2)) and "2 of 2 serve" in reward.servers.describe())
        before = len(dying.requests)
        assert rate(reward) == EXPECTED
        assert len(dying.requests) > before
        assert f"{dying.url}/score serves again; 2 of 2 serve" in caplog.text


SCRIPT = """
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        data = json.dumps({"scores": [m.get("n", 0.5) for m in body["metadata"]]}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        print("scored", flush=True)

    def log_message(self, *arguments):
        pass

server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


def test_a_process_that_is_killed_loses_nothing():
    """By SIGKILL; its server knows no health, which it answers with 501."""
    command = [sys.executable, "-I", "-S", "-c", SCRIPT]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        with servers(1) as [other]:
            other.score = lambda metadata: (time.sleep(0.01), other.right(metadata))[1]
            url = f"http://127.0.0.1:{int(process.stdout.readline())}"
            options = {**FAST, "url": f"{url},{other.url}"}
            reward = load("http").configured(**options).build()
            reward.reach()
            assert reward.servers.describe() == (
                f"2 of 2 serve: {url}/score, {other.url}/score (n)"
            )
            done = threading.Thread(target=lambda: scores.extend(rate(reward)))
            scores = []
            done.start()
            # The picture of the comparison, and one more.
            for _ in range(2):
                process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
            done.join(10)
            assert scores == EXPECTED
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_server_that_hangs_is_put_aside():
    with servers(2) as (hanging, other):
        reward = remote([hanging, other], timeout=0.15)
        released = threading.Event()
        hanging.score = lambda metadata: (released.wait(20), None)[1]
        began = time.monotonic()
        assert rate(reward) == EXPECTED
        # No request waited for its answer.
        assert time.monotonic() - began < 10
        assert 1 <= len(hanging.requests) <= 4
        assert "gave no answer (ReadTimeout" in reward.servers.members[0].said
        released.set()


@pytest.mark.slow
def test_a_server_that_flaps_is_asked_ever_more_rarely():
    """Its health is good and every request fails: 0.05 s, 0.1 s, 0.2 s, 0.4 s, ..."""
    with servers(2) as (flapping, other):
        reward = remote([flapping, other])
        picture = flapping.right

        def score(metadata):
            return picture(metadata) if metadata == [{}] else (500, {"detail": "CUDA error"})

        flapping.score = score
        began = time.monotonic()
        while time.monotonic() - began < 0.6:
            assert rate(reward) == EXPECTED
        looks = [look for look in flapping.looks if look > began]
        assert 1 <= len(looks) <= 4
        gaps = [b - a for a, b in itertools.pairwise(looks)]
        assert all(gap >= 0.1 * 2**n for n, gap in enumerate(gaps))
        refused = [request for request in flapping.requests if request != [None]]
        # Those at once, before it was put aside, count as one failure.
        assert len(refused) <= 2 * (len(looks) + 1)


def test_retry_after_is_kept():
    with servers(2) as (busy, other):
        for asked, least, most in (("20", 10, 20), ("1000", 20, 30), ("soon", -10, 0.1)):
            reward = remote([busy, other])
            member = reward.servers.members[0]
            answer = (429, {"detail": "busy"}, {"retry-after": asked})
            busy.score = lambda metadata, answer=answer: answer
            assert rate(reward) == EXPECTED
            assert least < member.until - time.monotonic() <= most
            assert member.said == "answered 429 (busy)"
            busy.score = busy.right


@pytest.mark.parametrize("reply", [b"<html>", {"score": 1}, b"[1]"])
def test_answers_that_are_none_of_the_protocol_go_to_another_server(reply):
    with servers(3) as (wrong, other, third):
        reward = remote([wrong, other, third])
        wrong.score = lambda metadata: (200, reply)
        assert rate(reward) == EXPECTED
        assert f"{wrong.url}/score answered" in reward.servers.describe()

        # None of them speaks it: the command ends before the first image.
        other.score = third.score = wrong.score
        reward = load("http").configured(url=f"{wrong.url},{other.url}", **FAST)
        with pytest.raises(ReplyError, match=r"the server http://127.*answered .* is expected"):
            reward(IMAGES, PROMPTS, METADATA)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_random_failures_change_no_score(seed):
    """Two of three fail in any way at any time, and the third stays."""
    draw = random.Random(seed)
    with servers(3) as three:
        reward = remote(three, retries=20, timeout=0.1, backoff=0.01)

        def unsteady(server):
            def score(metadata):
                return draw.choice(
                    [
                        lambda: server.right(metadata),
                        lambda: None,
                        lambda: (503, {"detail": "restarting"}),
                        lambda: (500, b"CUDA"),
                        lambda: (200, b"<html>"),
                        lambda: (time.sleep(0.15), server.right(metadata))[1],
                    ]
                )()

            return score

        for server in three[:2]:
            server.score = unsteady(server)
        for _ in range(3):
            assert rate(reward) == EXPECTED


# Giving up


def test_no_server_left_is_one_sentence_that_names_each():
    with servers(2) as (killed, busy):
        reward = remote([killed, busy], wait=0.1)
        busy.score = busy.health = lambda *metadata: (503, {"detail": "out of memory"})
        killed.kill()
        began = time.monotonic()
        with pytest.raises(RewardError) as error:
            rate(reward)
        assert 0.1 <= time.monotonic() - began < 10
        text = str(error.value)
        assert "no server of reward 'http' has served for 0.1 s" in text and "\n" not in text
        assert f"{killed.url}/score gave no answer (ConnectError" in text
        assert f"{busy.url}/score answered 503 (out of memory)" in text
        # The threads of the other requests end, too.
        name = "flowgrpo-http"
        until(lambda: not any(thread.name == name for thread in threading.enumerate()))


def test_a_server_that_comes_back_in_time_goes_on():
    with servers(2) as two:
        reward = remote(two)
        for server in two:
            server.kill()
        threading.Timer(0.07, two[1].start).start()
        assert rate(reward) == EXPECTED
        assert counts(two) == [0, COUNT + 1]


def test_time_without_requests_is_not_waited():
    """All failed at the end of one call; the next begins by looking at them."""
    with servers(2) as two:
        reward = remote(two, wait=0.05)
        for server in two:
            server.kill()
        with pytest.raises(RewardError, match="no server"):
            rate(reward, slice(0, 1))
        for server in two:
            server.start()
        # An update of minutes lies between.
        reward.servers.wait = 30.0
        reward.servers._all_aside_since -= 100.0
        assert rate(reward) == EXPECTED


def test_an_image_that_every_server_fails_is_the_failure_of_its_group():
    """The servers are well: other groups are scored meanwhile, and after it."""
    with servers(2) as two:

        def choosy(server):
            def score(metadata):
                if {"n": 1.0} in metadata:
                    return 500, {"detail": "ValueError: no such class"}
                return server.right(metadata)

            return score

        for server in two:
            server.score = choosy(server)
        url = ",".join(server.url for server in two)
        options = {**FAST, "batch_size": 2, "retries": 1, "backoff": 0.0}
        scorer = Scorer({url: 1.0}, retries=1, options={url: options})
        found = scorer(IMAGES, Prompts.of(PROMPTS[:6], METADATA[:6]), 2)
        assert found.dropped.tolist() == [n == 4 for n in range(6)]
        assert found.total[::2].isnan().tolist() == found.dropped.tolist()
        problem = scorer.problems[url]
        for server in two:
            assert f"{server.url}/score answered 500 (ValueError: no such class)" in problem


@pytest.mark.parametrize(
    ("scores", "error", "words"),
    [
        ([1.0, 2.0], RewardError, "2 scores for 1 images"),
        ([float("nan")], RemoteError, "nan for 1 of 1 images"),
        (["2"], RemoteError, "'2' for 1 of 1 images"),
    ],
)
def test_a_server_that_scores_wrongly_is_named(scores, error, words):
    with servers(2) as (wrong, other):
        reward = remote([wrong, other])
        wrong.score = lambda metadata: (200, {"scores": scores})
        with pytest.raises(error, match=rf"the server {wrong.url}/score of reward .*{words}"):
            rate(reward)


# Comparison


def test_servers_that_differ_are_refused_at_the_start():
    with servers(3) as (one, two, three):
        two.score = lambda metadata: (200, {"scores": [0.5004] * len(metadata)})
        three.score = lambda metadata: (200, {"scores": [0.502] * len(metadata)})
        remote([one, two])
        words = rf"{three.url}/score of .*scores a picture 0.502 that {one.url}/score scores 0.5,"
        with pytest.raises(RewardError, match=words) as error:
            remote([one, two, three])
        assert "\n" not in str(error.value)
        remote([one, two, three], tolerance=0.01)
        # Relative, where scores are large.
        one.score = lambda metadata: (200, {"scores": [-500.0]})
        three.score = lambda metadata: (200, {"scores": [-500.4]})
        remote([one, three])
        three.score = lambda metadata: (200, {"scores": [None]})
        with pytest.raises(RewardError, match="scores a picture nan that"):
            remote([one, three])


def test_without_a_start_the_first_image_is_compared():
    with servers(2) as (one, two):
        one.score = lambda metadata: (200, {"scores": [None] * len(metadata)})
        two.score = lambda metadata: (200, {"scores": [7.0] * len(metadata)})
        reward = load("http").configured(url=f"{one.url},{two.url}", **FAST)
        # A picture without a number compares nothing.
        two.score, seven = one.score, two.score
        reward.build().servers.compare(comparison_picture(8, 8), "", {})
        one.score, two.score = one.right, seven
        one.requests.clear()
        two.requests.clear()
        with pytest.raises(RewardError, match="scores a picture 7 that"):
            reward(IMAGES, PROMPTS, METADATA)
        assert one.requests == two.requests == [[0.0]]


def test_a_server_that_comes_back_as_another_stays_aside(caplog):
    with servers(2) as (changed, other):
        reward = remote([changed, other], backoff=0.001)
        member = reward.servers.members[0]
        changed.kill()
        assert rate(reward) == EXPECTED
        changed.score = lambda metadata: (200, {"scores": [0.75] * len(metadata)})
        changed.start()
        until(lambda: rate(reward) == EXPECTED and "scores a picture 0.75 that" in member.said)
        changed.score, changed.name = changed.right, "m"
        until(lambda: rate(reward) == EXPECTED and "serves 'm', but 'n'" in member.said)
        changed.name = "somewhere/n"
        until(lambda: rate(reward) == EXPECTED and not member.aside)


def test_servers_of_different_rewards_are_refused():
    with servers(2) as (one, two):
        two.name = "geneval_strict"
        reward = load("http").configured(url=f"{one.url}, {two.url}", **FAST).build()
        words = rf"{one.url}/score and {two.url}/score .* serve 'n' and 'geneval_strict'"
        with pytest.raises(RewardError, match=words):
            reward.reach()


# From the configuration


def test_a_run_begins_without_a_server_that_does_not_answer(caplog):
    with servers(2) as (absent, there):
        absent.kill()
        url = f"{absent.url},{there.url}"
        scorer = Scorer({url: 1.0}, options={url: FAST}, offset=1)
        prompts = Prompts.of(PROMPTS[:2], METADATA[:2])
        with caplog.at_level(logging.WARNING, "flowgrpo"):
            scorer.prepare(prompts)
        assert f"{absent.url}/score is put aside: it gave no answer" in caplog.text
        assert scorer.servers()[url].startswith(f"1 of 2 serve: {there.url}/score (n); ")
        scorer.try_out(prompts, torch.zeros(3, 8, 8, dtype=torch.uint8))
        assert scorer.rewards[url].options["offset"] == 1
        # It comes to the run later, by the picture of the start, which is not blank.
        absent.start()
        score = scorer.rewards[url]
        until(lambda: rate(score) == EXPECTED and scorer.servers()[url].startswith("2 of 2"))
        assert scorer(IMAGES[:2], prompts, 1).total.tolist() == EXPECTED[:2]
        there.kill()
        absent.kill()
        with pytest.raises(RewardError, match=rf"can be reached \({absent.url}.*; {there.url}"):
            scorer.prepare(prompts)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://a:1,http://b:1,http://a:1", "address http://a:1/score of .* is named twice"),
        ("http://a:1,", "address of reward 'http' is ''"),
        ("http://a:1,b:1", "address of reward 'http' is 'b:1', but one that begins with http://"),
        ("http://a:1 http://b:1", "that can be read"),
    ],
)
def test_lists_of_addresses_that_are_none(url, words):
    with pytest.raises(RewardError, match=words) as error:
        load("http").configured(url=url).build()
    assert "\n" not in str(error.value)


def test_judges_share_their_images():
    def completion(metadata):
        # Its requests have none.
        return 200, {"choices": [{"message": {"content": "Final Score: 4"}}]}

    with servers(2) as two:
        for server in two:
            server.score = completion
        url = ",".join(f"{server.url}/v1" for server in two)
        options = {key: value for key, value in FAST.items() if key != "batch_size"}
        reward = load("unifiedreward").configured(url=url, **options).build()
        reward.reach()
        assert rate(reward) == [0.8] * COUNT
        assert min(counts(two)) > 0 and sum(counts(two)) == COUNT + 2
        two[0].kill()
        assert rate(reward) == [0.8] * COUNT
