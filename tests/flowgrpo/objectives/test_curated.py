"""Curated sets: sft of their images, dpo of their pairs, and mixtures with other objectives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowgrpo import train, update
from flowgrpo.config import ConfigError, replace
from flowgrpo.objectives import curated, matching
from flowgrpo.policies import Policy
from flowgrpo_kernels import initial_noise
from support import curated_sets, setups
from support.forward_process import noised, prepared, record_gradients, velocity_of

SMALL = {
    "sample.prompts_per_iteration": 2,
    "sample.group_size": 4,
    "sample.batch_size": 4,
    "optim.lr": 1e-3,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Five images and five pairs of the tests' prompts, in the size of `pixel_model`."""
    return curated_sets.save(tmp_path_factory.mktemp("curated"), [*setups.TEXTS[:5]], (8, 8))


def offline(name, model, tmp_path, folder, **changes):
    """Components, config and the experience of the first iteration."""
    config = setups.config(
        model,
        tmp_path,
        **{**SMALL, "optim.objective": name, "sample.curated": str(folder), **changes},
    )
    components = setups.parts(config)
    return components, config, components.curated.experience(config, 0)


def pixels(numbers):
    images = torch.stack([curated_sets.picture(int(number), (8, 8)) for number in numbers])
    return images.double() / 127.5 - 1


def test_an_epoch_has_every_image_once(pixel_model, tmp_path):
    """Five images, eight an iteration: five epochs in five iterations, each in its own order."""
    config = setups.config(pixel_model, tmp_path, **SMALL)
    turns = [n for i in range(5) for n in curated.numbers_of(5, config, i, 8).tolist()]
    epochs = [turns[i : i + 5] for i in range(0, 40, 5)]
    assert all(sorted(epoch) == list(range(5)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 2
    many = curated.numbers_of(1000, config, 3, 8)
    assert len(set(many.tolist())) == 8


def test_images_become_results(pixel_model, tmp_path, folder):
    """Without a VAE the latents are the pixels; each row has the prompt of its image."""
    components, config, experience = offline("sft", pixel_model, tmp_path, folder)
    numbers = curated.numbers_of(5, config, 0, 8)
    latents = experience.trajectory.latents[-1]
    torch.testing.assert_close(latents.double(), pixels(numbers), rtol=0, atol=1e-6)
    texts = components.policy.encode([setups.TEXTS[n] for n in numbers])
    rows = experience.conditioning.rows(experience.trajectory.groups)
    assert torch.equal(rows.embeds, texts.embeds) and len(experience.conditioning) == 5


def test_pairs_become_results(pixel_model, tmp_path, folder):
    _, config, experience = offline("dpo", pixel_model, tmp_path, folder)
    numbers = curated.numbers_of(5, config, 0, 4)
    latents = experience.trajectory.latents[-1].double()
    torch.testing.assert_close(latents[:4], pixels(100 + numbers), rtol=0, atol=1e-6)
    torch.testing.assert_close(latents[4:], pixels(200 + numbers), rtol=0, atol=1e-6)
    groups = experience.trajectory.groups
    assert torch.equal(groups[:4], groups[4:])


@pytest.mark.slow
def test_images_decode_to_themselves(latent_model, flux_model):
    """Encoding is the way back of `pixels`: shape, scale and packing, for the VAE's own latents."""
    for model, config in (
        (latent_model, None),
        (flux_model, setups.replace(setups.Config(), **{"policy.resolution": 16}).policy),
    ):
        policy = Policy.load(model, device="cpu", dtype="float32", config=config)
        size = (policy.height, policy.width)
        images = torch.stack([curated_sets.picture(n, size) for n in range(2)])
        latents = policy.encode_images(images)
        assert latents.shape == (2, *policy.latent_shape) and latents.dtype == torch.float32
        vae = policy.pipeline.vae
        mean = vae.encode(images.float() / 127.5 - 1).latent_dist.mean
        with torch.no_grad():
            decoded = vae.decode(mean).sample
        torch.testing.assert_close(policy.pixels(latents), decoded, rtol=1e-4, atol=1e-4)


def gradient_of(model):
    return torch.cat([p.grad.flatten() for _, p in model.named_parameters() if p.requires_grad])


def flat(gradients, model):
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    return torch.cat([gradients[name].double().flatten() for name in names])


@pytest.mark.slow
def test_loss_and_gradients_of_images(pixel_model, tmp_path, folder, monkeypatch):
    """Both optimizer steps of sft, in float64."""
    components, config, experience = offline(
        "sft", pixel_model, tmp_path, folder, **{"optim.beta": 0.2}
    )
    model, base = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    setups.update(components, experience, config)
    draws = matching.draw_levels(components.policy, config, 0)
    for number, actual in enumerate(gradients):
        terms = []
        for row in range(4 * number, 4 * number + 4):
            sigma, sample, target = noised(experience, draws, 0, row)
            v = velocity_of(model, experience, sample, sigma, row, 1.0)
            with torch.no_grad():
                v_ref = velocity_of(base, experience, sample, sigma, row, 1.0)
            error, kl = ((v - other).square().mean() for other in (target, v_ref))
            terms.append(error + 0.2 * kl)
        model.zero_grad()
        torch.stack(terms).mean().backward()
        expected = gradient_of(model)
        assert (flat(actual, model) - expected).norm() < 2e-4 * expected.norm()


def test_loss_and_gradients_of_pairs(pixel_model, tmp_path, folder, monkeypatch):
    """The first optimizer step of dpo: two pairs, each with one level and noise."""
    components, config, experience = offline(
        "dpo", pixel_model, tmp_path, folder, **{"optim.beta": 0.0, "optim.dpo_beta": 20.0}
    )
    model, base = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    setups.update(components, experience, config)
    draws, terms = matching.draw_levels(components.policy, config, 0), []
    results = experience.trajectory.latents[-1].double()
    for pair in range(2):
        noise = initial_noise(draws.seeds[0, pair : pair + 1], results.shape[1:]).double()
        sigma, gaps = draws.sigmas[0, pair].double(), []
        for row in (pair, 4 + pair):
            x0 = results[row : row + 1]
            arguments = (experience, (1 - sigma) * x0 + sigma * noise, sigma, row, 1.0)
            v = velocity_of(model, *arguments)
            with torch.no_grad():
                v_ref = velocity_of(base, *arguments)
            error, error_ref = ((u - (noise - x0)).square().mean() for u in (v, v_ref))
            gaps.append(error - error_ref)
        terms.append(-torch.nn.functional.logsigmoid(-10 * (gaps[0] - gaps[1])))
    torch.stack(terms).mean().backward()
    expected = gradient_of(model)
    assert (flat(gradients[0], model) - expected).norm() < 3e-4 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "nft"])
