"""What goes wrong with rewards and models, from the command line: one sentence, exit code 2."""

from __future__ import annotations

import json
import socket

import pytest
from huggingface_hub import constants

from flowgrpo.cli import main
from support import processes
from support.servers import Answers, running

PLACE = {}


def recipe():
    """A run of a second."""
    changes = {"run.progress": "none", "run.steps": 1, "reward.retries": 0, "run.eval_prompts": 2}
    return processes.make(PLACE["model"], **changes)


@pytest.fixture(scope="module", autouse=True)
def model(tmp_path_factory):
    PLACE["model"] = tmp_path_factory.mktemp("errors")
    recipe()


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys, *words: str) -> str:
    """The sentence that a training run with these options ends with."""
    line = ["train", "test_errors:recipe", "--run.out", "out", *words]
    assert main.main(line) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: ") and shown.err.count("\n") == 1
    return shown.err


def scores(*values) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": list(values)}).encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, b'{"detail": "no"}'), "asks for a token (401: no)"),
        ((404, b"nothing"), "status 404 (nothing); check the address"),
        ((200, b"hello"), "answered 'hello', but a JSON object is expected"),
        ((200, b'{"score": 1}'), "a list under the key 'scores' is expected"),
        (scores(1.0), "returned 1 scores for "),
        # Two blank images come first, of which it may be right.
        ([scores(*[float("nan")] * 2), scores(*[float("nan")] * 4)], "returned nan for 4 of 4"),
        ([scores(1, None), scores(1, 2, None, 4)], "returned None for 1 of 4 images"),
    ],
)
def test_a_server_that_answers_badly(answer, words, capsys, folder, monkeypatch):
    answers = answer if isinstance(answer, list) else [answer]
    if not isinstance(answer, list):
        monkeypatch.setattr("flowgrpo.evaluation.evaluate.generate_images", None)
    with running(Answers(*answers)) as url:
        told = refused(capsys, "--reward.weights", url, "1", "--run.eval-samples", "2")
    assert words in told and url in told
    assert list(folder.iterdir()) == [] or len(answers) > 1


def test_a_server_that_does_not_answer(capsys, folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    shown = refused(capsys, "--reward.weights", url, "1")
    assert "no server of reward 'http' can be reached" in shown and "ConnectError" in shown
    # Nothing had begun.
    assert list(folder.iterdir()) == []


def nans(images, prompts, metadata):
    return [float("nan")] * len(images)


def short(images, prompts, metadata):
    return [0.0] * (len(images) - 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--reward.weights test_errors:nans 1", "(it returned scores that are not finite"),
        ("--reward.weights test_errors:short 1", "one score an image, shape"),
        ("--reward.weights beauty 1", "reward 'beauty' is unknown"),
        ("--reward.weights pickscor 1", "did you mean 'pickscore'?"),
        ("--reward.weights ocr 1", "'a red circle' has no text in double quotes"),
        (
            "--reward.weights geneval 1 --reward.options geneval.device cpu",
            "but GenEval's is expected",
        ),
        ("--reward.weights unifiedreward 1", "begins with http:// or https:// is expected"),
        ("--reward.weights clipscore 1 --reward.options clipscore.model /no/such", "/no/such"),
        ("--policy.model /no/such", "policy.model is '/no/such', which is no folder"),
        ("--policy.model .", "no readable model_index.json"),
        ("--sample.prompts /no/such.txt", "nor an existing file or folder"),
    ],
)
def test_mistakes_of_the_configuration(options, words, capsys):
    assert words in refused(capsys, *options.split())


@pytest.mark.usefixtures("gated_hub")
def test_a_gated_reward_model(capsys):
    for name, model in (("clipscore", "acme/clip"), ("imagereward", "acme/reward")):
        told = refused(
            capsys, "--reward.weights", name, "1", "--reward.options", f"{name}.model", model
        )
        assert model in told and "cannot be loaded" in told and "your access" in told
