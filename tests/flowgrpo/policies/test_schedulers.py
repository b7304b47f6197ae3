"""The scheduler of a pipeline: whose sigmas are taken, and whose are refused before the weights."""

from __future__ import annotations

import json
import shutil
import signal

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler

from flowgrpo import train
from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.policies import Policy
from flowgrpo.policies.base import scheduler_sigmas
from support import setups

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FOREIGN = {
    "UniPCMultistepScheduler": FLOW,
    "DPMSolverMultistepScheduler": FLOW,
    "FlowMatchHeunDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "DDIMScheduler": {},
}


def open_pipeline(folder):
    index = DiffusionPipeline.load_config(folder)
    absent = [name for name, value in index.items() if value == [None, None]]
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(absent))


def load(model):
    return Policy.load(model, device="cpu", config=PolicyConfig(text_cache=""))


@pytest.mark.parametrize("name", FOREIGN)
def test_another_scheduler_is_refused_in_memory_and_on_disk(name, pixel_model, tmp_path):
    pipeline = open_pipeline(pixel_model)
    cls = getattr(diffusers, name)
    pipeline.scheduler = cls.from_config(pipeline.scheduler.config, **FOREIGN[name])
    message = rf"has a {name} as its scheduler, but a FlowMatchEulerDiscreteScheduler is expected"
    with pytest.raises(ConfigError, match=rf"{message}, .* put back the one"):
        load(pipeline)
    pipeline.save_pretrained(tmp_path)
    # Refused before the weights, which are not even there.
    shutil.rmtree(tmp_path / "transformer")
    with pytest.raises(ConfigError, match=message):
        load(str(tmp_path))


def test_without_a_scheduler(pixel_model, tmp_path):
    folder = shutil.copytree(pixel_model, tmp_path / "model")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="has a NoneType as its scheduler"):
        load(str(folder))


@pytest.mark.parametrize("kind", ["pixel_model", "flux_model"])
def test_inverted_sigmas_are_refused(kind, request, tmp_path):
    folder = shutil.copytree(request.getfixturevalue(kind), tmp_path / "model")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "invert_sigmas": True}))
    message = "invert_sigmas true, which counts sigmas from 0 to 1, .* set it to false"
    for model in (str(folder), open_pipeline(folder)):
        with pytest.raises(ConfigError, match=message):
            load(model)


@pytest.mark.parametrize(
    "flags",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift_terminal": 0.1},
        {"shift": 12.0},
    ],
    ids=str,
)
def test_other_sigmas_of_the_same_scheduler_are_taken(flags, latent_model):
    pipeline = open_pipeline(latent_model)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, **flags
    )
    policy = load(pipeline)
    mu = {"mu": policy._mu()} if "use_dynamic_shifting" in flags else {}
    pipeline.scheduler.set_timesteps(8, **mu)
    assert torch.equal(policy.sigmas(8).float(), pipeline.scheduler.sigmas)


def test_a_subclass_is_taken(pixel_model):
    class Mine(FlowMatchEulerDiscreteScheduler):
        pass

    pipeline = open_pipeline(pixel_model)
    pipeline.scheduler = Mine.from_config(pipeline.scheduler.config)
    assert load(pipeline).sigmas(4)[0] == 1


@pytest.mark.parametrize(
    ("scheduler", "arguments", "sigmas"),
    [
        (
            FlowMatchEulerDiscreteScheduler(shift=0.0),
            {},
            r"5 sigmas for 4 steps, nan, nan, nan, 0,",
        ),
        (FlowMatchEulerDiscreteScheduler(shift=np.nan), {}, r"5 sigmas for 4 steps, nan, nan"),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.0, 0.5]}, r"3 sigmas for 4 steps, 1, "),
        (
            FlowMatchEulerDiscreteScheduler(),
            {"sigmas": [0.1, 0.9, 0.5, 0.2]},
            r"5 sigmas for 4 steps, 0.1, 0.9, 0.5, 0.2, 0,",
        ),
        (FlowMatchEulerDiscreteScheduler(), {"sigmas": [1.5, 0.9, 0.5, 0.2]}, "1.5, 0.9"),
    ],
)
def test_sigmas_that_do_not_fall_from_one_to_zero(scheduler, arguments, sigmas):
    with pytest.raises(ConfigError, match=rf"{sigmas}.* but 5 that fall from at most 1 to 0 are"):
        scheduler_sigmas(scheduler, 4, **arguments)


