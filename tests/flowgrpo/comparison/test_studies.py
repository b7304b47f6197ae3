"""Studies: which configurations their arms have, and which studies are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from flowgrpo import nano
from flowgrpo.comparison.studies import (
    COMMON,
    SET_HERE,
    STUDIES,
    Study,
    check_seeds,
    find_study,
    folder_name,
    parse_study,
    select_arms,
)
from flowgrpo.config import ConfigError, replace, to_dict
from flowgrpo.nano.recipes import awm
from flowgrpo.objectives import OBJECTIVES, objective_of
from flowgrpo.rewards.differentiable import differentiable_rewards

ARMS = {"A": {}, "B": {"optim.lr": 1e-4}}


def make(**changes) -> Study:
    return Study(**{"name": "s", "recipe": "nano", "arms": ARMS, "images": 96, **changes})


@pytest.mark.parametrize("name", STUDIES)
def test_shipped_studies_have_a_question_a_budget_and_valid_arms(name):
    study = STUDIES[name]
    assert study.name == name and study.question.endswith("?")
    configs = study.with_budget(None, None).configs()
    assert list(configs) == list(study.arms)
    for label, changes in study.arms.items():
        fields = to_dict(configs[label])
        for field, value in changes.items():
            section, _, rest = field.partition(".")
            assert fields[section][rest] == value


def test_shipped_studies_compare_what_the_paper_compares():
    assert {c["optim.objective"] for c in STUDIES["methods"].arms.values()} == {
        *("grpo", "sft", "dpo", "refl", "orw", "awm", "nft")
    }
    steps = STUDIES["steps"].configs()
    assert [config.sample.steps for config in steps.values()] == [5, 10, 20, 40]
    assert {config.sample.eval_steps for config in steps.values()} == {40}
    kl = STUDIES["kl"].configs()
    assert [c.optim.beta for c in kl.values()] == [0.0, nano.recipe().optim.beta, 0.4]
    assert {"quality", "diversity"} <= set(STUDIES["kl"].panels)
    assert all("jpeg_compressibility" in c.reward.weights for c in kl.values())


def test_the_methods_that_are_there_can_be_trained():
    """Each with its own rules, such as other noise for each image of a deterministic rollout."""
    configs = STUDIES["methods"].configs().values()
    there = [config for config in configs if config.optim.objective in OBJECTIVES]
    assert {config.optim.objective for config in there} >= {"grpo", "sft", "orw", "awm", "nft"}
    for config in there:
        if objective_of(config).differentiable:
            assert differentiable_rewards(config.reward)
    # As the recipe of that name, but for the rate, which does not fall.
    [ours] = [config for config in there if config.optim.objective == "awm"]
    recipe = awm(**{"optim.decay": 0})
    assert (ours.sample, ours.reward) == (recipe.sample, recipe.reward)
    assert replace(ours.optim, clip_range=recipe.optim.clip_range) == recipe.optim


def test_arms_override_the_common_fields_and_the_command_line_overrides_both():
    study = make(common={"optim.lr": 5e-4, "sample.group_size": 24})
    configs = study.configs()
    assert [c.optim.lr for c in configs.values()] == [5e-4, 1e-4]
    assert {c.sample.group_size for c in configs.values()} == {24}
    configs = study.configs({"sample.group_size": 36, "optim.betas": [0.9, 0.95]})
    assert {c.sample.group_size for c in configs.values()} == {36}
    assert {c.optim.betas for c in configs.values()} == {(0.9, 0.95)}
    assert [c.optim.lr for c in configs.values()] == [5e-4, 1e-4]


def test_all_arms_measure_the_kl_by_one_noise_level():
    study = make(arms={"A": {}, "B": {"sample.noise_level": 0.3}})
    levels = {config.run.eval_kl for config in study.configs().values()}
    assert levels == {nano.recipe().sample.noise_level}
    louder = make(common={"sample.noise_level": 0.5}).configs()
    assert {config.run.eval_kl for config in louder.values()} == {0.5}
    assert {c.run.eval_kl for c in study.configs({"run.eval_kl": 0.1}).values()} == {0.1}
    # The guided evaluation of the untrained model is no part of a comparison.
    assert {config.run.eval_guidance for config in study.configs().values()} == {1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arms": {"A": {}}}, "has 1 entries, but a comparison needs at least 2"),
        ({"arms": {"A": {}, "a/b": {}}}, "study.arms has 'a/b', but a label of letters"),
        ({"arms": {"A": {}, "base": {}}}, "other than 'base'"),
        ({"arms": {"A": {}, "": {}}}, "study.arms has ''"),
        ({"arms": {"A": {}, "..": {}}}, "study.arms has '..'"),
        ({"arms": {"a b": {}, "a-B": {}}}, "'a b' and 'a-B', but their folders would have one"),
        ({"name": "a/b"}, "study.name is 'a/b'"),
        ({"name": "."}, "study.name is '.'"),
        ({"images": -1}, "images is -1"),
        ({"seconds": float("nan")}, "seconds nan"),
        ({"evaluations": 0}, "at least one evaluation"),
        ({"panels": ("image",)}, "did you mean 'images'?"),
        ({"images": "many"}, "study.images is 'many', but a value of type int"),
        ({"arms": {"A": {}, 5: {}}}, "study.arms is"),
    ],
)
def test_a_study_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({"arms": {"A": {}, "B": {"optim.rate": 1}}}, {}, "arm 'B' of the study s: optim.rate is"),
        ({"arms": {"A": {}, "B": {"lr": 1}}}, {}, "arm 'B' of the study s: lr is no field"),
        ({"arms": {"A": {}, "B": {"optim.lr": 0.0}}}, {}, "optim.lr is 0.0, but it must be"),
        ({"arms": {"A": {}, "B": {"optim.lr": "a"}}}, {}, "optim.lr is 'a', but a value of type"),
        ({"arms": {"A": {}, "B": {}}}, {}, "arm 'B' of the study s repeats arm 'A'"),
        ({}, {"optim.lr": 1e-3}, "arm 'B' of the study s repeats arm 'A'"),
        ({"common": {"run.seed": 1}}, {}, "arm 'A' of the study s sets run.seed, but a comp"),
        ({}, {"run.steps": 1}, "sets run.steps, but a comparison sets it by itself"),
        ({"arms": {"A": {}, "B": {"sample.eval_steps": 5}}}, {}, "sets sample.eval_steps, but in"),
        ({"arms": {"A": {}, "B": {"policy.model": "x"}}}, {}, "sets policy.model, but in that all"),
        (
            {
                "common": {"reward.report": ()},
                "arms": {"A": {}, "B": {"reward.weights": {"ocr": 1.0}}},
            },
            {},
            "is scored by 'ocr' and arm 'A' by 'nano_strict'",
        ),
        ({"recipe": "nanno"}, {}, "recipe 'nanno' is unknown"),
    ],
)
def test_arms_that_cannot_be_compared_are_refused(changes, overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        make(**changes).configs(overrides)


def test_the_fields_that_are_refused_are_fields():
    fields = to_dict(nano.recipe())
    for name in (*SET_HERE, *COMMON):
        section, _, field = name.partition(".")
        assert field in fields[section], name


def test_the_budget_of_the_command_line_replaces_the_study_s():
    study = make(images=96, seconds=10.0)
    assert study.with_budget(None, None) == study
    only = study.with_budget(500, None)
    assert (only.images, only.seconds) == (500, 0.0)
    only = study.with_budget(None, 2.5)
    assert (only.images, only.seconds) == (0, 2.5)
    both = study.with_budget(500, 2.5)
    assert (both.images, both.seconds) == (500, 2.5)
    with pytest.raises(ConfigError, match="the study s has no budget, but images or seconds"):
        make(images=0).with_budget(None, None)
    for images, seconds in ((0, None), (-1, None), (None, 0.0), (None, float("nan"))):
        with pytest.raises(ConfigError, match="but it must be greater than 0"):
            study.with_budget(images, seconds)


YAML = """
question: Does a smaller rate do?
recipe: nano
images: 960
arms:
  recipe:
  small: {optim.lr: 1e-4, sample.window_range: [0, 3], sample.window_size: 2}
