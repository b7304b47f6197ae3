"""reward.devices: which device a reward's model is put on, and what is refused before loading."""

from __future__ import annotations

import pytest
import torch

from flowgrpo.config import ConfigError, RewardConfig
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer
from flowgrpo.rewards.differentiable import differentiable_rewards
from flowgrpo.rewards.options import configurable


@configurable("placed")
def placed(*, device: str = "auto", other: int = 0):
    """A network of one number on the device."""
    weight = torch.full((), 2.0, device=device)

    def rate(images, prompts, metadata):
        return images.to(weight.device)[:, 0, 0, 0] * weight

    return rate


def plain(images, prompts, metadata):
    return [0.0] * len(images)


PLACED, PLAIN = "test_devices:placed", "test_devices:plain"


def devices(config: RewardConfig) -> dict[str, str]:
    rewards = Scorer.of(config, config.report).rewards
    return {name: getattr(r, "options", {}).get("device", "") for name, r in rewards.items()}


def config(devices: dict[str, str], options: dict[str, str] | None = None) -> RewardConfig:
    report = ("pickscore", "clipscore", "ocr", PLAIN, PLACED)
    return RewardConfig(
        weights={"pickscore": 1.0}, report=report, devices=devices, options=options or {}
    )


def test_one_for_all_and_by_name():
    default = {"pickscore": "auto", "clipscore": "auto", "ocr": "", PLAIN: "", PLACED: "auto"}
    assert devices(config({})) == default
    everywhere = {"pickscore": "cpu", "clipscore": "cpu", PLACED: "cpu"}
    assert devices(config({"all": "cpu"})) == {**default, **everywhere}
    some = config({"all": "cuda:1", "clipscore": "cpu"}, {f"{PLACED}.device": "cuda:2"})
    expected = {"pickscore": "cuda:1", "clipscore": "cpu", PLACED: "cuda:2"}
    assert devices(some) == {**default, **expected}


def test_a_reward_that_is_put_on_a_device_scores_there():
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    scorer = Scorer.of(RewardConfig(weights={PLACED: 1.0}, devices={"all": "cpu"}))
    prompts = Prompts.of(["a", "b"])
    scorer.prepare(prompts)
    assert scorer(images, prompts, 2).total.tolist() == [0.0, 2.0, 4.0, 6.0]
    assert scorer.rewards[PLACED].options["device"] == "cpu"


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", "cpu:cpu"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_loaded(device):
    scorer = Scorer.of(
        RewardConfig(
            weights={"pickscore": 1.0, "deqa": 1.0},
            devices={"all": device},
            options={"pickscore.model": "./absent"},
        )
    )
    words = f"reward 'pickscore' cannot use its device: .* is '{device}', which cannot be used"
    with pytest.raises(RewardError, match=words) as error:
        scorer.prepare(Prompts.of(["a"]))
    assert "\n" not in str(error.value)


def test_names_that_are_none():
    with pytest.raises(ConfigError, match=r"has 'pickscor', but all or .*mean 'pickscore'\?"):
        config({"pickscor": "cpu"})
    with pytest.raises(RewardError, match="has 'ocr', but that reward has no model whose device"):
        devices(config({"ocr": "cpu"}))


def test_a_gradient_comes_from_the_device(clip_folder):
    """refl takes the reward that is placed, not another."""
    options = {f"clipscore.{name}": str(clip_folder) for name in ("model",)}
    found = RewardConfig(weights={"clipscore": 1.0}, options=options, devices={"all": "cpu"})
    [(weight, of_pixels)] = differentiable_rewards(found)
    built = Scorer.of(found).rewards["clipscore"].build()
    assert weight == 1.0 and of_pixels.args[1] is built.of_pixels