@pytest.mark.parametrize("kind", ["latent_model", "flux_model"])
def test_a_shift_that_grows_between_equal_numbers_of_tokens(request, kind):
    pipeline = open_pipeline(request.getfixturevalue(kind))
    changes = {"use_dynamic_shifting": True, "max_image_seq_len": 256}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    config = PolicyConfig(resolution=16, text_cache="")
    policy = Policy.load(pipeline, device="cpu", config=config)
    with pytest.raises(ConfigError, match="has 256 as its base_image_seq_len and 256 as its max"):
        policy.sigmas(4)


@pytest.mark.parametrize("kind", ["pixel_model", "flux_model"])
def test_numbers_of_steps(request, kind):
    config = PolicyConfig(resolution=0 if kind == "pixel_model" else 16, text_cache="")
    pipeline = open_pipeline(request.getfixturevalue(kind))
    policy = Policy.load(pipeline, device="cpu", config=config)
    for steps in (0, -1, 4.0, "4", None):
        with pytest.raises(ConfigError, match=f"num_steps is {steps!r}, but a whole number of at"):
            policy.sigmas(steps)
    for steps in (np.int64(4), torch.tensor(4)):
        assert torch.equal(policy.sigmas(steps), policy.sigmas(4))


@pytest.mark.slow
def test_a_scheduler_without_a_schedule_of_one_step(pixel_model, tmp_path, monkeypatch):
    """A run that is stopped looks at its weights by a short one, before it exports them."""
    pipeline = open_pipeline(pixel_model)
    changes = {"shift_terminal": 0.02}
    pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **changes)
    policy = load(pipeline)
    with pytest.raises(ConfigError, match=r"nan, 0, but .*; choose another number of steps, or"):
        policy.sigmas(1)
    changes = {"run.steps": 2, "run.eval_every": 0, "run.eval_prompts": 1, "sample.eval_steps": 2}
    config, update = setups.config(pixel_model, tmp_path, **changes), train.update

    def stopping(*arguments):
        signal.raise_signal(signal.SIGINT)
        return update(*arguments)

    monkeypatch.setattr(train, "update", stopping)
    summary = train.run(config, pipeline=pipeline)
    assert summary["interrupted"] and (tmp_path / "run" / "adapter").is_dir()


def test_noise_that_leaves_the_range_of_latents_is_refused_before_the_first_image(
    pixel_model, tmp_path
):
    config = setups.config(pixel_model, tmp_path, **{"sample.noise_level": 30.0})
    message = (
        r"sample\.transition flow_sde with sample\.noise_level 30 and the 6 steps of the model's "
        r"scheduler is no sampler: sigmas\[\d\] = .* gives flow_sde C = .*lower noise_level"
    )
    with pytest.raises(ConfigError, match=message):
        train.run(config)
    assert not (tmp_path / "run").exists()


def test_a_schedule_that_begins_just_below_one(pixel_model, tmp_path):
    """The pole of 1 / (1 - sigma)."""
    pipeline = open_pipeline(pixel_model)

    class Below(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, *arguments, **options):
            super().set_timesteps(*arguments, **options)
            self.sigmas[0] = 0.9999

    pipeline.scheduler = Below.from_config(pipeline.scheduler.config)
    config = setups.config("mine", tmp_path)
    with pytest.raises(ConfigError, match=r"sigmas\[0\] = 0\.99989.* begin at sigma = 1"):
        train.setup(config, pipeline=pipeline)