panels: [seconds, kl]
"""


def test_a_study_of_a_file(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text(YAML)
    study = find_study(str(path))
    assert (study.name, study.images, study.panels) == ("rates", 960, ("seconds", "kl"))
    recipe, small = study.configs().values()
    assert recipe.optim == nano.recipe().optim
    # YAML 1.1 would read 1e-4 as a text.
    assert small.optim.lr == 1e-4 and small.sample.window_range == (0, 3)
    values = {"recipe": "nano", "seconds": 3, "arms": {"A": {}, "B": {"optim.lr": 0.1}}}
    other = tmp_path / "s.json"
    other.write_text(json.dumps(values))
    assert find_study(str(other)).seconds == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arms: [", "is no YAML ("),
        ("a: 1\na: 2", "'a' stands there twice"),
        ("- 1", "holds [1], but an object with recipe"),
        ("", "holds None"),
        ("recipe: nano", "has no arms"),
        ("arms: {A: , B: }", "has no recipe"),
        ("recipe: nano\narm: {}", "has 'arm' (did you mean 'arms'?)"),
        ("recipe: nano\narms: [A, B]", "study.arms is"),
        ("recipe: nano\narms: {A: , B: 3}", "study.arms is"),
        ("!!python/object/apply:os.getcwd []", "is no YAML"),
    ],
)
def test_a_file_that_is_no_study_is_refused(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        parse_study(text, Path("mine.yaml"))
    assert "'mine.yaml'" in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_no_json_says_so():
    with pytest.raises(ConfigError, match="is no JSON"):
        parse_study("recipe: nano", Path("mine.json"))


def test_unknown_studies_and_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"'method' is unknown \(did you mean 'methods'\?\)"):
        find_study("method")
    with pytest.raises(ConfigError, match=r"no\.yaml' cannot be read"):
        find_study(str(tmp_path / "no.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        find_study("a\0.yaml")


def test_seeds_are_whole_and_each_once():
    check_seeds((0, 5, 2**63 - 1))
    for seeds, message in (
        ((), "is empty"),
        ((0, 1, 0), "has 0 twice"),
        ((-1,), "-1"),
        ((2**63,), "below"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_seeds(seeds)


def test_arms_are_chosen_in_the_study_s_order():
    study = make(arms={"A": {}, "B": {"optim.lr": 1e-4}, "C 1": {"optim.lr": 1e-5}})
    assert select_arms(study, ()) == ("A", "B", "C 1")
    assert select_arms(study, ("C 1", "A")) == ("A", "C 1")
    with pytest.raises(ConfigError, match=r"'C 2' \(did you mean 'C 1'\?\), but arms of the study"):
        select_arms(study, ("C 2",))


def test_folders_of_labels():
    assert folder_name("T = 5") == "T-=-5" and folder_name("beta 0.04") == "beta-0.04"
