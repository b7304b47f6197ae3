"""Recipes: found by name, and with the numbers of the papers."""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from flowgrpo import plan
from flowgrpo.cli import train
from flowgrpo.config import Config, ConfigError, from_json, replace, to_json
from flowgrpo.prompts.load import load_prompts
from flowgrpo.prompts.sets import NAMES
from flowgrpo.recipes import EMBEDDED, RECIPES, describe, recipe
from flowgrpo.recipes.sd3 import paper
from flowgrpo.rewards import Scorer, load

GOLDEN = Path(__file__).parents[2] / "golden"
CONFIGS = json.loads((GOLDEN / "flow_grpo_configs.json").read_text())
PEERS = {
    "geneval_sd3": "sd35m_geneval",
    "general_ocr_sd3": "sd35m_ocr",
    "pickscore_sd3": "sd35m_pickscore",
    "geneval_sd3_fast_nocfg": "sd35m_geneval_window",
    "pickscore_sd3_fast_nocfg": "sd35m_pickscore_window",
    "geneval_sd3_guard": "sd35m_geneval_guard",
    "general_ocr_sd3_guard": "sd35m_ocr_guard",
    "pickscore_sd3_guard": "sd35m_pickscore_guard",
    "pickscore_flux": "flux_pickscore",
    "pickscore_flux_fast": "flux_pickscore_window",
}
"""Function of flow_grpo's configuration (tests/golden/README.md) -> the recipe that it is here."""


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


@pytest.mark.parametrize(("theirs", "name"), PEERS.items())
def test_numbers_are_those_of_flow_grpo(theirs, name):
    """Each function of their configuration, read by the page on moving, is the recipe."""
    config = recipe(name, memory=80.0)
    expected = translated(CONFIGS[theirs])
    assert len(expected) > 12
    assert {field: get(config, field) for field in expected} == expected


@pytest.mark.parametrize(("theirs", "name"), PEERS.items())
def test_a_recipe_says_what_it_needs(theirs, name):
    config = recipe(name, memory=80.0)
    text = describe(name, config)
    [task] = config.reward.weights
    source = "grpo_guard.py" if "guard" in theirs else f"grpo.py:{theirs}"
    assert f"flow_grpo's config/{source}, each marked in flowgrpo/recipes/" in text
    assert f"the reward {task} (pip install 'flowgrpo[" in text
    assert f"evaluations report {', '.join(config.reported)}." in text
    options = getattr(load(task), "defaults", {})
    models = [options[key] for key in ("model", "clip_model", "tokenizer") if key in options]
    assert all(model in text for model in models)
    # Figures of the paper are those of its own recipe.
    published = name in ("sd35m_geneval", "sd35m_ocr")
    assert ("abstract" in text) == published and ("2505.05470" in text) == (
        theirs in ("geneval_sd3", "general_ocr_sd3", "pickscore_sd3")
    )


def test_the_help_of_a_recipe(capsys):
    for name, words in (("sd35m_ocr", "RapidOCR's models are in its wheel"), ("nano", "option is")):
        with pytest.raises(SystemExit) as stop:
            train.parse_train([name, "--help"])
        assert stop.value.code == 0
        assert words in " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert describe("nano", recipe("nano")) == describe("my:recipe", recipe("nano")) == ""


def get(config: Config, field: str) -> object:
    """The value of a field by its dotted name."""
    return functools.reduce(getattr, field.split("."), config)


def translated(theirs: dict) -> dict[str, object]:
    """Values of flow_grpo's configuration as fields of ours."""
    flux = "FLUX" in theirs["pretrained.model"]
    steps, window = theirs["sample.num_steps"], theirs.get("sample.sde_window_size", 0)
    scale = theirs["sample.guidance_scale"]
    fields = {
        "policy.model": theirs["pretrained.model"],
        "policy.resolution": theirs["resolution"],
        "reward.weights": theirs["reward_fn"],
        "sample.prompts_per_iteration": theirs["groups"],
        "sample.group_size": theirs["sample.num_image_per_prompt"],
        "sample.steps": steps,
        "sample.eval_steps": theirs["sample.eval_num_steps"],
        # FLUX.1-dev takes its scale as an input; there is no second forward.
        "policy.embedded_guidance" if flux else "sample.guidance_scale": scale,
        "sample.noise_level": theirs["sample.noise_level"],
        "sample.transition": theirs.get("sample.sde_type", "flow_sde"),
        "sample.window_size": window,
        "sample.trained_steps": window or int(steps * theirs["train.timestep_fraction"]),
        "optim.advantage_std": "global" if theirs["sample.global_std"] else "group",
        "optim.updates_per_iteration": theirs["updates"],
        "optim.lr": theirs["train.learning_rate"],
        "optim.weight_decay": theirs["train.adam_weight_decay"],
        "optim.adv_clip": theirs["train.adv_clip_max"],
        "optim.clip_range": theirs["train.clip_range"],
        "optim.beta": theirs["train.beta"],
    }
    if window:
        fields["sample.window_range"] = tuple(theirs["sample.sde_window_range"])
    if flux:
        fields["sample.guidance_scale"] = 1.0
    return fields


