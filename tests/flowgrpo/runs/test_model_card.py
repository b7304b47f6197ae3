"""The card beside saved weights, without a run; with runs: policies/test_families_train.py."""

from __future__ import annotations

import pytest
import torch
from huggingface_hub import ModelCard

from flowgrpo.config import OptimConfig, replace
from flowgrpo.policies import Policy
from flowgrpo.policies.adapters import add_adapter
from flowgrpo.recipes import recipe
from flowgrpo.runs import model_card
from flowgrpo.runs.export import export
from flowgrpo.runs.state import State


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, policy, configuration) of an adapter of nano that is not zero."""
    folder, config = tmp_path_factory.mktemp("nano") / "adapter", recipe("nano")
    policy = Policy.load("nano", device="cpu", dtype="float32", config=config.policy)
    with torch.no_grad():
        for parameter in add_adapter(policy.transformer, config.policy):
            parameter.add_(0.01)
    state = State.create(policy.transformer, OptimConfig())
    export(policy.transformer, state.ema, config.policy, folder)
    return folder, policy, config


def test_the_lines_for_nano_load_its_adapter(saved):
    folder, policy, config = saved
    names: dict = {}
    exec(model_card.load_lines(config, policy.transformer, str(folder)), names)
    loaded = names["policy"].transformer.peft_config["default_0"]
    assert (loaded.r, loaded.lora_alpha) == (config.policy.lora_rank, config.policy.lora_alpha)
    for name, tensor in names["policy"].transformer.state_dict().items():
        if "lora_" in name:
            own = policy.transformer.get_parameter(name.replace("default_0", "default"))
            torch.testing.assert_close(tensor.float(), own.detach(), rtol=1e-2, atol=1e-3)


def test_settings_and_numbers(saved, tmp_path):
    _, policy, config = saved
    config = replace(config, **{"reward.weights": {"ocr": 1.0, "pickscore": 0.25}})
    report = {"scores": {"ocr": 0.5}, "tasks": {}, "quality": {"diversity": 0.1}}
    after = {"scores": {"ocr": 0.75}, "tasks": {}, "quality": {"diversity": None}}
    counts = {"interval": [0.7, 0.8], "images": 8, "prompts": 4, "steps": 40, "iteration": 9}
    summary = {"before": report, "after": {**after, **counts, "guidance_scale": 1.0}}
    card = ModelCard.load(model_card.write(tmp_path, config, policy.transformer, 9, summary))
    data = card.data.to_dict()
    [index] = data.pop("model-index")
    assert data == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["lora", "flow-grpo", "reinforcement-learning"],
    }
    assert index["name"] == "nano"
    [result] = index["results"]
    assert result["task"] == {"type": "text-to-image"}
    assert result["dataset"] == {"name": "nano", "type": "nano", "split": "heldout"}
    [metric] = result["metrics"]
    assert (metric["type"], metric["name"], metric["value"]) == ("ocr", "OCR", 0.75)
    assert metric["args"] == {"prompts": 4, "images": 8, "steps": 40, "guidance_scale": 1.0}
    for line in (
        "| Rewards | 1 x ocr, 0.25 x pickscore |",
        "| Group arithmetic | 24 prompts x 12 images = 288 images an iteration, ",
        "| ocr | 0.5 | 0.75 |",
        "| quality diversity | 0.1 |  |",
        "8 images of 4 held-out prompts, deterministic sampler, 40 steps, guidance 1;",
        "0.7 to 0.8",
    ):
        assert line in card.text
    assert (
        "Before and after"
        not in model_card.write(tmp_path, config, policy.transformer, 9).read_text()
    )
    assert not list(tmp_path.glob(".*")), "written beside and renamed"


def test_names_end_no_cell_and_no_file(saved, tmp_path):
    """Of rewards, tasks and files: bars, line breaks, and bytes that are no UTF-8."""
    _, policy, config = saved
    config = replace(config, **{"sample.prompts": "a|b\nc\udcff.txt"})
    path = model_card.write(tmp_path, config, policy.transformer, 1)
    [row] = [line for line in path.read_text().splitlines() if line.startswith("| Prompts")]
    assert row == r"| Prompts | a\|b c\udcff.txt |"
