"""run.eval_resolution: training at one image size, evaluation at another, with the same weights."""

from __future__ import annotations

import json

import pytest
import torch

from flowgrpo import plan, train
from flowgrpo.cli import main
from flowgrpo.cli.options import EvaluateOptions, SampleOptions
from flowgrpo.cli.targets import evaluated_rows, image_size
from flowgrpo.config import ConfigError, replace
from flowgrpo.evaluation import evaluate
from flowgrpo.evaluation.evaluation_set import load_evaluation_set
from flowgrpo.policies.load import load_policy
from flowgrpo.recipes import recipe
from flowgrpo.runs import banner, model_card
from support import setups
from support.processes import untimed

# (folder, size of training, size of evaluation)
FAMILIES = {
    "latent_model": (8, 12),
    "flux_model": (16, 32),
    "flux2_model": (16, 32),
    "qwen_model": (16, 32),
    "wan_model": (16, 32),
    "zimage_model": (16, 32),
}
# The text encoder of FLUX.2-klein has a template around a prompt.
FIELDS = {"flux2_model": {"policy.max_sequence_length": 20}, "wan_model": {"policy.frames": 1}}
SMALL = {"policy.text_cache": "", "policy.max_sequence_length": 4, "policy.lora_targets": None}


def images_of(policy):
    seeds = torch.arange(4) + 7
    return evaluate.generate_images(policy, setups.TEXTS[:2], seeds, 2, steps=2, batch_size=3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", FAMILIES)
def test_evaluations_are_those_of_a_model_of_that_size(request, tmp_path, kind):
    """Bit for bit, with adapters on and off; the policy of training has its own size before and
    after."""
    small, large = FAMILIES[kind]
    folder = request.getfixturevalue(kind)
    own = FIELDS.get(kind, {})
    changes = {**SMALL, **own, "policy.resolution": small, "run.eval_resolution": large}
    config = setups.config(folder, tmp_path, **changes)
    made = setups.parts(config)
    policy, evaluated = made.policy, made.policy.evaluated
    assert evaluated is not policy and policy.evaluated is evaluated
    assert (policy.height, policy.width) == (small, small)
    before = images_of(policy)
    found = images_of(evaluated)
    assert found.shape == (4, *evaluated.image_shape)
    assert found.shape[-2:] == (large, large) and before.shape[-2:] == (small, small)
    same = {**SMALL, **own, "policy.resolution": large, "run.eval_resolution": 0}
    other = setups.parts(setups.config(folder, tmp_path, **same)).policy
    assert torch.equal(found, images_of(other))
    assert torch.equal(evaluated.sigmas(5), other.sigmas(5))
    assert torch.equal(images_of(policy), before)
    with evaluated.reference():
        base = images_of(evaluated)
    assert not torch.equal(base, found)
    with other.reference():
        assert torch.equal(base, images_of(other))
    # The weights of both are the same tensors.
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.zero_()
    assert torch.equal(images_of(evaluated), base)


def test_the_same_size_needs_no_second_policy(latent_model, tmp_path):
    changes = {"policy.resolution": 8, "run.eval_resolution": 8}
    policy = load_policy(setups.config(latent_model, tmp_path, **changes), trainable=False)
    assert policy.evaluated is policy


@pytest.mark.parametrize(
    ("kind", "size", "words"),
    [
        ("latent_model", 10, "run.eval_resolution is 10, but .* multiples of 4"),
        ("latent_model", 4096, "run.eval_resolution is 4096, but .* positions for at most"),
        ("flux_model", 18, "run.eval_resolution is 18, but .* multiples of"),
    ],
)
def test_sizes_that_the_model_does_not_make(request, tmp_path, kind, size, words):
    folder = request.getfixturevalue(kind)
    config = setups.config(folder, tmp_path, **{**SMALL, "run.eval_resolution": size})
    with pytest.raises(ConfigError, match=words) as caught:
        load_policy(config, trainable=False)
    assert "policy.resolution" not in str(caught.value)


def test_a_negative_size_is_refused(latent_model, tmp_path):
    with pytest.raises(ConfigError, match=r"run\.eval_resolution is -1, but it must be at least 0"):
        setups.config(latent_model, tmp_path, **{"run.eval_resolution": -1})


def test_rows_of_a_forward_become_fewer():
    config = recipe("sd35m_ocr", memory=80.0)
    config = replace(config, **{"policy.resolution": 256, "run.eval_resolution": 512})
    rows = config.sample.batch_size
    assert config.eval_batch_size == rows // 4
    larger = replace(config, **{"run.eval_resolution": 8192})
    assert larger.eval_batch_size == 1
    smaller = replace(config, **{"run.eval_resolution": 128})
    assert smaller.eval_batch_size == rows
    unknown = replace(config, **{"policy.resolution": 0})
    assert unknown.eval_batch_size == rows
    arch = plan.sizes_of(config.policy.model)
    with_it, without = (
        plan.expected_memory(replace(config, **{"run.eval_resolution": size}), arch)
        for size in (512, 0)
    )
    assert set(with_it) - set(without) == {"evaluation"}
    # As many pixels a forward as in training, so that the VAE needs as much.
    assert with_it["evaluation"] <= 1.1 * with_it["rollout"]
    assert "rollout, evaluation and encode" in plan.plan_lines(larger, 80.0)["memory"]
    assert "update, rollout and encode" in plan.plan_lines(recipe("sd35m_ocr"), 80.0)["memory"]


@pytest.mark.slow
def test_a_run_trains_as_without_and_evaluates_at_its_size(latent_model, tmp_path):
    changes = {
        "policy.resolution": 8,
        "policy.adapter": "full",
        "optim.lr": 1e-2,
        "optim.beta": 0.1,
        "sample.group_size": 3,
        "sample.steps": 4,
        "run.steps": 1,
        "run.eval_prompts": 2,
        "run.eval_samples": 1,
        "sample.eval_steps": 2,
    }
    runs = {}
    for name, size in (("plain", 0), ("larger", 12)):
        config = setups.config(
            latent_model,
            tmp_path,
            **{**changes, "run.eval_resolution": size, "run.out": str(tmp_path / name)},
        )
        runs[name] = train.run(config)
    lines = {name: untimed(tmp_path / name / "metrics.jsonl") for name in runs}
    plain, larger = ([x for x in found if x["kind"] == "train"] for found in lines.values())
    assert plain == larger
    assert runs["larger"]["before"]["size"] == runs["larger"]["after"]["size"] == [12, 12]
    assert runs["plain"]["after"]["size"] == [8, 8]
    assert runs["larger"]["before"]["scores"] != runs["larger"]["after"]["scores"]
    assert "at 12 pixels a side" in banner.evaluated(config, load_evaluation_set(config))
    # The command evaluates as the run has.
    out = tmp_path / "larger"
    main.main(["evaluate", str(out), "--device", "cpu", "--out", str(tmp_path / "again")])
    report = json.loads((tmp_path / "again" / "report.json").read_text())["reports"]
    for label, when in (("base", "before"), ("iteration 1", "after")):
        expected = {k: v for k, v in runs["larger"][when].items() if k != "iteration"}
        assert report[label] == expected
    # Another size may be asked for.
    own = EvaluateOptions(target=str(out), resolution=8)
    assert image_size(own, config)["policy.resolution"] == 8
    assert evaluated_rows(own, config) is None
    sampled = SampleOptions(prompts=("a red circle",))
    assert image_size(sampled, config)["policy.resolution"] == 12
    assert evaluated_rows(sampled, config) == config.sample.batch_size * 64 // 144
    lines = model_card.load_lines(config, train.load_policy(config).transformer)
    assert "height=12" in lines and "width=12" in lines