KLEIN = {
    "base": {
        "policy.resolution": 384,
        "policy.lora_rank": 64,
        "policy.lora_alpha": 128,
        "policy.lora_targets": None,
        "sample.prompts_per_iteration": 48,
        "sample.group_size": 16,
        "sample.steps": 8,
        "sample.eval_steps": 28,
        "sample.transition": "flow_sde",
        "sample.noise_level": 0.7,
        "sample.guidance_scale": 4.0,
        "sample.window_size": 1,
        "sample.window_range": (1, 4),
        "optim.lr": 3e-4,
        "optim.weight_decay": 1e-4,
        "optim.clip_range": 1e-4,
        "optim.adv_clip": 5.0,
        "optim.beta": 0.0,
        "optim.advantage_std": "group",
        "optim.updates_per_iteration": 2,
        "optim.ema_decay": 0.9,
    },
    "distilled": {
        "sample.steps": 4,
        "sample.eval_steps": 10,
        "sample.noise_level": 0.5,
        "sample.guidance_scale": 1.0,
        "sample.window_range": (1, 3),
    },
}
"""Flow-Factory's two files for FLUX.2-klein and PickScore, read on 2026-11-29 at its a0b2bc5."""


@pytest.mark.parametrize("small", [False, True])
def test_numbers_of_klein_are_flow_factorys(small):
    suffix, groups = ("_1gpu", 8) if small else ("", 48)
    for name, task, values in (
        ("flux2_klein_pickscore", "pickscore", KLEIN["base"]),
        ("flux2_klein_ocr", "ocr", KLEIN["base"]),
        ("flux2_klein_distilled_pickscore", "pickscore", KLEIN["base"] | KLEIN["distilled"]),
    ):
        config = recipe(name + suffix, memory=80.0)
        values = values | {"sample.prompts_per_iteration": groups}
        assert {field: get(config, field) for field in values} == values
        # Their average is updated every four iterations.
        assert config.optim.ema_every == 4 * config.optim.updates_per_iteration
        assert config.policy.model.endswith("-4B" if "distilled" in name else "-base-4B")
        assert list(config.reward.weights) == [task]
        text = describe(name + suffix, config)
        folder = "flux2_klein" if "distilled" in name else "flux2_klein_base"
        assert f"Flow-Factory's examples/grpo/lora/{folder}/default.yaml, each marked" in text
        assert "each marked in flowgrpo/recipes/flux2.py" in text and "abstract" not in text


@pytest.mark.parametrize("name", sorted(set(RECIPES) - EMBEDDED))
def test_sizes_of_an_iteration(name):
    """1152 images an iteration as in the paper, or as many as its source has, or eight groups on
    one GPU; two updates on them."""
    config = recipe(name, memory=80.0)
    sample, optim, policy = config.sample, config.optim, config.policy
    small, video = name.endswith(("_1gpu", "gb")), name.startswith("wan")
    of_flow_factory = name.startswith(("flux2_klein", "qwen_image", "zimage"))
    # A transformer that is sharded over the GPUs of a machine.
    sharded = config.run.parallel == "fsdp"
    assert sharded == (name.startswith("qwen_image") and not small)
    gpus = 8 if sharded else 1
    if video:
        assert (policy.frames, policy.height, policy.width) == (33, 256, 416)
        assert sample.rows in ((4 * 8, 4 * 16) if small else (32 * 8, 48 * 16))
    else:
        whole = 48 * 16 if of_flow_factory else 1152
        assert sample.rows == (8 * sample.group_size if small else whole)
    assert optim.updates_per_iteration == 2 and config.chunks_per_update * 2 == sample.chunks
    assert policy.offload_text_encoders == (small or sharded)
    need = plan.expected_memory(config, plan.sizes_of(policy.model), gpus)["total"]
    assert need <= plan.FILL * 80
    # One more row would not fit on one GPU, or not divide an update's rows, or is past the bound.
    larger = (
        n for n in range(sample.batch_size + 1, plan.MOST_ROWS + 1) if sample.rows // 2 % n == 0
    )
    for rows in larger:
        trial = replace(config, **{"sample.batch_size": rows})
        assert plan.expected_memory(trial, plan.sizes_of(policy.model))["total"] > plan.FILL * 80
    # Windows are CPS without guidance; only Guard has the Guard; a KL needs its reference.
    windowed = "_window" in name
    cps, one = windowed and not video, of_flow_factory or (windowed and video)
    assert (sample.transition == "cps") == (sample.window_size == 3) == cps
    assert sample.window_size == (3 if cps else int(one))
    assert optim.guard == ("_guard" in name)
    assert (optim.ema_decay, optim.ema_every) == (0.9, 8)
    high = name.startswith(("flux", "qwen_image", "zimage")) or (video and windowed)
    rank = 64 if high else 32
    if name.startswith(("flux_", "zimage_")) and name.endswith("gb"):
        rank = 32
    assert (policy.lora_rank, policy.lora_alpha) == (rank, 2 * rank)


