"""The weighted sum of rewards: values, failures, retries, dropped groups."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from flowgrpo import rewards
from flowgrpo.config import OptimConfig
from flowgrpo.objectives.advantages import advantages
from flowgrpo.records import Prompts

PROMPTS = Prompts.of(["a", "b", "c"], [{"n": 1}, {"n": 2}, {"n": 3}])
IMAGES = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 4)
VALUES = torch.arange(12, dtype=torch.float64)


@pytest.fixture
def reward(monkeypatch):
    """Install functions as rewards of a module of the user's own; returns their scorer."""
    calls = []

    def install(retries=2, normalize="none", **functions):
        module = type(sys)("users_rewards")
        for name, (function, _) in functions.items():

            def counted(images, prompts, metadata, name=name, function=function):
                calls.append((name, len(images), tuple(prompts), [m["n"] for m in metadata]))
                return function(images, prompts, metadata)

            setattr(module, name, counted)
        monkeypatch.setitem(sys.modules, "users_rewards", module)
        weights = {f"users_rewards:{name}": weight for name, (_, weight) in functions.items()}
        return rewards.Scorer(weights, retries, normalize=normalize)

    install.calls = calls
    return install


def first(images, *_):
    return images[:, 0, 0, 0].double()


def test_weighted_sum_of_any_kind_of_numbers(reward):
    scorer = reward(
        a=(lambda i, p, m: first(i).to(torch.bfloat16), 2.0),
        b=(lambda i, p, m: [x["n"] for x in m], -0.5),
        c=(lambda i, p, m: np.float32([len(t) for t in p]), 1.0),
        d=(lambda i, p, m: [torch.tensor(3) for _ in p], 0.0),
    )
    scores = scorer(IMAGES, PROMPTS, 4)
    numbers = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).repeat_interleave(4)
    assert torch.equal(scores.total, 2 * VALUES - 0.5 * numbers + 1)
    assert list(scores.rewards) == [f"users_rewards:{n}" for n in "abcd"]
    assert scores.dropped.tolist() == [False] * 3
    texts = ("a",) * 4 + ("b",) * 4 + ("c",) * 4
    assert reward.calls[0] == ("a", 12, texts, [1] * 4 + [2] * 4 + [3] * 4)


def test_a_group_that_fails_once_is_asked_again_alone(reward):
    state = {"failed": False}

    def shaky(images, prompts, metadata):
        found = first(images)
        if not state["failed"]:
            state["failed"] = True
            found[5] = float("nan")
        return found

    scores = reward(shaky=(shaky, 1.0))(IMAGES, PROMPTS, 4)
    assert torch.equal(scores.total, VALUES) and not scores.dropped.any()
    assert [call[1:3] for call in reward.calls[1:]] == [(4, ("b",) * 4)]


@pytest.mark.parametrize("failure", ["raise", "nan", "inf"])
def test_a_group_that_always_fails_is_dropped(reward, failure, caplog):
    def broken(images, prompts, metadata):
        found = first(images)
        if "b" in prompts:
            if failure == "raise":
                raise ConnectionError("no answer")
            found[prompts.index("b") + 1] = float(failure)
        return found

    scores = reward(retries=2, fine=(first, 1.0), broken=(broken, 1.0))(IMAGES, PROMPTS, 4)
    assert scores.dropped.tolist() == [False, True, False]
    kept = torch.tensor([True, False, True]).repeat_interleave(4)
    assert torch.equal(scores.total[kept], 2 * VALUES[kept])
    assert scores.total[~kept].isnan().all()
    assert scores.rewards["users_rewards:broken"][~kept].isnan().all()
    assert torch.equal(scores.rewards["users_rewards:fine"], VALUES)
    assert "failed for 1 of 3 groups, which are dropped" in caplog.text
    # Once for all; then, twice, only the group that failed (all of them after an exception).
    asked = [call[2][0] for call in reward.calls if call[0] == "broken"]
    assert asked == (["a", "a", "b", "c", "b"] if failure == "raise" else ["a", "b", "b"])


