"""Evaluation: which prompts and seeds, and what the figures mean."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from flowgrpo import rewards
from flowgrpo.config import replace
from flowgrpo.evaluation import evaluate
from flowgrpo.evaluation.evaluation_set import EvaluationSet, load_evaluation_set, select
from flowgrpo.evaluation.statistics import balanced_mean, bootstrap, diversity, task_means
from flowgrpo.policies import Policy
from flowgrpo.records import Prompts
from support import processes


def tagged(**counts: int) -> Prompts:
    entries = [(f"{tag} {i}", {"tag": tag}) for tag, n in counts.items() for i in range(n)]
    return Prompts.of(*zip(*entries, strict=True))


def entries_of(prompts: Prompts, samples: int = 1) -> EvaluationSet:
    return EvaluationSet(prompts, torch.arange(len(prompts) * samples), samples)


def test_tasks_take_turns_and_short_ones_repeat():
    chosen = select(tagged(a=2, b=10, c=5), 15)
    tags = [entry["tag"] for entry in chosen.metadata]
    assert tags == ["a", "b", "c"] * 5
    assert chosen.texts[::3] == ("a 0", "a 1", "a 0", "a 1", "a 0")
    assert chosen.texts[1::3] == ("b 0", "b 2", "b 4", "b 6", "b 8")
    assert chosen.texts[2::3] == ("c 0", "c 1", "c 2", "c 3", "c 4")


def test_without_tasks_no_prompt_repeats():
    prompts = Prompts.of([str(i) for i in range(7)])
    assert select(prompts, 100).texts == prompts.texts
    assert select(prompts, 3).texts == ("0", "2", "4")
    assert select(prompts, 0) is prompts


def test_seeds_belong_to_prompts_and_are_the_same_for_every_run(tmp_path):
    config = processes.make(tmp_path, **{"run.eval_prompts": 9, "run.eval_samples": 3})
    one = load_evaluation_set(config)
    other = load_evaluation_set(
        replace(config, **{"run.seed": 5, "optim.lr": 1.0, "run.eval_prompts": 0})
    )
    assert len(set(one.seeds.tolist())) == 27
    by_prompt = dict(zip(other.prompts.texts, other.seeds.view(-1, 3).tolist(), strict=True))
    seen = set()
    for text, row in zip(one.prompts.texts, one.seeds.view(-1, 3).tolist(), strict=True):
        if text not in seen:
            assert row == by_prompt[text]
        seen.add(text)


def test_accuracy_gives_every_task_the_same_weight():
    values = np.array([1.0, 1.0, 0.0, 1.0, np.nan, 0.5])
    tags = ["a", "a", "a", "b", "b", "c"]
    assert task_means(values, tags) == {"a": 2 / 3, "b": 1.0, "c": 0.5}
    assert balanced_mean(values, tags) == pytest.approx((2 / 3 + 1 + 0.5) / 3)
    assert task_means(values, [""] * 6) == {}
    assert balanced_mean(values, [""] * 6) == pytest.approx(0.7)


def test_interval_agrees_with_theory_and_covers():
    """For n independent prompts the standard error is sqrt(p (1 - p) / n), per task."""
    generator = np.random.default_rng(1)
    prompts = entries_of(tagged(a=400, b=100))
    inside = 0
    for _ in range(40):
        values = np.concatenate([generator.random(400) < 0.8, generator.random(100) < 0.4])
        low, high = bootstrap(
            values.astype(float), prompts.tags, prompts.prompts.indices, draws=500
        )
        inside += low <= 0.6 <= high
        error = 0.5 * np.sqrt(0.8 * 0.2 / 400 + 0.4 * 0.6 / 100)
        assert high - low == pytest.approx(2 * 1.96 * error, rel=0.2)
    assert inside >= 35


def test_repeats_of_a_prompt_do_not_narrow_the_interval():
    prompts = tagged(a=20)
    values = (np.arange(20) % 3 == 0).astype(float)
    once = bootstrap(values, entries_of(prompts).tags, prompts.indices)
    again = entries_of(prompts.take(list(range(20)) * 4))
    again = bootstrap(np.tile(values, 4), again.tags, again.prompts.indices)
    assert again == pytest.approx(once, abs=1e-12)


def test_diversity_is_the_mean_distance_of_pairs():
    torch.manual_seed(0)
    images = torch.randint(0, 256, (2 * 3, 3, 5, 7), dtype=torch.uint8)
    pixels = images.double().view(2, 3, -1) / 255
    pairs = [
        (p[i] - p[j]).square().mean().sqrt() for p in pixels for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert diversity(images, 3) == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-5)
    assert diversity(images[:1].repeat(4, 1, 1, 1), 2) == pytest.approx(0.0, abs=1e-6)


@pytest.fixture(scope="module")
def tiny_policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    config = processes.make(folder, **{"run.eval_prompts": 5, "run.eval_samples": 2})
    return config, Policy.load(config.policy.model, device="cpu", dtype="float32")


def measure(config, policy, **changes):
    scorer = rewards.Scorer({"support.processes:red": 1.0, "test_evaluate:green": 1.0}, retries=0)
    options = {"steps": 3, "batch_size": 4, **changes}
    return evaluate.evaluate(policy, load_evaluation_set(config), scorer, **options)


def green(images, prompts, metadata):
    return images[:, 1].double().mean((1, 2)) / 255


def test_report_is_the_rewards_of_the_sampled_images(tiny_policy, tmp_path):
    config, policy = tiny_policy
    figures = []

    def quality(images, metadata):
        figures.append((tuple(images.shape), len(metadata)))
        return {"brightness": images.double().mean() / 255}

    report = measure(config, policy, quality=quality)
    evaluation_set = load_evaluation_set(config)
    images = evaluate.generate_images(
        policy, evaluation_set.prompts.texts, evaluation_set.seeds, 2, steps=3, batch_size=4
    )
    scores = processes.red(images, None, None).double()
    assert torch.equal(report.per_image, scores)
    assert torch.equal(report.shown, images[::2])
    assert report.marks == scores[::2].tolist()
    means = task_means(scores.view(-1, 2).mean(1).numpy(), evaluation_set.tags)
    assert report.tasks == means and report.accuracy == pytest.approx(np.mean(list(means.values())))
    assert report.interval[0] <= report.accuracy <= report.interval[1]
    assert list(report.scores) == ["support.processes:red", "test_evaluate:green"]
    assert figures == [((10, 3, 8, 8), 10)]
    assert set(report.quality) == {"diversity", "brightness"}
    report.save(tmp_path / "r")
    again = evaluate.Evaluation.load(tmp_path / "r")
    assert again.to_dict() == report.to_dict() and torch.equal(again.shown, report.shown)
    assert torch.equal(again.per_image, report.per_image) and again.seconds == report.seconds


def test_what_the_first_reward_is_called(tiny_policy):
    """Accuracy is a share of images that are right; a closeness in [0, 1] is none."""
    report = measure(*tiny_policy)
    for scores, name in (
        ([0.0, 1.0, float("nan")], "accuracy"),
        ([0.0, 0.6], "support.processes:red"),
    ):
        assert dataclasses.replace(report, per_image=torch.tensor(scores)).label == name


def test_report_does_not_depend_on_the_batch_or_on_global_state(tiny_policy):
    config, policy = tiny_policy
    torch.manual_seed(1)
    one = measure(config, policy)
    torch.manual_seed(2)
    assert measure(config, policy).to_dict() == one.to_dict()
    images = measure(config, policy, batch_size=3).shown.int()
    assert (images - one.shown.int()).abs().max() <= 1


def test_guidance_moves_the_images_and_scale_one_does_not(tiny_policy):
    config, policy = tiny_policy
    plain = measure(config, policy)
    assert measure(config, policy, guidance_scale=1.0).to_dict() == plain.to_dict()
    assert not torch.equal(measure(config, policy, guidance_scale=4.0).shown, plain.shown)
