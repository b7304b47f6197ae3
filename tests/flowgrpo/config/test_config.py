"""Configuration: every rule explains itself, and a config survives JSON."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import math
import typing
from pathlib import Path

import numpy as np
import pytest
import torch

from flowgrpo import config as module
from flowgrpo.config import Config, ConfigError, from_dict, from_json, replace, to_json

SECTIONS = [typing.get_type_hints(Config)[f.name] for f in dataclasses.fields(Config)][1:]


# Field changes that break a rule, and what the sentence must name.
BAD = [
    ({"sample.batch_size": 50}, "divides 96, for example 48"),
    ({"sample.batch_size": 96}, "2 does not divide the 1 chunks"),
    ({"optim.updates_per_iteration": 3}, "3 does not divide the 2 chunks"),
    ({"sample.group_size": 1}, "at least 2 images"),
    ({"sample.steps": 1}, "at least 2 steps"),
    ({"sample.window_range": (0, 11)}, "0 <= first < end <= steps (10)"),
    ({"sample.window_range": (4, 4)}, "0 <= first < end"),
    ({"sample.window_size": 4, "sample.window_range": (0, 3)}, "does not fit"),
    ({"sample.window_size": -1}, "window_size >= 0"),
    ({"sample.transition": "euler"}, "'flow_sde', 'dance_sde', 'cps'"),
    ({"sample.noise_level": math.inf}, "sample.noise_level is inf"),
    ({"optim.guard": True, "sample.transition": "cps"}, "choose flow_sde or dance_sde"),
    ({"sample.transition": "cps", "sample.window_range": (0, 10)}, "end the range at 9."),
    ({"sample.transition": "cps", "sample.noise_level": 2.0}, "below 2, such as 0.8."),
    ({"optim.lr": math.nan}, "optim.lr is nan"),
    ({"optim.lr": "1e-3"}, "type float is expected"),
    ({"optim.betas": (0.9, 1.0)}, "below 1"),
    ({"optim.clip_range": 1.5}, "below 1"),
    ({"optim.ema_decay": 1.0}, "below 1"),
    ({"optim.guard": 1}, "type bool is expected"),
    ({"policy.lora_rank": 0}, "policy.lora_rank is 0"),
    ({"policy.lora_rank": 4.0}, "type int is expected"),
    ({"policy.lora_targets": ()}, "policy.lora_targets is empty"),
    ({"reward.weights": {}}, "at least one reward"),
    ({"reward.weights": {"a": math.inf}}, "finite weight"),
    ({"reward.weights": {"a": "b"}}, "dict[str, float]"),
    ({"run.seed": 2**63}, "below 2^63"),
    ({"run.seed": True}, "type int is expected"),
    ({"run.steps": 0}, "greater than 0"),
    ({"sample.stpes": 8}, "did you mean 'steps'?"),
    ({"sampel.steps": 8}, "did you mean 'sample'?"),
    ({"recipe.name": "a"}, "set recipe itself"),
    ({"sample.steps": 10**400}, "whole numbers must be below 2^63"),
    ({"sample": 3, "sample.steps": 4}, "sample is 3, but a value of type SampleConfig"),
    ({"optim.kl": "x" * 10_000}, "'xxxx"),
    ({"a\nb": 1}, "'a\\nb' is no field"),
    # The rows have too many possible divisors to try all.
    ({"sample.prompts_per_iteration": 10**15 + 37, "sample.batch_size": 7}, "for example 6."),
]


PATHS = ("policy.model", "policy.text_cache", "sample.prompts", "run.out", "run.resume")


@pytest.mark.parametrize("name", PATHS)
def test_a_path_is_text_with_the_home_directory_in_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    section, field = name.split(".")

    def stored(value):
        config = replace(Config(), **{name: value})
        assert from_json(to_json(config)) == config
        return getattr(getattr(config, section), field)

    assert stored("~/a b") == stored(Path("~/a b")) == stored(tmp_path / "a b")
    assert stored("~/a b") == str(tmp_path / "a b")
    assert stored(Path("x") / "y") == str(Path("x/y"))
    # Names, and a ~ elsewhere, are no paths to be completed.
    for value in ("nano", "", "owner/name", "a~b", "./~/x", "hub:owner/name"):
        assert stored(value) == value
    with pytest.raises(ConfigError, match=rf"{name} is b'x', but"):
        replace(Config(), **{name: b"x"})


def test_the_run_directory_and_rewards_options_take_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert replace(Config(), **{"run.out": "~/runs/x"}).out_dir == tmp_path / "runs" / "x"
    config = replace(Config(), **{"reward.options": {"clipscore.model": tmp_path / "clip"}})
    assert config.reward.options == {"clipscore.model": str(tmp_path / "clip")}
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(("changes", "words"), BAD, ids=lambda v: str(v)[:40])
def test_a_broken_rule_says_so_in_one_sentence(changes, words):
    with pytest.raises(ConfigError) as caught:
        replace(Config(), **changes)
    text = str(caught.value)
    assert words in text
    assert "\n" not in text and text.endswith(".") and text.count(". ") == 0
    assert len(text) < 1000


def test_a_number_that_python_does_not_write():
    with pytest.raises(ConfigError, match=r"reward.weights is a dict too long to be shown, but"):
        replace(Config(), **{"reward.weights": {"a": -(10**5000)}})


def test_numbers_of_other_libraries_are_numbers():
    """Python's in the result, so that it is JSON; a number of another kind stays refused."""
    changes = {
        "optim.lr": np.float32(0.5),
        "optim.guard": np.bool_(True),
        "optim.betas": [np.float64(0.5), torch.tensor(0.25)],
        "sample.steps": np.array(6),
        "run.seed": torch.tensor(3),
        "reward.weights": {"a": np.float32(2)},
        "policy.lora_targets": ["to_q"],
    }
    config = replace(Config(), **changes)
    optim, weights = config.optim, config.reward.weights
    assert (optim.lr, optim.guard, optim.betas, weights) == (0.5, True, (0.5, 0.25), {"a": 2.0})
    assert (config.sample.steps, config.run.seed, config.policy.lora_targets) == (6, 3, ("to_q",))
    values = (optim.lr, *optim.betas, optim.guard, config.sample.steps, config.run.seed)
    assert [type(value) for value in values] == [float] * 3 + [bool, int, int]
    assert from_json(to_json(config)) == config
    for name, value in (("run.seed", np.bool_(True)), ("sample.steps", np.float32(6))):
        with pytest.raises(ConfigError, match="type int is expected"):
            replace(Config(), **{name: value})
    with pytest.raises(ConfigError, match="type float is expected"):
        replace(Config(), **{"optim.lr": torch.ones(1)})


