"""Rewards of the user's own: tried before anything is sampled, and kept apart from each other."""

from __future__ import annotations

import functools
import json
import sys
import textwrap
from pathlib import Path

import numpy
import pytest
import torch

from flowgrpo import rewards, train
from flowgrpo.cli import main
from flowgrpo.config import replace
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load
from flowgrpo.rewards.options import configurable
from support import processes

PROMPTS = Prompts.of(["a", "b"], [{"n": [1]}, {"n": [2]}])
IMAGES = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).repeat(1, 3, 2, 2)
BLANK = torch.zeros(3, 2, 2, dtype=torch.uint8)


@pytest.fixture
def scorer(monkeypatch):
    """Makes a Scorer of functions, as rewards of a module of the user's own."""

    def make(**functions):
        module = type(sys)("users_rewards")
        for name, function in functions.items():
            setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "users_rewards", module)
        return Scorer({f"users_rewards:{name}": 1.0 for name in functions}, retries=0)

    return make


async def awaited(images, prompts, metadata):
    return [0.0] * len(images)


class Class:
    def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)


class AwaitedObject:
    async def __call__(self, images, prompts, metadata):
        return [0.0] * len(images)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (Class, "is the class Class, but a function is expected"),
        (awaited, "is an async function, but a function is expected"),
        (AwaitedObject(), "is an async function"),
        ({"a": 1}, "is dict, but a function is expected"),
    ],
)
def test_what_is_no_function_is_refused_where_it_is_named(scorer, reward, words):
    with pytest.raises(RewardError, match=words) as error:
        scorer(r=reward)
    assert "\n" not in str(error.value)
    # An object that is called is a function.
    assert scorer(r=Class())(IMAGES, PROMPTS, 2).total.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda i: {"scores": [0.0] * len(i)}, "returned a dict for 2 images"),
        (lambda i: None, "returned a NoneType for 2 images"),
        (lambda i: awaited(i, [], []), "returned a coroutine for 2 images"),
        (lambda i: [0.0], r"shape \(1,\) for 2 images"),
        (lambda i: i.float().mean(), r"shape \(\) for 2 images"),
        (lambda i: 0.5, r"shape \(\) for 2 images"),
        (lambda i: [[0.0]] * len(i), "returned .*, but one number an image is expected"),
        (lambda i: [{"score": 0.0}] * len(i), "returned .*, but one number an image is expected"),
        (lambda i: sys.exit(3), r"asked the process to end \(SystemExit: 3, .* line"),
    ],
)
def test_a_wrong_answer_is_found_on_a_blank_image(scorer, answer, words):
    with pytest.raises(RewardError, match=words) as error:
        scorer(r=lambda images, prompts, metadata: answer(images)).try_out(PROMPTS, BLANK)
    assert "\n" not in str(error.value)


def test_what_may_be_the_blank_images_fault_is_only_said(scorer, caplog):
    """No object in it, no variance, no face: the reward may be right about all others."""

    def judge(images, prompts, metadata):
        if not images.any():
            raise ValueError("nothing to see")
        return images[:, 0, 0, 0].double()

    scorer(r=judge).try_out(PROMPTS, BLANK)
    assert "'users_rewards:r' failed on a blank image" in caplog.text
    assert "ValueError: nothing to see" in caplog.text and len(caplog.records) == 1
    scorer(r=lambda images, prompts, metadata: [float("nan")] * len(images)).try_out(PROMPTS, BLANK)
    assert len(caplog.records) == 1
    assert scorer(r=judge)(IMAGES + 1, PROMPTS, 2).total.tolist() == [1, 2, 3, 4]


def test_a_reward_is_tried_with_a_prompt_of_the_run(scorer):
    calls = []
    scorer(r=lambda i, p, m: calls.append((i.shape, p, m)) or [0, 0]).try_out(PROMPTS, BLANK)
    assert calls == [((2, 3, 2, 2), ["a", "a"], [{"n": [1]}, {"n": [1]}])]
    # The package's own too: their libraries and models may fail.
    Scorer({"jpeg_compressibility": 1.0}).try_out(PROMPTS, BLANK)


