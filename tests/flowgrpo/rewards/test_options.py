"""reward.options, reward.timeout, reward.normalize: from the configuration to the rewards."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import pytest
import torch

from flowgrpo.cli import train
from flowgrpo.config import ConfigError, RewardConfig
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load
from flowgrpo.rewards.options import configurable
from support import processes
from support.servers import Answers, running


@configurable("mine", check=lambda prompt, entry: refuse(prompt))
def mine(*, factor: float = 1.0, timeout: float = 9.0, where: str = "here"):
    """The first pixel times a factor."""
    return lambda images, prompts, metadata: factor * images[:, 0, 0, 0].double()


def refuse(prompt):
    if "never" in prompt:
        raise RewardError("no.")


def plain(images, prompts, metadata):
    return [0.0] * len(images)


MINE = "test_options:mine"
PLAIN = "test_options:plain"
IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)


def scorer(options, **fields):
    return Scorer.of(RewardConfig(weights={MINE: 1.0}, options=options, **fields))


def test_options_reach_the_reward():
    scores = scorer({f"{MINE}.factor": "2.5"})(IMAGES, Prompts.of(["a", "b"]), 2)
    assert scores.total.tolist() == [0.0, 2.5, 5.0, 7.5]


def test_an_option_may_stay_for_a_reward_that_is_only_reported():
    config = RewardConfig(
        weights={PLAIN: 1.0}, report=(PLAIN, MINE), options={f"{MINE}.factor": "3"}
    )
    assert list(Scorer.of(config).rewards) == [PLAIN]
    shown = Scorer.of(config, config.report)
    assert shown.score_each(IMAGES, Prompts.of(["a"]), 4)[MINE].tolist() == [0.0, 3.0, 6.0, 9.0]


def test_timeout_reaches_the_rewards_that_have_one():
    def timeout(found):
        return found.rewards[MINE].options["timeout"]

    assert timeout(scorer({})) == 9.0
    assert timeout(scorer({}, timeout=4)) == 4
    assert timeout(scorer({f"{MINE}.timeout": "5"}, timeout=4.0)) == 5.0
    assert (
        "timeout"
        not in Scorer.of(RewardConfig(weights={"ocr": 1.0}, timeout=4.0)).rewards["ocr"].options
    )


def test_equal_options_load_once():
    assert load(MINE, {"factor": "2"}) is load(MINE, {"factor": "2"})
    assert load(MINE, {"factor": "2"}) is not load(MINE, {"factor": "3"})
    assert load(MINE) is mine


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_options:min.factor": "2"}, "did you mean 'test_options:mine'?"),
        ({"factor": "2"}, "'factor', but NAME.OPTION is expected"),
        ({f"{MINE}.facto": "2"}, r"no option 'facto', .*did you mean 'factor'\?"),
        ({f"{MINE}.factor": "big"}, "option factor of reward 'mine' is 'big', but .* float"),
    ],
)
def test_wrong_options_are_one_sentence(options, message):
    with pytest.raises(ConfigError, match=message) as info:
        scorer(options)
    assert "\n" not in str(info.value)


def test_a_reward_without_options_says_so():
    with pytest.raises(ConfigError, match=r"plain' takes no options, but factor is given"):
        Scorer.of(RewardConfig(weights={PLAIN: 1.0}, options={f"{PLAIN}.factor": "1"}))


def test_prompts_are_checked_before_anything_is_loaded():
    scorer({}).prepare(Prompts.of(["a dog"]))
    found = scorer({f"{MINE}.where": "there"})
    with pytest.raises(RewardError):
        found.prepare(Prompts.of(["a dog", "never a cat"]))
    assert found.rewards[MINE]._reward is None
    with pytest.raises(RewardError, match=r"'a dog' has no text in double quotes"):
        Scorer.of(RewardConfig(weights={"ocr": 1.0})).prepare(Prompts.of(["a dog"]))


def test_an_address_takes_options_and_is_called_at_once():
    app = Answers((200, b'{"scores": [1, 2, 3, 4]}'))
    with running(app) as url:
        config = RewardConfig(
            weights={url: 1.0}, options={f"{url}.token": "s3cret"}, timeout=3.0, retries=0
        )
        found = Scorer.of(config)
        found.prepare(Prompts.of(["a"]))
        assert found.rewards[url].options["timeout"] == 3.0
        assert found(IMAGES, Prompts.of(["a"]), 4).total.tolist() == [1, 2, 3, 4]
    assert (len(app.requests), app.looks) == (1, 1)
    assert all(headers["authorization"] == "Bearer s3cret" for headers, _ in app.requests)


def test_an_unreachable_server_stops_before_the_first_image():
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(RewardError, match=r"can be reached .*ConnectError.*start it") as info:
        Scorer.of(RewardConfig(weights={url: 1.0})).prepare(Prompts.of(["a"]))
    assert "\n" not in str(info.value)


OWN = """
from flowgrpo.rewards.options import configurable

@configurable("mine")
def score(*, channel: int = 0):
    return lambda images, prompts, metadata: images[:, channel].float().mean((1, 2)) / 255
"""


@pytest.mark.slow
def test_a_file_of_the_users_own_in_the_working_directory(tmp_path):
    """By the installed command, whose sys.path does not begin where the user stands."""
    (tmp_path / "my_rewards.py").write_text(OWN)
    evaluated = tmp_path / "e"
    words = ["evaluate", "nano", "--prompts", "2", "--rewards", "my_rewards:score"]
    words += ["--reward-options", "my_rewards:score.channel", "2"]
    words += ["--steps", "2", "--samples", "1", "--device", "cpu", "--out", str(evaluated)]
    command = Path(sys.executable).parent / "flowgrpo"
    if not command.exists():
        pytest.skip("flowgrpo is not installed here")
    processes.Fork(tmp_path / "log", processes.run_script, command, tmp_path, *words).wait()
    (report,) = json.loads((evaluated / "report.json").read_text())["reports"].values()
    assert 0 < report["scores"]["my_rewards:score"] < 1


def test_the_command_line_takes_options():
    line = "nano --reward.options a.b 1 http://h:1/x.token t --reward.normalize group"
    found = train.parse_train(line.split()).reward
    assert found.options == {"a.b": "1", "http://h:1/x.token": "t"}
    assert found.normalize == "group"
    with pytest.raises(ConfigError, match=r"NAME\.OPTION VALUE, repeated"):
        train.parse_train(["nano", "--reward.options", "a.b"])
