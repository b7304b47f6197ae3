"""Recipes: found by name, and with the numbers of the papers."""

from __future__ import annotations

import pytest

from flowgrpo import plan
from flowgrpo.cli import train
from flowgrpo.config import Config, ConfigError, from_json, to_json
from flowgrpo.prompts.load import load_prompts
from flowgrpo.prompts.sets import NAMES
from flowgrpo.recipes import BETA, RECIPES, paper, recipe
from flowgrpo.rewards import Scorer


def custom() -> Config:
    """A recipe of the tests' own."""
    return Config(recipe="custom")


def broken() -> str:
    return "no config"


def test_recipes_are_found_by_name():
    assert recipe("nano").recipe == "nano"
    assert recipe("test_recipes:custom") == custom()
    for name, words in (
        ("nanno", "did you mean 'nano'?"),
        ("sd35m_genevl", "did you mean 'sd35m_geneval'?"),
        ("no_such_module:f", "cannot be loaded"),
        ("test_recipes:absent", "cannot be loaded"),
        ("test_recipes:broken", "returned str"),
    ):
        with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
            recipe(name)


# flow_grpo's general_ocr_sd3, geneval_sd3, pickscore_sd3; geneval_sd3_fast_nocfg,
# pickscore_sd3_fast_nocfg; grpo_guard.py; pickscore_flux, pickscore_flux_fast. Fields: K, G, T,
# guidance, noise level, transition, window, clip range, beta, lr, advantage_std.
SDE, CPS = "flow_sde", "cps"
NUMBERS = {
    "sd35m_geneval": (48, 24, 10, 4.5, 0.7, SDE, 0, 1e-4, 0.04, 3e-4, "global"),
    "sd35m_ocr": (48, 24, 10, 4.5, 0.7, SDE, 0, 1e-4, 0.04, 3e-4, "global"),
    "sd35m_pickscore": (48, 24, 10, 4.5, 0.7, SDE, 0, 1e-4, 0.01, 3e-4, "global"),
    "sd35m_geneval_window": (48, 24, 10, 1.0, 0.8, CPS, 3, 1e-5, 0.0, 3e-4, "global"),
    "sd35m_pickscore_window": (64, 18, 10, 1.0, 0.8, CPS, 3, 1e-5, 0.0, 3e-4, "global"),
    "sd35m_geneval_guard": (48, 24, 10, 4.5, 0.7, SDE, 0, 2e-6, 0.0, 1e-4, "group"),
    "sd35m_pickscore_guard": (48, 24, 10, 4.5, 0.7, SDE, 0, 4e-6, 0.0, 1e-4, "group"),
    "flux_pickscore": (48, 24, 6, 1.0, 0.9, SDE, 0, 1e-4, 0.0, 3e-4, "global"),
    "flux_pickscore_window": (48, 24, 6, 1.0, 0.8, CPS, 3, 1e-5, 0.0, 3e-4, "group"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_those_of_the_papers(name):
    found = recipe(name, memory=80.0)
    sample, optim, policy = found.sample, found.optim, found.policy
    assert NUMBERS[name] == (
        sample.prompts_per_iteration,
        sample.group_size,
        sample.steps,
        sample.guidance_scale,
        sample.noise_level,
        sample.transition,
        sample.window_size,
        optim.clip_range,
        optim.beta,
        optim.lr,
        optim.advantage_std,
    )
    flux = name.startswith("flux")
    assert (policy.lora_rank, policy.lora_alpha) == ((64, 128) if flux else (32, 64))
    assert sample.eval_steps == (28 if flux else 40)
    assert (optim.ema_decay, optim.ema_every, optim.weight_decay) == (0.9, 8, 1e-4)
    assert (optim.updates_per_iteration, optim.adv_clip, policy.resolution) == (2, 5.0, 512)
    assert optim.guard == name.endswith("guard")


@pytest.mark.parametrize("task", BETA)
def test_beta_in_both_conventions(task):
    code, true = paper(task, memory=80.0).optim, paper(task, kl="gaussian", memory=80.0).optim
    assert (code.kl, true.kl) == ("std_dev", "gaussian")
    assert code.beta == pytest.approx(10 * true.beta)
    assert true.beta == {"geneval": 0.004, "ocr": 0.004, "pickscore": 0.001}[task]


@pytest.mark.parametrize("name", sorted(set(RECIPES) - {"nano"}))
def test_every_recipe_stands_on_prompts_and_rewards_that_exist(name):
    found = recipe(name, memory=80.0)
    assert found.recipe == name and from_json(to_json(found)) == found
    assert found.sample.prompts in NAMES
    prompts = load_prompts(found.sample.prompts)
    assert len(prompts) >= found.sample.prompts_per_iteration
    scorer = Scorer(dict.fromkeys((*found.reward.weights, *found.reported), 1.0))
    for reward in scorer.rewards.values():
        for part in (prompts, load_prompts(found.sample.prompts, "heldout")):
            for text, entry in zip(part.texts, part.metadata, strict=True):
                assert reward.check is None or reward.check(text, entry) != ""
    assert found.reported[0] == next(iter(found.reward.weights)) + "_strict" * ("geneval" in name)
    small = name.endswith("_1gpu")
    assert found.policy.offload_text_encoders == small
    assert (found.sample.prompts_per_iteration == 8) == small


def test_overrides_and_the_command_line(monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory", lambda: 80.0)
    found = recipe("sd35m_ocr", steps=7, **{"sample.batch_size": 4, "optim.lr": 1e-5})
    assert (found.run.steps, found.sample.batch_size, found.optim.lr) == (7, 4, 1e-5)
    line = "sd35m_geneval_1gpu --policy.model /models/sd35 --optim.lr 1e-4"
    found = train.parse_train(line.split())
    assert (found.policy.model, found.optim.lr) == ("/models/sd35", 1e-4)
    assert found.sample == recipe("sd35m_geneval_1gpu").sample
    for words, message in (
        ("--sample.group-size 25", "does not divide the 200 rows of an iteration"),
        ("--optim.updates-per-iteration 5", "5 does not divide the 16 chunks"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.parse_train(["sd35m_geneval_1gpu", *words.split()])