def test_what_a_reward_changes_reaches_nobody(scorer):
    """Images and metadata, nested values too, between the rows of a group and between rewards."""

    def vandal(images, prompts, metadata):
        scores = [entry["n"].pop() for entry in metadata]
        metadata[0].clear()
        prompts.clear()
        images.zero_()
        images.numpy()[:] = 7
        return scores

    def honest(images, prompts, metadata):
        return [i[0, 0, 0] + 10 * m["n"][0] for i, m in zip(images, metadata, strict=True)]

    images = IMAGES.clone()
    scores = scorer(vandal=vandal, honest=honest)(images, PROMPTS, 2)
    assert scores.rewards["users_rewards:vandal"].tolist() == [1, 1, 2, 2]
    assert scores.rewards["users_rewards:honest"].tolist() == [10, 11, 22, 23]
    assert torch.equal(images, IMAGES) and PROMPTS.metadata == ({"n": [1]}, {"n": [2]})


def test_rewards_of_the_package_see_the_same_tensor(monkeypatch):
    """Two of them may share what they compute of it, as geneval and geneval_strict do."""
    seen = []
    monkeypatch.setattr("flowgrpo.rewards.scorer.is_users", lambda name: False)
    for name in ("one", "two"):
        module = type(sys)(name)
        module.f = lambda images, prompts, metadata: seen.append(images) or [0.0] * len(images)
        monkeypatch.setitem(sys.modules, name, module)
    Scorer({"one:f": 1.0, "two:f": 1.0})(IMAGES, PROMPTS, 2)
    assert seen[0] is IMAGES and seen[1] is IMAGES


FILE = """
import {helper}

def score(images, prompts, metadata):
    return [{helper}.VALUE] * len(images)
"""


def test_a_file_is_named_as_a_module_is(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    for folder, value in (("one", 1.0), ("two", 2.0)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"helper_{folder}.py").write_text(f"VALUE = {value}\n")
        (tmp_path / folder / "users_file.py").write_text(FILE.format(helper=f"helper_{folder}"))
    first = load(f"{tmp_path}/one/users_file.py:score")
    assert first(IMAGES, [], []) == [1.0] * 4
    # Executed once, also under its module's name; and no other file of that name in its stead.
    assert load(f"{tmp_path}/one/../one/users_file.py:score") is first
    monkeypatch.chdir(tmp_path / "one")
    assert load("users_file.py:score") is first and load("users_file:score") is first
    assert load(f"{tmp_path}/two/users_file.py:score")(IMAGES, [], []) == [2.0] * 4
    assert load("users_file:score") is first
    for name in [name for name in sys.modules if name.startswith(("users_file", "helper_"))]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "there is no file"),
        ("def (", "SyntaxError"),
        ("import sys; sys.exit('usage: ...')", r"SystemExit: usage: \.\.\."),
        ("x = 1", "has no attribute 'score'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, text, words):
    if text is not None:
        (tmp_path / "bad_file.py").write_text(text)
    for _ in range(2):
        with pytest.raises(RewardError, match=words) as error:
            load(f"{tmp_path}/bad_file.py:score")
        assert "\n" not in str(error.value)
    sys.modules.pop("bad_file", None)


@configurable("flagged")
def flagged(*, flag: bool = False, other: bool = True):
    return lambda images, prompts, metadata: [float(flag) + 2 * other] * len(images)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("Yes", True), ("1", True), ("FALSE", False), ("no", False), ("0", False)],
)
def test_spellings_of_a_bool_option(monkeypatch, text, value):
    assert flagged.configured(flag=text).options == {"flag": value, "other": True}
    assert flagged.configured(flag=value, other=text).options == {"flag": value, "other": value}
    monkeypatch.setenv("FLOWGRPO_REWARD_FLAGGED_OTHER", text)
    assert flagged(IMAGES, [""] * 4, [{}] * 4) is not None and flagged.options["other"] is value


def test_a_path_is_an_option_of_text(tmp_path):
    @configurable("where")
    def where(*, folder: str = "here", number: int = 0):
        pass

    assert where.configured(folder=tmp_path).options["folder"] == str(tmp_path)
    with pytest.raises(RewardError, match="a value of type int is expected"):
        where.configured(number=tmp_path)


@pytest.mark.parametrize("value", ["maybe", "", "2", 1, None])
def test_other_words_are_no_bool(value):
    with pytest.raises(RewardError, match=f"flag .* is {value!r}, but one of true, yes, 1, false"):
        flagged.configured(flag=value)