CARDS = {24: 22.0, 12: 11.0}
"""GiB of a card -> of it, what a run may take: the rest is the driver's, the screen's, and lost."""


@pytest.mark.parametrize("name", [name for name in RECIPES if name.endswith("gb")])
def test_recipes_of_small_cards_fit(name, monkeypatch):
    """With what a captured rollout keeps in its pool beside an update, on a larger GPU too."""
    monkeypatch.setattr(plan, "gpu_memory", lambda: 141.0)
    config, card = recipe(name), int(name.rpartition("_")[2][:-2])
    assert config.policy.quantize != "none" and config.policy.gradient_checkpointing
    memory = plan.expected_memory(config, plan.sizes_of(config.policy.model))
    assert memory["total"] <= plan.FILL * card
    assert memory["total"] + memory["rollout"] <= CARDS[card]
    plain = replace(config, **{"policy.quantize": "none", "policy.quantize_text": "none"})
    larger = plan.expected_memory(plain, plan.sizes_of(config.policy.model))["total"]
    assert larger > memory["total"] + 4


# examples/grpo/lora/{qwen_image,z_image,z_image_turbo}/default.yaml of Flow-Factory at a0b2bc5.
FLOW_FACTORY = {
    "policy.lora_rank": 64,
    "policy.lora_alpha": 128,
    "policy.resolution": 512,
    "sample.prompts_per_iteration": 48,
    "sample.group_size": 16,
    "sample.transition": "flow_sde",
    "sample.window_size": 1,
    "sample.window_range": (1, 4),
    "reward.weights": {"pickscore": 1.0},
    "optim.lr": 3e-4,
    "optim.weight_decay": 1e-4,
    "optim.clip_range": 1e-4,
    "optim.adv_clip": 5.0,
    "optim.beta": 0.0,
    "optim.advantage_std": "group",
    "optim.updates_per_iteration": 2,
    "optim.ema_decay": 0.9,
    # Four of their epochs, each of two updates.
    "optim.ema_every": 4 * 2,
}


@pytest.mark.parametrize(
    ("name", "own"),
    [
        # Their scale counts from the conditional velocity.
        ("zimage", {"steps": 10, "eval_steps": 40, "guidance_scale": 4 + 1, "noise_level": 0.7}),
        # They reward CLIP's score too.
        (
            "qwen_image",
            {"steps": 10, "eval_steps": 28, "guidance_scale": 4.0, "noise_level": 1.0},
        ),
        # Their noise level is 0.7; ours is what a distilled model stands.
        ("zimage_turbo", {"steps": 6, "eval_steps": 10, "guidance_scale": 1, "noise_level": 0.2}),
    ],
)
def test_numbers_are_those_of_flow_factory(name, own):
    config = recipe(f"{name}_pickscore", memory=80.0)
    expected = FLOW_FACTORY | {f"sample.{field}": value for field, value in own.items()}
    assert {field: get(config, field) for field in expected} == expected
    folder = name.replace("zimage", "z_image")
    assert f"those of Flow-Factory's examples/grpo/lora/{folder}/def" in describe(
        f"{name}_pickscore", config
    )
    assert config.policy.model.endswith("Turbo") == ("turbo" in name)


# arXiv 2505.05470, appendix: G, T, steps of evaluation, noise level, KL weight by the true KL.
PAPER = {"geneval": 0.004, "ocr": 0.004, "pickscore": 0.001}


