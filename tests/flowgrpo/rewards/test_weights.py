"""Weights that cannot be loaded: the error names the reward and the model, before any image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants

from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer


def absent(folder: Path) -> None:
    shutil.rmtree(folder)


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def of_another_size(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["projection_dim"] += 8
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [absent, cut_off, of_another_size])
@pytest.mark.parametrize("name", ["pickscore", "clipscore"])
def test_the_error_names_the_reward(clip_folder, tmp_path, name, damage, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model = shutil.copytree(clip_folder, tmp_path / "model")
    damage(model)
    scorer = Scorer({name: 1.0}, options={name: {"model": str(model)}})
    with pytest.raises(RewardError) as error:
        scorer.prepare(Prompts.of(["a red car"]))
    text = str(error.value)
    assert text.startswith(f"reward '{name}' cannot be loaded: the model {model} cannot be loaded")
    assert text.count("\n") == 0 and text.endswith("the network.")


def test_an_error_that_names_it_stays_as_it_is():
    with pytest.raises(RewardError, match=r"^the address of reward 'unifiedreward' is ''"):
        Scorer({"unifiedreward": 1.0}).prepare(Prompts.of(["a"]))


def test_an_address_is_tried_before_weights_are_loaded():
    """Loading takes minutes, an address that is missing is seen at once."""
    options = {"pickscore": {"model": "./absent"}}
    scorer = Scorer({"pickscore": 1.0, "deqa": 1.0}, options=options)
    with pytest.raises(RewardError, match=r"^the address of reward 'deqa' is ''"):
        scorer.prepare(Prompts.of(["a"]))