def test_a_reward_that_always_fails_raises(reward):
    def broken(images, prompts, metadata):
        raise RuntimeError("out\nof ink")

    line = broken.__code__.co_firstlineno + 1
    message = rf"failed for all 3 groups after 1 retries \(RuntimeError: out of ink, {__file__} "
    message += rf"line {line}\)"
    with pytest.raises(rewards.RewardError, match=message):
        reward(retries=1, broken=(broken, 1.0))(IMAGES, PROMPTS, 4)
    assert len(reward.calls) == 1 + 3
    nan = (lambda i, p, m: [float("nan")] * len(i), 1.0)
    with pytest.raises(rewards.RewardError, match="returned scores that are not finite"):
        reward(nan=nan)(IMAGES, PROMPTS, 4)


@pytest.mark.parametrize(
    "wrong", [lambda i, p, m: first(i)[:-1], lambda i, p, m: first(i)[:, None], lambda i, p, m: 1.0]
)
def test_a_wrong_count_raises_at_once(reward, wrong):
    message = r"returned scores of shape .* for 12 images, but one score an image"
    with pytest.raises(rewards.RewardError, match=message):
        reward(wrong=(wrong, 1.0))(IMAGES, PROMPTS, 4)
    assert len(reward.calls) == 1


def test_a_reward_in_the_form_of_flow_grpo_is_told_at_once(reward):
    with pytest.raises(rewards.RewardError, match=r"as flow_grpo's rewards do, .* the first of"):
        reward(theirs=(lambda i, p, m: (first(i), {}), 1.0))(IMAGES, PROMPTS, 4)
    assert len(reward.calls) == 1


def test_nanos_rewards_look_at_the_prompts_before_the_first_image():
    circle = {"class": "circle", "count": 1, "color": "red"}
    for name in ("nano_strict", "nano_partial"):
        scorer = rewards.Scorer({name: 1.0})
        scorer.prepare(Prompts.of(["a"], [{"include": [circle]}]))
        with pytest.raises(rewards.RewardError, match="'a circle' comes without a list 'include'"):
            scorer.prepare(Prompts.of(["a circle"]))
        for include, named in (
            ([], r"include \[\], which asks for nothing"),
            ([circle, {**circle, "count": 2.0}], r"include\[1\]\.count 2\.0"),
            ([{**circle, "class": "dog"}], r"include\[0\]\.class 'dog'"),
            ([{**circle, "color": "mauve"}], r"include\[0\]\.color 'mauve', which is none of"),
        ):
            with pytest.raises(rewards.RewardError, match=f"of the prompt 'a' has {named}"):
                scorer.prepare(Prompts.of(["a"], [{"include": include}]))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "'beauty' is unknown, but one of .*nano_strict"),
        ("no.such.module:f", "cannot be loaded from no.such.module:f .No module named"),
        ("flowgrpo.rewards.nano:absent", "cannot be loaded .*has no attribute 'absent'"),
        ("flowgrpo.rewards:REWARDS", "is dict, but a function is expected"),
    ],
)
def test_unknown_rewards(name, message):
    with pytest.raises(rewards.RewardError, match=message):
        rewards.load(name)


def test_rewards_on_other_scales_are_brought_together(reward):
    """Reference: numpy, group by group; a group that one reward failed for is left out of both."""
    draw = np.random.default_rng(0)
    level = np.repeat([0.0, 50.0, 7.0], 4)
    fine = level + 0.01 * draw.standard_normal(12)
    coarse = 30 * draw.standard_normal(12) * np.repeat([1, 3, 2], 4)
    failing = coarse.copy()
    failing[9] = np.nan

    def total(how, second, kept):
        def at(values):
            return lambda images, p, m: values[images[:, 0, 0, 0].numpy()]

        found = reward(0, how, a=(at(fine), 2.0), b=(at(second), -1.0))(IMAGES, PROMPTS, 4)
        expected = np.zeros(12)
        for weight, values in ((2.0, fine), (-1.0, second)):
            groups = values.reshape(3, 4)
            if how == "std":
                groups = groups / np.sqrt(groups[kept].var(axis=1).mean())
            else:
                groups = (groups - groups.mean(1, keepdims=True)) / groups.std(1, keepdims=True)
            expected += weight * groups.ravel()
        rows = np.repeat(kept, 4)
        assert found.total.numpy()[rows] == pytest.approx(expected[rows], rel=1e-5, abs=1e-5)
        assert found.dropped.tolist() == (~kept).tolist()
        assert found.rewards["users_rewards:a"].numpy() == pytest.approx(fine)

    for how in ("std", "group"):
        total(how, coarse, np.array([True, True, True]))
        total(how, failing, np.array([True, True, False]))


