"""Judges against endpoints that answer as vLLM and SGLang do: questions, parsing, failures."""

import base64
import json
import logging
import math

import pytest
import torch

from flowgrpo.rewards import RewardError, load
from flowgrpo.rewards.images import from_png
from flowgrpo.rewards.remote.judges import axes_score, final_score
from flowgrpo.rewards.remote.server import RemoteError
from support.servers import Answers, running

IMAGES = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
FAST = {"retries": 1, "backoff": 0.01, "timeout": 5.0, "concurrency": 1}


def chat(text=None, **logprobs):
    """A chat completion; logprobs: token -> log-probability of the first token."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    if logprobs:
        top = [{"token": t, "logprob": v, "bytes": None} for t, v in logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    return 200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode()


def ask(name, app, **options):
    with running(app) as url:
        reward = load(name).configured(url=url + "/v1", **{**FAST, **options})
        return reward(IMAGES, ["a red [car]", "two {dogs}"], [{}, {}])


@pytest.mark.parametrize(
    ("text", "grade"),
    [
        ("car (object): 1\nred (attribute): 1\nFinal Score: 4.5", 4.5),
        ("Final Score:3", 3.0),
        ("Final Score: 5\n", 5.0),
        # A sentence may end after the number.
        ("Final Score: 2.", 2.0),
        ("Final Score: 5.0 out of 5", 5.0),
        ("Final Score: 5.5", math.nan),
        ("Final Score: 7", math.nan),
        ("Final Score: 12", math.nan),
        ("The score is 4", math.nan),
        ("", math.nan),
    ],
)
def test_final_score(text, grade):
    assert final_score(text) == pytest.approx(grade, nan_ok=True)


def test_axes_score():
    text = "Alignment Score (1-5): 3.62\nCoherence Score (1-5): 4\nStyle Score (1-5): 1.5"
    assert axes_score(text) == pytest.approx((3.62 + 4 + 1.5) / 3)
    assert math.isnan(axes_score("Alignment Score (1-5): 3.62\nStyle Score (1-5): 1.5"))


def test_unifiedreward_asks_as_its_authors_do():
    app = Answers(chat("Final Score: 4"), chat("Final Score: 1.5"))
    assert ask("unifiedreward", app, token="key", model="my-judge") == [0.8, 0.3]
    headers, body = app.requests[0]
    assert headers["authorization"] == "Bearer key"
    sent = json.loads(body)
    assert sent["model"] == "my-judge"
    assert sent["temperature"] == 0
    [message] = sent["messages"]
    picture, question = message["content"]
    assert message["role"] == "user"
    prefix = "data:image/png;base64,"
    assert picture["image_url"]["url"].startswith(prefix)
    assert torch.equal(from_png(picture["image_url"]["url"][len(prefix) :]), IMAGES[0])
    assert question["text"].startswith("You are given a text caption and a generated image")
    assert "after 'Final Score:'" in question["text"]
    assert question["text"].endswith("Text Caption: [a red [car]]")
    assert json.loads(app.requests[1][1])["messages"][0]["content"][1]["text"].endswith(
        "[two {dogs}]"
    )


def test_unifiedreward_2():
    text = "Alignment Score (1-5): 5\nCoherence Score (1-5): 4\nStyle Score (1-5): 3"
    app = Answers(chat(text))
    assert ask("unifiedreward", app, style="acs") == pytest.approx([0.8, 0.8])
    question = json.loads(app.requests[0][1])["messages"][0]["content"][1]["text"]
    assert "Coherence Score: How logically consistent" in question
    with pytest.raises(RewardError, match="style of reward 'unifiedreward' is 'pairs'"):
        ask("unifiedreward", app, style="pairs")


def test_an_answer_without_a_grade_is_nan_and_logged(caplog):
    app = Answers(chat("I cannot say."), chat("Final Score: 5"))
    with caplog.at_level(logging.WARNING, "flowgrpo"):
        found = ask("unifiedreward", app)
    assert math.isnan(found[0])
    assert found[1] == 1.0
    assert "1 of 2 answers have no grade" in caplog.text


def test_deqa_is_the_mean_level_under_the_next_token():
    p = {" excellent": 0.2, " good": 0.4, " fair": 0.1, " poor": 0.05, " bad": 0.05, " the": 0.2}
    app = Answers(chat(" good", **{t: math.log(v) for t, v in p.items()}))
    expected = (5 * 0.2 + 4 * 0.4 + 3 * 0.1 + 2 * 0.05 + 0.05) / 0.8 / 5
    assert ask("deqa", app) == pytest.approx([expected, expected])
    sent = json.loads(app.requests[0][1])
    assert [m["role"] for m in sent["messages"]] == ["user", "assistant"]
    question, picture = sent["messages"][0]["content"]
    assert question["text"] == "How would you rate the quality of this image?"
    assert base64.b64decode(picture["image_url"]["url"].split(",")[1])[:4] == b"\x89PNG"
    assert sent["messages"][1]["content"] == "The quality of the image is"
    assert sent["continue_final_message"] is True
    assert sent["add_generation_prompt"] is False
    assert (sent["max_tokens"], sent["logprobs"], sent["top_logprobs"]) == (1, True, 20)


def test_deqa_with_other_tokenizers_and_missing_levels():
    # SentencePiece's and byte-level BPE's marks of a space; capitals.
    app = Answers(chat("x", **{"▁good": math.log(0.3), "Ġbad": math.log(0.1)}))
    assert ask("deqa", app) == pytest.approx([(4 * 0.3 + 0.1) / 0.4 / 5] * 2)
    app = Answers(chat("x", the=-0.1, a=-3.0))
    assert all(math.isnan(value) for value in ask("deqa", app))


@pytest.mark.parametrize("name", ["unifiedreward", "deqa"])
@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((401, b'{"error": {"message": "no key"}}'), RewardError, "asks for a token.*no key"),
        ((404, b'{"error": "no such model"}'), RewardError, "no such model"),
        ((200, b'{"choices": []}'), RemoteError, "a chat completion with choices"),
        ((200, b"<html>"), RemoteError, "a JSON object is expected"),
        ((500, b"cuda"), RemoteError, "after 2 tries .*answered 500 .cuda."),
    ],
)
def test_failures(name, answer, error, message):
    with pytest.raises(error, match=message) as info:
        ask(name, Answers(answer))
    assert "\n" not in str(info.value)


def test_deqa_needs_log_probabilities():
    with pytest.raises(RewardError, match="returns no log-probabilities"):
        ask("deqa", Answers(chat("good")))


@pytest.mark.parametrize("name", ["unifiedreward", "deqa"])
def test_the_address_has_to_be_given(name, monkeypatch):
    with pytest.raises(RewardError, match=f"FLOWGRPO_REWARD_{name.upper()}_URL"):
        load(name).configured()(IMAGES, ["a", "b"], [{}, {}])