def test_a_mixture_adds_the_supervised_gradient(pixel_model, tmp_path, folder, monkeypatch, name):
    """Its gradient less that of the objective alone is the weight times that of the images."""
    mixture = {"sample.curated": str(folder), "optim.sft_weight": 0.3, **SMALL}
    components, config, experience = prepared(name, pixel_model, tmp_path, **mixture)
    curated_set = components.curated
    supervision = curated_set.supervision(config, 0)
    model, _ = setups.double_copies(components)
    gradients = record_gradients(monkeypatch, components.state)
    # Two updates of one iteration.
    monkeypatch.setattr(type(components.state), "follow", lambda state: None)
    arguments = (components.schedule, components.state, components.micro_step, experience)
    alone = replace(config, **{"optim.sft_weight": 0.0, "sample.curated": ""})
    metrics = [update.update(*arguments, alone), update.update(*arguments, config, curated_set)]
    assert metrics[1]["max_ratio_error"] == 0.0 and "sft_loss" not in metrics[0]
    assert all(metrics[0][key] == metrics[1][key] for key in metrics[0] if key != "grad_norm")
    draws = matching.draw_levels(components.policy, config, 0, curated.PURPOSES)
    losses = []
    for number in range(2):
        terms = []
        for row in range(4 * number, 4 * number + 4):
            sigma, sample, target = noised(supervision.experience, draws, 0, row)
            v = velocity_of(model, supervision.experience, sample, sigma, row, 1.0)
            terms.append((v - target).square().mean())
        model.zero_grad()
        loss = torch.stack(terms).mean()
        losses.append(loss.item())
        (0.3 * loss).backward()
        expected = gradient_of(model)
        added = flat(gradients[2 + number], model) - flat(gradients[number], model)
        assert (added - expected).norm() < 1e-3 * expected.norm()
    assert metrics[1]["sft_loss"] == pytest.approx(sum(losses) / 2, rel=1e-4)
    own = matching.draw_levels(components.policy, config, 0)
    assert not (own.sigmas == draws.sigmas).any() and not (own.seeds == draws.seeds).any()