@pytest.mark.parametrize("how", ["std", "group"])
def test_a_reward_that_never_differs_adds_nothing_to_compare(reward, how):
    scores = reward(normalize=how, a=(first, 1.0), b=(lambda i, p, m: [0.1] * len(i), 1.0))(
        IMAGES, PROMPTS, 4
    )
    groups = scores.total.view(3, 4)
    alone = reward(normalize=how, a=(first, 1.0))(IMAGES, PROMPTS, 4).total.view(3, 4)
    centred = groups - groups.mean(1, keepdim=True)
    assert torch.allclose(centred, alone - alone.mean(1, keepdim=True), atol=1e-6)


LEVELS = torch.tensor([0.1, 0.7, 0.3]).repeat_interleave(4)


def rounded(images, prompts, metadata):
    """Equal inside a group but for the last bits of float32, as a network's batches leave them."""
    return LEVELS * (1 + 6e-8 * torch.tensor([0.0, 1.0, 0.0, 0.0]).repeat(3))


@pytest.mark.parametrize("how", ["std", "group"])
@pytest.mark.parametrize("level", [lambda i, p, m: LEVELS, rounded], ids=["equal", "rounded"])
def test_a_reward_that_tells_only_groups_apart_leaves_the_others_their_advantages(
    reward, how, level
):
    """With the std of all rewards as the divisor: levels over 0 would be all of it."""
    config = OptimConfig(advantage_std="global")
    both = reward(normalize=how, a=(first, 1.0), b=(level, 1.0))(IMAGES, PROMPTS, 4)
    alone = reward(normalize=how, a=(first, 1.0))(IMAGES, PROMPTS, 4)
    assert torch.equal(both.total, alone.total) and both.total.abs().max() < 100
    found, _ = advantages(both.total.view(3, 4), config)
    # first: 0 to 11, whose std inside a group of 4 is sqrt(5) / 2.
    scores = VALUES / (np.sqrt(5) / 2) if how == "std" else (VALUES % 4 - 1.5) / (np.sqrt(5) / 2)
    centred = (scores.view(3, 4) - scores.view(3, 4).mean(1, keepdim=True)).flatten()
    assert found.numpy() == pytest.approx((centred / scores.std(correction=0)).numpy(), rel=1e-3)


@pytest.mark.parametrize("how", ["std", "group"])
def test_alone_it_says_nothing_and_a_group_that_failed_stays_dropped(reward, how):
    def failing(images, prompts, metadata):
        return LEVELS.masked_fill(torch.arange(12) == 5, torch.nan)[images[:, 0, 0, 0].long()]

    scores = reward(0, how, a=(failing, 1.0))(IMAGES, PROMPTS, 4)
    assert scores.dropped.tolist() == [False, True, False]
    assert (scores.total.view(3, 4)[[0, 2]] == 0).all() and scores.total[4:8].isnan().all()


@pytest.mark.parametrize("how", ["std", "group"])
def test_every_group_is_dropped_by_one_reward_or_another(reward, how):
    def failing(*groups):
        return lambda images, p, m: [
            np.nan if value // 4 in groups else value for value in first(images).tolist()
        ]

    scores = reward(0, how, a=(failing(0), 1.0), b=(failing(1, 2), 1.0))(IMAGES, PROMPTS, 4)
    assert scores.dropped.all() and scores.total.isnan().all()


def test_nanos_rewards_by_name():
    metadata = [{"include": [{"class": "circle", "count": 1}], "tag": "single_object"}] * 2
    images = torch.full((2, 3, 64, 64), 255, dtype=torch.uint8)
    for name in ("nano_strict", "nano_partial"):
        found = rewards.load(name)(images, ["a circle"] * 2, metadata)
        assert len(found) == 2 and np.isfinite(found).all()