@pytest.mark.parametrize("task", PAPER)
def test_headline_numbers_are_those_of_the_paper(task):
    config = paper(task, kl="gaussian", memory=80.0)
    sample, optim = config.sample, config.optim
    assert (sample.group_size, sample.steps, sample.eval_steps) == (24, 10, 40)
    assert (sample.noise_level, sample.transition) == (0.7, "flow_sde")
    assert (config.policy.lora_rank, config.policy.lora_alpha) == (32, 64)
    assert (optim.kl, optim.beta) == ("gaussian", PAPER[task])
    code = paper(task, memory=80.0).optim
    assert code.kl == "std_dev" and code.beta == pytest.approx(10 * optim.beta)


@pytest.mark.parametrize("name", sorted(set(RECIPES) - EMBEDDED))
def test_every_recipe_stands_on_prompts_and_rewards_that_exist(name):
    config = recipe(name, memory=80.0)
    assert config.recipe == name and from_json(to_json(config)) == config
    assert config.sample.prompts in NAMES
    prompts = load_prompts(config.sample.prompts)
    assert len(prompts) >= config.sample.prompts_per_iteration
    scorer = Scorer(dict.fromkeys((*config.reward.weights, *config.reported), 1.0))
    for reward in scorer.rewards.values():
        for part in (prompts, load_prompts(config.sample.prompts, "heldout")):
            for text, entry in zip(part.texts, part.metadata, strict=True):
                check = getattr(reward, "check", None)
                assert check is None or check(text, entry) != ""
    assert config.reported[0] == next(iter(config.reward.weights)) + "_strict" * ("geneval" in name)


def test_overrides_and_the_command_line(monkeypatch):
    monkeypatch.setattr(plan, "gpu_memory", lambda: 80.0)
    config = recipe("sd35m_ocr", steps=7, **{"sample.batch_size": 4, "optim.lr": 1e-5})
    assert (config.run.steps, config.sample.batch_size, config.optim.lr) == (7, 4, 1e-5)
    line = "sd35m_geneval_1gpu --policy.model /models/sd35 --optim.lr 1e-4"
    config = train.parse_train(line.split())
    assert (config.policy.model, config.optim.lr) == ("/models/sd35", 1e-4)
    assert config.sample == recipe("sd35m_geneval_1gpu").sample
    for words, message in (
        ("--sample.group-size 25", "does not divide the 200 rows of an iteration"),
        ("--optim.updates-per-iteration 5", "5 does not divide the 16 chunks"),
    ):
        with pytest.raises(ConfigError, match=message):
            train.parse_train(["sd35m_geneval_1gpu", *words.split()])


FILE = """
from flowgrpo.recipes import recipe
def mine(**changes):
    return recipe("nano", **changes)
def fails():
    raise ValueError("no")
number = 3
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The path of a file with recipes of the user's own."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "users_recipes.py").write_text(FILE)
    yield tmp_path / "users_recipes.py"
    sys.modules.pop("users_recipes", None)


def test_a_file_is_named_as_a_module_is(file, monkeypatch):
    config = recipe(f"{file}:mine", **{"run.steps": 7})
    assert config.recipe == "nano" and config.run.steps == 7
    monkeypatch.chdir(file.parent)
    assert train.parse_train(["users_recipes.py:mine", "--run.steps", "3"]).run.steps == 3
    from flowgrpo.cli.targets import resolve_target

    assert resolve_target("users_recipes.py:mine", best=False) == (recipe("nano"), None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fails", r"failed \(ValueError: no\)"),
        ("number", "is int, but a function"),
        ("none", "has no attribute 'none'"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(file, name, words):
    with pytest.raises(ConfigError, match=words) as error:
        recipe(f"{file}:{name}")
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="there is no file"):
        recipe(f"{file.parent}/other.py:mine")


def test_what_a_recipes_file_sets_for_the_process_is_put_back(file, monkeypatch, caplog):
    """As that of a reward: the run would be written elsewhere, and train nothing."""
    (file.parent / "there").mkdir()
    monkeypatch.chdir(file.parent)
    text = "import os, torch\nos.chdir('there')\ntorch.set_grad_enabled(False)\n"
    file.write_text(text + FILE.replace("return recipe", "os.chdir('..'); return recipe"))
    assert recipe(f"{file}:mine").recipe == "nano"
    assert Path.cwd() == file.parent and torch.is_grad_enabled()
    assert "recipe" in caplog.text and "changed torch.set_grad_enabled" in caplog.text
