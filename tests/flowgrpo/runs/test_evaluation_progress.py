"""The progress of an evaluation: what is shown, when, and that the images stay what they are."""

from __future__ import annotations

import io
import re
import threading

import pytest
import torch
from rich.console import Console

from flowgrpo import rewards
from flowgrpo.evaluation import evaluate
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.policies import Policy
from flowgrpo.runs import display
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from support import cpu_graphs, processes

CALLS: list = []


def slow(images, prompts, metadata):
    """A reward that notes when it is asked."""
    CALLS.append(("rewards", len(images)))
    return processes.red(images, prompts, metadata)


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory):
    config = processes.make(tmp_path_factory.mktemp("policy"), **{"run.eval_prompts": 5})
    return config, Policy.load(config.policy.model, device="cpu", dtype="float32")


@pytest.mark.parametrize(
    ("batch_size", "told"),
    [(3, [3, 6, 9, 10]), (4, [4, 8, 10]), (5, [5, 10]), (9, [9, 10]), (32, [10])],
)
def test_batches_that_are_told_have_the_bits_of_one_rollout(tiny_policy, batch_size, told):
    config, policy = tiny_policy
    held = load_evaluation_set(config)
    # In batches as there: a text's embedding depends on their sizes, on some CPUs.
    texts, uncond = list(held.prompts.texts), policy.encode([""])
    conditioning = policy.encode(texts[:batch_size])
    for start in range(batch_size, len(texts), batch_size):
        conditioning = conditioning.then(policy.encode(texts[start : start + batch_size]))
    whole = rollout.rollout(
        policy,
        conditioning,
        ode_schedule(policy, 3),
        torch.arange(3)[:, None].expand(3, 10),
        groups=torch.arange(5).repeat_interleave(2),
        seeds=held.seeds[:10],
        batch_size=batch_size,
        uncond=uncond,
        guidance_scale=3.0,
    ).latents[-1]
    whole = torch.cat([policy.decode(part) for part in whole.split(batch_size)])
    seen = []
    images = evaluate.generate_images(
        policy,
        held.prompts.texts,
        held.seeds[:10],
        2,
        steps=3,
        batch_size=batch_size,
        guidance_scale=3.0,
        on_progress=lambda *told: seen.append(told),
    )
    assert torch.equal(images, whole)
    assert seen == [("sampling", count) for count in told]


@pytest.mark.slow
def test_all_batches_replay_one_graph(pixel_model, tmp_path):
    parts, _ = cpu_graphs.made(pixel_model, tmp_path)
    policy, texts, seeds = parts.policy, cpu_graphs.setups.TEXTS[:5], torch.arange(10)

    def images():
        options = {"steps": 3, "batch_size": 4, "guidance_scale": 2.0}
        return evaluate.generate_images(policy, texts, seeds, 2, **options)

    found, recorder = images(), policy.graphs.recorder
    assert recorder.captures == 1
    assert torch.equal(found, cpu_graphs.eager(policy, images))


def test_scoring_is_told_before_the_rewards_and_changes_nothing(tiny_policy):
    config, policy = tiny_policy
    held, scorer = (
        load_evaluation_set(config),
        rewards.Scorer({"test_evaluation_progress:slow": 1.0}),
    )
    CALLS.clear()
    options = {"steps": 3, "batch_size": 10}
    watched = evaluate.evaluate(
        policy, held, scorer, **options, on_progress=lambda *told: CALLS.append(told)
    )
    count = len(held.seeds)
    assert CALLS[-2:] == [("scoring", count), ("rewards", count)]
    assert CALLS[-3] == ("sampling", count)
    assert watched.to_dict() == evaluate.evaluate(policy, held, scorer, **options).to_dict()


class Clock:
    """Stands for `time` in display.py."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    found = Clock()
    monkeypatch.setattr(display, "time", found)
    return found


def plain(total: int, seconds: float, clock: Clock, batch: int = 1) -> list[str]:
    """The lines of an evaluation whose batches take `seconds` each, and the rewards ten."""
    console = Console(file=io.StringIO(), width=60)
    with display.EvaluationProgress(console, "plain", "base", total, ["a", "b[red]"]) as watch:
        for images in range(batch, total + 1, batch):
            clock.now += seconds
            watch("sampling", images)
        watch("scoring", total)
        clock.now += 10
    return console.file.getvalue().splitlines()


def test_a_long_evaluation_is_about_ten_lines(clock):
    lines = plain(2200, 2.0, clock)
    assert len(lines) == 10
    assert lines[0] == "base  220/2200 images  1:06:00 left  7:20 passed"
    assert lines[-2] == "base  1980/2200 images  7:20 left  1:06:00 passed"
    assert lines[-1] == "base: scoring by a, b[red]  2200 images  1:13:20 passed"


def test_a_short_evaluation_is_silent_and_one_of_a_minute_nearly_so(clock):
    assert plain(290, 0.1, clock) == []
    lines = plain(70, 1.0, clock)
    assert lines == [
        "base  30/70 images  0:40 left  0:30 passed",
        "base  60/70 images  0:10 left  1:00 passed",
        "base: scoring by a, b[red]  70 images  1:10 passed",
    ]


def test_the_first_batch_does_not_count_for_the_time_left(clock):
    console = Console(file=io.StringIO(), width=100)
    with display.EvaluationProgress(console, "plain", "base", 40, ["a"]) as watch:
        for seconds, images in ((300, 10), (20, 20), (20, 30)):
            clock.now += seconds
            watch("sampling", images)
    # Alone it is all that is known; and the second one came too soon after it for a line.
    assert console.file.getvalue().splitlines() == [
        "base  10/40 images  15:00 left  5:00 passed",
        "base  30/40 images  0:20 left  5:40 passed",
    ]


def test_what_takes_long_without_a_batch_says_so_by_itself(monkeypatch):
    monkeypatch.setattr(display, "QUIET", 0.05)
    said = threading.Event()
    console = Console(file=io.StringIO(), width=60)
    monkeypatch.setattr(console, "print", lambda text, **options: (said.set(), found.append(text)))
    found: list[str] = []
    with display.EvaluationProgress(console, "plain", "base", 4, ["a"]) as watch:
        assert said.wait(20)
        timer = watch._timer
    assert re.fullmatch(r"base  0/4 images  0:0\d passed", found[0])
    assert not timer.is_alive()
    with (
        pytest.raises(KeyError),
        display.EvaluationProgress(console, "plain", "base", 4, ["a"]) as watch,
    ):
        timer = watch._timer
        raise KeyError
    assert not timer.is_alive()


@pytest.mark.parametrize("terminal", [True, False])
def test_none_is_silent(terminal, clock):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    with display.EvaluationProgress(console, "none", "base", 10, ["a"]) as watch:
        for images in range(1, 11):
            clock.now += 100
            watch("sampling", images)
        watch("scoring", 10)
    assert console.file.getvalue() == ""
