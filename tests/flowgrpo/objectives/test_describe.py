"""What the screen, the memory plan and the model card say of an objective's samples."""

from __future__ import annotations

from flowgrpo.config import Config, OptimConfig, SampleConfig, replace
from flowgrpo.objectives.describe import looked_at, sampled_by
from flowgrpo.plan import plan_lines


def test_steps_of_the_sampler():
    config = Config(sample=SampleConfig(steps=10, window_size=2, window_range=(0, 5)))
    assert sampled_by(config) == "10 steps of flow_sde, trained: 2 of the steps 0 to 4"
    assert looked_at(config) == "2 steps"
    assert looked_at(replace(config, **{"sample.window_size": 1})) == "1 step"
    assert plan_lines(config)["updates"].endswith("48 images x 2 steps")


def test_results_that_are_noised_again():
    config = Config(sample=SampleConfig(steps=6), optim=OptimConfig(objective="awm", levels=2))
    assert sampled_by(config) == "6 steps of the ODE, whose results are noised again"
    assert looked_at(config) == "2 noise levels"
    assert plan_lines(config)["updates"].endswith("48 images x 2 noise levels")


def test_images_of_a_curated_set():
    config = Config(
        sample=SampleConfig(curated="/data/best"), optim=OptimConfig(objective="sft", levels=1)
    )
    assert sampled_by(config) == "no rollout, results are those of best"
    assert looked_at(config) == "1 noise level"