def lines(config) -> list[dict]:
    text = Path(config.run.out, "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    return [
        {name: value for name, value in line.items() if name != "seconds"}
        for line in parsed
        if not line.get("final")
    ]


RUN = {
    "sample.steps": 3,
    "sample.window_size": 1,
    "sample.eval_steps": 2,
    "run.steps": 2,
    "run.eval_every": 0,
    "run.eval_prompts": 1,
    "run.eval_samples": 1,
    "run.checkpoint_every": 1,
}
CASES = {
    "sft": {"optim.objective": "sft"},
    "dpo": {"optim.objective": "dpo"},
    "mixture": {"optim.objective": "grpo", "optim.sft_weight": 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_resumes_bit_for_bit(pixel_model, tmp_path, folder, case):
    """Two iterations at once, and one iteration, then another by a resumed run."""
    changes = {**SMALL, **RUN, **CASES[case], "sample.curated": str(folder)}
    whole, halves = (
        setups.config(pixel_model, tmp_path, **{**changes, "run.out": str(tmp_path / out)})
        for out in ("whole", "halves")
    )
    train.run(whole)
    train.run(replace(halves, **{"run.steps": 1}))
    train.run(replace(halves, **{"run.resume": halves.run.out}))
    assert lines(whole) == lines(halves)
    steps = [line for line in lines(whole) if line["kind"] == "train"]
    assert [line["iteration"] for line in steps] == [1, 2] and min(steps[0]["grad_norm"]) > 0
    assert ("rewards" in steps[0]) == (case == "mixture") == ("sft_loss" in steps[0])
    one, other = (Path(c.run.out, "checkpoints", "step-000002") for c in (whole, halves))
    for stem in ("weights", "optimizer", "ema"):
        tensors, others = (load_file(path / f"{stem}.safetensors") for path in (one, other))
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)


@pytest.mark.slow
def test_a_changed_set_is_refused(pixel_model, tmp_path):
    folder = curated_sets.save(tmp_path / "set", [*setups.TEXTS[:3]], (8, 8), pairs=False)
    changes = {**SMALL, **RUN, **CASES["sft"], "sample.curated": str(folder), "run.steps": 1}
    config = setups.config(pixel_model, tmp_path, **changes)
    train.run(config)
    curated_sets.save(folder, [*setups.TEXTS[:4]], (8, 8), pairs=False)
    resumed = replace(config, **{"run.resume": config.run.out, "run.steps": 2})
    with pytest.raises(ConfigError, match=r"prompts of the curated set \(3 then, 4 now\)"):
        train.run(resumed)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.sft_weight": 0.1}, "optim.sft_weight is 0.1, but sample.curated names no set"),
        ({"sample.curated": "set"}, "nothing would be learnt from it; set a weight"),
        (
            {"sample.curated": "set", "optim.sft_weight": 0.1, "optim.objective": "orw"},
            "optim.sft_weight is 0.1 with optim.objective orw",
        ),
        (
            {"sample.curated": "set", "optim.sft_weight": 0.1, "optim.objective": "sft"},
            "optim.sft_weight is 0.1 with optim.objective sft",
        ),
        ({"optim.sft_weight": -1.0}, "optim.sft_weight is -1.0, but it must be at least 0"),
    ],
)
def test_options_that_do_not_fit(tmp_path, changes, message):
    """Before a model or a set is loaded."""
    with pytest.raises(ConfigError, match=message):
        train.setup(setups.config("nowhere", tmp_path, **{**SMALL, **changes}))


def test_sets_that_do_not_fit(pixel_model, tmp_path):
    """Of another size; without pairs; not there."""
    wide = curated_sets.save(tmp_path / "wide", ["a red circle"], (8, 16), pairs=False)
    with pytest.raises(ConfigError, match="images of 16 x 8 pixels, but the model makes 8 x 8"):
        offline("sft", pixel_model, tmp_path, wide)
    with pytest.raises(ConfigError, match=r"has no pairs\.jsonl"):
        offline("dpo", pixel_model, tmp_path, wide)
    with pytest.raises(ConfigError, match=r"has no dataset\.json"):
        offline("sft", pixel_model, tmp_path, tmp_path / "nothing")
