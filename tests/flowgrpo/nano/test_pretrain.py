"""The script that made nano's weights, for two steps a stage."""

import json

import numpy as np
import pytest
import torch

from flowgrpo.nano import pretrain, prompts, scenes
from flowgrpo.nano.draw import arrange, mistake
from flowgrpo.nano.model import build
from flowgrpo.nano.muon import Muon, orthogonalise
from flowgrpo.nano.pretrain import STAGES, Latents, Pretraining, contents, run, schedule
from flowgrpo.policies import Policy

TINY = {
    "autoencoder_steps": 2,
    "autoencoder_batch": 2,
    "clean_steps": 2,
    "mistaken_steps": 2,
    "batch_size": 4,
    "variants": 1,
    "evaluate_every": 2,
    "eval_images": 12,
    "warmup": 1,
}


@pytest.fixture
def counting(monkeypatch):
    """Captions of counting alone, and the pictures that they ask for: a tenth of all."""
    rows = contents()
    alike = rows[[len(set(row) - {scenes.EMPTY}) == 1 for row in rows.tolist()]]
    records = [m for m in prompts.records("train") if m["tag"] == "counting"]
    draw = lambda rng, shares: records[rng.integers(len(records))]  # noqa: E731
    monkeypatch.setattr(pretrain, "contents", lambda: alike)
    monkeypatch.setattr(pretrain, "caption", draw)


@pytest.mark.slow
def test_a_run_and_the_same_in_stages(tmp_path, counting, monkeypatch):
    """The log is whole; stages one by one give the same bits, whatever is measured in between; the
    trainer loads the model."""
    last = run(Pretraining(tmp_path / "all", **TINY))
    lines = [json.loads(line) for line in (tmp_path / "all/pretrain.jsonl").open()]
    assert [line.get("stage") for line in lines] == [*STAGES, None]
    assert lines[-1] == last and last["config"]["clean_steps"] == 2
    assert set(last["heldout, 40 steps"]) == {"guidance 1.0", "guidance 2.0", "guidance 3.5"}
    assert all(0 < line["loss"] < 10 for line in lines[:-1])

    for name in ("evaluate", "evaluate_autoencoder"):
        monkeypatch.setattr(pretrain, name, lambda *_: {})
    run(Pretraining(tmp_path / "a", stages=STAGES[:1], **TINY))
    rest = Pretraining(tmp_path / "b", init=tmp_path / "a/autoencoder", stages=STAGES[1:], **TINY)
    run(rest)
    # At a rate of 0 a run ends with the weights that it began with.
    still = {"muon_lr": 0.0, "adam_lr": 0.0, "seed": 1, "stages": ("clean",)}
    run(Pretraining(tmp_path / "c", init=tmp_path / "b/mistaken", **still, **TINY))
    policies = [
        Policy.load(str(tmp_path / name / "model"), device="cpu", dtype="float32")
        for name in ("all", "b", "c")
    ]
    for name in ("transformer", "vae"):
        states = [getattr(policy.pipeline, name).state_dict() for policy in policies]
        for other in states[1:]:
            assert all(torch.equal(other[key], value) for key, value in states[0].items())
    scales = [policy.pipeline.vae.config["scaling_factor"] for policy in policies]
    assert scales[0] == scales[1] == scales[2] != 1
    assert policies[0].encode(["a red circle"]).embeds.isfinite().all()


def test_the_rate_warms_up_stays_and_falls_to_zero(tmp_path):
    config = Pretraining(tmp_path, warmup=10, anneal=0.4)
    assert schedule(0, 100, config) == 0.1
    assert schedule(9, 100, config) == schedule(60, 100, config) == 1
    assert schedule(80, 100, config) == 0.5
    assert schedule(100, 100, config) == 0


def test_all_captions_and_their_mistakes_ask_for_pictures_that_are_encoded():
    known = {tuple(row) for row in contents().tolist()}
    assert len(known) == len(contents())
    rng = np.random.default_rng(0)
    records = [prompts.records("train")[i] for i in rng.integers(3000, size=300)]
    asked = arrange([*records, *(mistake(m, rng) for m in records)], rng)
    assert {tuple(row) for row in asked.tolist()} <= known


def test_latents_are_those_of_the_pictures(monkeypatch):
    rows = contents()[[0, 200, 3000]]
    monkeypatch.setattr(pretrain, "contents", lambda: rows)
    vae = build().vae.requires_grad_(False).eval()
    latents = Latents(vae, 2, np.random.default_rng(0))
    painted = scenes.paint(rows.repeat(2, axis=0), np.random.default_rng(0))
    expected = pretrain.encode_images(vae, painted).reshape(3, 2, -1)
    found = latents.of(rows[[2, 0, 0]], np.random.default_rng(1)).reshape(3, -1)
    for latent, options in zip(found, expected[[2, 0, 0]], strict=True):
        assert any(torch.equal(latent, option) for option in options)
    with pytest.raises(ValueError, match=r"cells: \[29, 29, 29, 28\] were not encoded"):
        latents.of(np.array([[29, 29, 29, 28]]), np.random.default_rng(1))


def test_muon_sends_singular_values_near_one_and_keeps_the_directions():
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 8, 20, generator=generator)
    for batch in (matrices, matrices.mT):
        out = orthogonalise(batch)
        values = torch.linalg.svdvals(out)
        assert values.min() > 0.6 and values.max() < 1.3
        u, _, vh = torch.linalg.svd(batch.double(), full_matrices=False)
        inner = (out.double() * (u @ vh)).sum((1, 2)) / out.norm(dim=(1, 2)) / 8**0.5
        assert (inner > 0.95).all()


def test_muon_updates_as_torchs_own_does():
    """In the same steps, but for bfloat16 there."""
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in ((6, 6), (24, 6), (6, 6))]
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    both = Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        gradients = [torch.randn(p.shape, generator=generator) for p in start]
        for params, optimizer in zip((ours, theirs), both, strict=True):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b, s in zip(ours, theirs, start, strict=True):
        moved = (b - s).norm()
        assert moved > 0.05 and (a - b).norm() < 0.03 * moved