def test_derived_numbers():
    config = replace(
        Config(),
        **{
            "sample.prompts_per_iteration": 6,
            "sample.group_size": 8,
            "sample.batch_size": 12,
            "sample.window_size": 3,
            "sample.window_range": (1, 7),
            "run.steps": 7,
        },
    )
    assert (config.sample.rows, config.sample.chunks, config.chunks_per_update) == (48, 4, 2)
    assert (config.updates, config.sample.trained_steps) == (14, 3)
    assert config.sample.window_bounds == (1, 7)


def test_a_trained_reward_is_reported_too():
    changes = {"reward.report": ("pickscore",), "reward.weights": {"mine:f": 1.0, "pickscore": 0.1}}
    assert replace(Config(), **changes).reported == ("pickscore", "mine:f")


@pytest.mark.parametrize("steps", [2, 9, 10, 28, 100, 101, 250])
def test_without_a_window_all_but_the_last_steps_are_trained(steps):
    """flow_grpo: num_train_timesteps = int(sample.num_steps * timestep_fraction), 0.99."""
    sample = replace(Config(), **{"sample.steps": steps}).sample
    assert sample.trained_steps == int(steps * 0.99)
    assert sample.window_bounds == (0, int(steps * 0.99))


def test_json_round_trip_is_exact():
    config = replace(
        Config(recipe="x"),
        **{
            "optim.lr": 0.1 + 0.2,
            "sample.window_range": (0, 6),
            "reward.weights": {"b": 1.0, "a": 1e-300},
            "reward.report": ("a",),
            "run.seed": 2**63 - 1,
            "policy.lora_targets": ("q",),
        },
    )
    again = from_json(to_json(config))
    assert again == config
    assert list(again.reward.weights) == ["b", "a"]
    assert from_json(to_json(Config())) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ('{"run": {"seed": ' + "1" * 5_000 + "}}", "no JSON"),
        ("[]", "an object with the fields of Config"),
        ('{"sample": 3}', "an object with the fields of SampleConfig"),
        ('{"sample": {"step": 3}}', "did you mean 'steps'?"),
        ('{"optim": {"betas": [0.9, 0.99, 0.999]}}', "tuple[float, float]"),
        ('{"run": {"threads": -1}}', "at least 0"),
    ],
)
def test_json_of_something_else_is_refused(text, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?").replace("[", r"\[")):
        from_json(text)


def test_replace_takes_whole_sections_and_leaves_the_rest():
    section = module.OptimConfig(lr=1.0)
    changed = replace(Config(), **{"optim": section, "optim.beta": 0.5, "recipe": "r"})
    assert (changed.optim.lr, changed.optim.beta, changed.recipe) == (1.0, 0.5, "r")
    assert changed.sample == Config().sample
    assert from_dict({}) == Config()


@pytest.mark.parametrize("section", SECTIONS, ids=lambda s: s.__name__)
def test_every_field_is_frozen_typed_and_documented(section):
    assert section.__dataclass_params__.frozen and section.__bases__ == (object,)
    body = ast.parse(inspect.getsource(section)).body[0].body
    for place, node in enumerate(body):
        if isinstance(node, ast.AnnAssign):
            following = body[place + 1]
            documented = isinstance(following, ast.Expr) and isinstance(
                following.value, ast.Constant
            )
            assert documented, f"{section.__name__}.{node.target.id} needs a line under it"