def test_what_fails_while_a_reward_is_built_is_one_sentence(scorer):
    @configurable("broken")
    def broken(*, path: str = "there"):
        raise FileNotFoundError(f"no {path}")

    @configurable("nothing")
    def nothing(*, path: str = "there"):
        pass

    with pytest.raises(RewardError, match=r"cannot be built \(FileNotFoundError: no there"):
        scorer(r=broken).prepare(PROMPTS)
    with pytest.raises(RewardError, match="'nothing' made a NoneType, but a function"):
        scorer(r=nothing).prepare(PROMPTS)


RUN = """
def score(images, prompts, metadata):
    return {"mean": 0.0}
"""


def recipe():
    return RECIPE["config"]


RECIPE = {}


@pytest.mark.slow
def test_nothing_is_sampled_for_a_wrong_reward_and_the_command_works_once_it_is_mended(
    tmp_path, monkeypatch, capsys
):
    RECIPE["config"] = processes.make(tmp_path, **{"run.progress": "none", "run.steps": 1})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "users_own.py").write_text(RUN)
    line = ["train", "test_own_rewards:recipe", "--run.out", "out"]
    line += ["--reward.weights", "users_own.py:score", "1"]
    sampled = []
    real = rewards.Scorer.score_each
    monkeypatch.setattr(
        rewards.Scorer, "score_each", lambda *a, **k: sampled.append(1) or real(*a, **k)
    )
    assert main.main(line) == 2
    assert "returned a dict for 2 images" in capsys.readouterr().err
    assert not sampled and not (tmp_path / "out").exists()
    sys.modules.pop("users_own", None)
    (tmp_path / "users_own.py").write_text(RUN.replace('{"mean": 0.0}', "[0.0] * len(images)"))
    assert main.main(line) == 0 and sampled
    sys.modules.pop("users_own", None)


def test_an_evaluation_samples_nothing_for_a_wrong_reward(tmp_path, monkeypatch, capsys):
    config = processes.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowgrpo.evaluation.evaluate.generate_images", None)
    (tmp_path / "users_own.py").write_text(RUN)
    line = ["evaluate", config.policy.model, "--prompt-set", config.sample.prompts]
    assert main.main([*line, "--rewards", "users_own.py:score", "--out", "e"]) == 2
    assert "returned a dict for 2 images" in capsys.readouterr().err
    assert not (tmp_path / "e").exists()
    sys.modules.pop("users_own", None)


@pytest.mark.slow
def test_a_reward_that_exits_in_mid_run_saves_it(tmp_path, monkeypatch):
    """As one that fails: the iterations before it are kept, and the run goes on from there."""
    config = processes.make(
        tmp_path, **{"run.progress": "none", "run.checkpoint_every": 0, "run.eval_every": 0}
    )
    iterations = []
    real = train.collect

    def collect(components, *arguments):
        iterations.append(components.state.iteration)
        return real(components, *arguments)

    def exits(images, prompts, metadata):
        if iterations and iterations[-1] == 3:
            sys.exit(3)
        return processes.red(images, prompts, metadata)

    monkeypatch.setattr(train, "collect", collect)
    monkeypatch.setattr(processes, "exits", exits, raising=False)
    changes = {"reward.weights": {"support.processes:exits": 1.0}}
    with pytest.raises(RewardError, match=r"asked the process to end \(SystemExit: 3"):
        train.run(replace(config, **changes))
    folder = tmp_path / "run" / "checkpoints"
    assert (folder / "step-000003").is_dir()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [line["iteration"] for line in map(json.loads, lines)] == [0, 1, 2, 3]


def test_a_file_and_its_module_take_the_same_options(tmp_path, monkeypatch):
    """Options are given under the name that the reward has in the configuration."""
    text = """
        from flowgrpo.rewards.options import configurable

        @configurable("mine")
        def score(*, negative: bool = False):
            sign = -1.0 if negative else 1.0
            return lambda images, prompts, metadata: sign * images[:, 0, 0, 0]
    """
    (tmp_path / "users_pair.py").write_text(textwrap.dedent(text))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    from flowgrpo.config import RewardConfig

    totals = []
    for name in ("users_pair:score", "users_pair.py:score"):
        config = RewardConfig(weights={name: 1.0}, options={f"{name}.negative": "yes"})
        scorer = Scorer.of(config)
        scorer.prepare(PROMPTS)
        totals.append(scorer((IMAGES > 1).byte(), PROMPTS, 2).total.tolist())
    assert totals[0] == totals[1] == [0, 0, -1, -1]
    del sys.modules["users_pair"]


