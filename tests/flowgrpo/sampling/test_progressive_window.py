"""The progressive window of MixGRPO, against the counters of its authors' code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from flowgrpo import train
from flowgrpo.config import Config, ConfigError, SampleConfig, replace
from flowgrpo.objectives.describe import sampled_by
from flowgrpo.sampling.schedule import progressive_start, windows
from support import setups
from support.processes import untimed

PROGRESSIVE = {"sample.window_schedule": "progressive"}


def by_counters(last, interval, stride, decay, start, decay_from, returns):
    """The authors' `update_iteration` (fastvideo/utils/grpo_states.py): a place and how long it was
    there, moved on once an iteration. Their last place is the last step, ours is `last`."""
    place, there = start, 0
    while True:
        yield place
        there += 1
        stays = interval
        if decay:
            stays = math.ceil(interval * math.exp(-decay * max(0, place - decay_from)))
        if there >= stays:
            there, place = 0, place + stride
        if place > last:
            place = start if returns else last
            there = 0 if returns else there


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize(
    ("stride", "decay", "low"), [(1, 0.0, 0), (1, 0.1, 2), (2, 0.3, 1), (4, 0, 0)]
)
def test_places_are_those_of_the_counters(stride, decay, low, returns):
    sample = SampleConfig(
        steps=25,
        window_size=4,
        window_range=(low, 24),
        window_schedule="progressive",
        window_interval=7,
        window_stride=stride,
        window_decay=decay,
        window_decay_from=13,
        window_return=returns,
    )
    counters = by_counters(20, 7, stride, decay, low, 13, returns)
    expected = list(itertools.islice(counters, 400))
    assert [progressive_start(sample, i) for i in range(400)] == expected
    # Every place that the stride reaches, and the last one.
    assert set(expected) == {*range(low, 21, stride), *(() if returns else (20,))}


def test_the_settings_of_the_authors():
    """25 iterations at a place, by one step; exponentially fewer from step 13 on."""
    sample = SampleConfig(
        steps=25,
        window_size=4,
        window_schedule="progressive",
        window_decay=0.1,
        window_decay_from=13,
    )
    starts = [progressive_start(sample, i) for i in range(600)]
    stays = [starts.count(place) for place in range(20)]
    assert stays[:14] == [25] * 14
    assert stays[14:] == [math.ceil(25 * math.exp(-0.1 * n)) for n in range(1, 7)]
    assert starts[-1] == 20 and starts == sorted(starts)


def test_all_groups_have_it_and_all_its_steps_are_there():
    config = replace(
        Config(), **{"sample.window_size": 3, "sample.window_interval": 2, **PROGRESSIVE}
    )
    sample = config.sample
    for iteration in range(20):
        steps = windows(sample.prompts_per_iteration, config, iteration)
        start = min(iteration // 2, sample.last_start)
        assert steps.shape == (3, sample.rows)
        assert torch.equal(steps, (start + torch.arange(3))[:, None].expand(-1, sample.rows))
    assert sampled_by(config).endswith("3 of the steps 0 to 8, on by 1 every 2 iterations")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (PROGRESSIVE, "which has one place for a window alone"),
        ({**PROGRESSIVE, "sample.window_size": 3, "sample.window_range": (2, 5)}, "one place"),
        ({"sample.window_interval": 5}, "window_interval is 5 with sample.window_schedule random"),
        ({"sample.window_return": True}, "only a progressive window has one"),
        ({**PROGRESSIVE, "sample.window_size": 2, "sample.window_stride": 0}, "greater than 0"),
        ({**PROGRESSIVE, "sample.window_size": 2, "sample.window_decay": -1.0}, "at least 0"),
        ({"sample.window_schedule": "sideways"}, "one of 'random', 'progressive' is expected"),
    ],
)
def test_windows_that_cannot_move(changes, words):
    with pytest.raises(ConfigError, match=words):
        replace(Config(), **changes)


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_window(pixel_model, tmp_path):
    """Three iterations at three places, shared prefixes among them, and one of them resumed."""
    changes = {
        **PROGRESSIVE,
        "sample.window_interval": 1,
        "sample.shared_noise": True,
        "run.steps": 3,
        "run.eval_every": 0,
        "run.eval_prompts": 1,
        "run.checkpoint_every": 1,
        "sample.eval_steps": 2,
    }
    config = setups.config(pixel_model, tmp_path, **changes)
    summary = train.run(replace(config, **{"run.out": str(tmp_path / "whole")}))
    parted = replace(config, **{"run.out": str(tmp_path / "parted")})
    train.run(replace(parted, **{"run.steps": 1}))
    train.run(replace(parted, **{"run.resume": str(tmp_path / "parted")}))
    assert summary["max_ratio_error"] == 0.0
    lines = [untimed(tmp_path / name / "metrics.jsonl") for name in ("whole", "parted")]
    whole, again = ([x for x in found if x["kind"] == "train"] for found in lines)
    assert len(whole) == 3 and whole == again