@pytest.mark.parametrize(
    "reward",
    [
        lambda images, prompts: [0.0] * len(images),
        lambda *, images, prompts, metadata: [0.0] * len(images),
        lambda images, prompts, metadata, model: [0.0] * len(images),
        lambda **arguments: [0.0],
    ],
)
def test_arguments_that_do_not_fit_are_refused_where_it_is_named(scorer, reward):
    with pytest.raises(RewardError, match="it is called with images, prompts and metadata") as e:
        scorer(r=reward)
    assert "\n" not in str(e.value)

    @configurable("built")
    def built(*, name: str = ""):
        return reward

    with pytest.raises(RewardError, match="it is called with images, prompts and metadata"):
        scorer(r=built).prepare(PROMPTS)


@pytest.mark.parametrize(
    "reward",
    [
        lambda *arguments: [0.0] * len(arguments[0]),
        lambda images, prompts, metadata, scale=2.0, **more: [scale] * len(images),
        functools.partial(lambda scale, images, *rest: [scale] * len(images), 0.5),
        Class().__call__,
    ],
)
def test_arguments_that_fit(scorer, reward):
    scorer(r=reward).try_out(PROMPTS, BLANK)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ModuleNotFoundError("No module named 'clip'"), "No module named 'clip'"),
        (NameError("name 'tensor' is not defined"), "name 'tensor' is not defined"),
        (FileNotFoundError(2, "No such file", "w.pt"), "w.pt"),
        (PermissionError(13, "Permission denied", "w.pt"), "w.pt"),
    ],
)
def test_what_no_image_is_the_reason_of_ends_before_the_first(scorer, error, words):
    def judge(images, prompts, metadata):
        raise error

    with pytest.raises(RewardError, match="which would be so for all images") as caught:
        scorer(r=judge).try_out(PROMPTS, BLANK)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        lambda i: [10**400] * len(i),
        lambda i: torch.zeros(len(i), device="meta"),
        lambda i: torch.zeros(len(i)).to_sparse(),
        lambda i: numpy.array([object()] * len(i)),
        lambda i: iter([0.0] * len(i)),
        lambda i: "0.5",
        lambda i: {0.5, 0.25},
    ],
)
def test_odd_answers_are_one_sentence(scorer, answer):
    with pytest.raises(RewardError, match=r"returned .* for 2 images") as error:
        scorer(r=lambda images, prompts, metadata: answer(images)).try_out(PROMPTS, BLANK)
    assert "\n" not in str(error.value)


def test_scores_too_large_to_compare_are_none(scorer):
    """Their squares overflow: the advantages would be 0, or infinite."""
    scores = scorer(r=lambda i, p, m: [1e200, 2e200, 1.0, 2.0])(IMAGES, PROMPTS, 2)
    assert scores.dropped.tolist() == [True, False] and scores.total[2:].tolist() == [1.0, 2.0]
    with pytest.raises(RewardError, match=r"not finite, or beyond 1e\+30"):
        scorer(r=lambda i, p, m: [1e200] * 4)(IMAGES, PROMPTS, 2)


def test_options_and_checks_that_raise_are_one_sentence(scorer):
    @configurable("exits")
    def exits(*, path: str = "there"):
        sys.exit("usage: ...")

    @configurable("checks", check=lambda prompt, entry: entry["missing"])
    def checks(*, path: str = "there"):
        return awaited

    with pytest.raises(RewardError, match=r"cannot be built \(SystemExit: usage"):
        scorer(r=exits).prepare(PROMPTS)
    with pytest.raises(RewardError, match=r"cannot check the prompt 'a' \(KeyError: 'missing'"):
        scorer(r=checks).prepare(PROMPTS)


def test_options_need_names_and_defaults():
    for function in (
        lambda path: None,
        lambda *paths: None,
        lambda **more: None,
        lambda path, /: None,
    ):
        with pytest.raises(RewardError, match="options with a name and a default are expected"):
            configurable("needy")(function)


def test_text_becomes_no_list():
    @configurable("listed")
    def listed(*, words: tuple = (), folder: Path = Path("here")):
        pass

    with pytest.raises(RewardError, match="a value of type tuple, which no text becomes"):
        listed.configured(words="abc")
    options = listed.configured(words=("a",), folder="there").options
    assert options == {"words": ("a",), "folder": Path("there")}


def test_an_address_without_http_says_so():
    for name in ("localhost:8400", "gpu-3:8400/score"):
        with pytest.raises(RewardError, match=f"write the address of a server as http://{name}"):
            load(name)
