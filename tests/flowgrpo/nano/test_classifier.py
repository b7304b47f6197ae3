"""The classifier of cells: its labels, its answers beside the verifier's, gradient, training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flowgrpo.config import RewardConfig
from flowgrpo.nano import classifier, prompts
from flowgrpo.nano.cells import EMPTY_KIND, JUNK_KIND
from flowgrpo.nano.draw import code, draw, mistake
from flowgrpo.nano.scenes import COLORS, EMPTY, SHAPES, paint
from flowgrpo.rewards import RewardError, load
from flowgrpo.rewards.differentiable import differentiable_rewards

RECORDS = prompts.balanced("heldout", 120)


@pytest.fixture(scope="module")
def images():
    return draw(RECORDS, np.random.default_rng(0))


def test_labels_are_the_cells_that_were_painted():
    rng = np.random.default_rng(1)
    cells = classifier.random_cells(64, rng)
    kinds, colors = classifier.labels(paint(cells, rng))
    shown = cells != EMPTY
    assert 0.5 < shown.mean() < 0.7
    assert (kinds == np.where(shown, cells // len(COLORS), EMPTY_KIND)).all()
    assert (colors == np.where(shown, cells % len(COLORS), -100)).all()


def test_what_the_verifier_does_not_know_is_junk():
    cells = np.array([[code("star", "red"), EMPTY, EMPTY, code("circle", "blue")]])
    image = paint(cells, np.random.default_rng(0))
    # A bar, a colour between those of the palette, and a second object beside the circle.
    image[0, :, 4:8, 34:62] = 0
    image[0, :, 40:60, 8:28] = np.array([120, 190, 190])[:, None, None]
    image[0, :, 33:36, 33:36] = 0
    kinds, colors = classifier.labels(image)
    assert kinds.tolist() == [[SHAPES.index("star"), JUNK_KIND, JUNK_KIND, JUNK_KIND]]
    assert colors.tolist() == [[0, -100, -100, -100]]


def test_agrees_with_the_verifier(images):
    network = classifier.load()
    assert classifier.agreement(network, images, RECORDS) == {
        "agree": 1.0,
        "verifier": 1.0,
        "classifier": 1.0,
    }
    rng = np.random.default_rng(2)
    wrong = draw([mistake(record, rng) for record in RECORDS], rng)
    shares = classifier.agreement(network, wrong, RECORDS)
    assert shares["agree"] >= 0.98 and shares["verifier"] < 0.2


def test_weights_are_small():
    assert classifier.WEIGHTS.stat().st_size <= 300_000
    parameters = sum(p.numel() for p in classifier.load().parameters())
    assert 70_000 < parameters < 76_000
    assert not any(p.requires_grad for p in classifier.load().parameters())


def test_the_gradient_is_that_of_finite_differences(images):
    """In float64, along random directions of the pixels, each image by itself."""
    network = classifier.CellClassifier()
    network.load_state_dict(classifier.load().state_dict())
    network.double()
    pixels = torch.from_numpy(images[:6]).double().requires_grad_()
    # The second three are asked for what they do not show.
    records = RECORDS[:3] + RECORDS[60:63]
    (gradient,) = torch.autograd.grad(classifier.score(network, pixels, records).sum(), pixels)
    assert gradient.flatten(1).norm(dim=1).min() > 0
    generator = torch.Generator().manual_seed(0)
    # In levels of 255: with 1e-5 rounding shows, with 1e-1 the third derivative.
    step = 1e-3
    for _ in range(3):
        direction = torch.randn(pixels.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            above, below = (
                classifier.score(network, pixels + sign * step * direction, records)
                for sign in (1, -1)
            )
        slopes = (gradient * direction).flatten(1).sum(1)
        assert slopes.tolist() == pytest.approx(((above - below) / (2 * step)).tolist(), rel=1e-5)


def test_the_gradient_leads_to_a_picture_that_fulfils_the_prompt():
    """From grey noise over the background, by the gradient alone."""
    generator = torch.Generator().manual_seed(0)
    start = (246 + 4 * torch.randn(1, 3, 64, 64, generator=generator)).clamp(0, 255)
    records = [prompts.parse("a red circle")]
    before = classifier.score(classifier.load(), start, records).item()
    pixels = start.requires_grad_()
    for _ in range(20):
        value = classifier.score(classifier.load(), pixels, records).sum()
        (gradient,) = torch.autograd.grad(value, pixels)
        pixels = (pixels + 20 * gradient / gradient.abs().max()).clamp(0, 255).detach()
        pixels.requires_grad_()
    assert classifier.score(classifier.load(), pixels, records).item() > before + 1


def test_pictures_of_another_size_are_refused():
    with pytest.raises(
        ValueError, match=r"pixels: expected \[B, 3, 64, 64\], got \[1, 3, 32, 64\]"
    ):
        classifier.load()(torch.zeros(1, 3, 32, 64))


def test_reward_and_its_gradient(images):
    reward = load("nano_classifier")
    texts = [record["prompt"] for record in RECORDS[:12]]
    pictures = torch.from_numpy(images[:12])
    scores = reward(pictures, texts, RECORDS[:12])
    assert scores.shape == (12,) and not scores.requires_grad
    assert (scores <= 0).all() and (scores.exp() > 0.5).all()
    [(weight, of_pixels)] = differentiable_rewards(RewardConfig(weights={"nano_classifier": 0.5}))
    pixels = pictures.float().requires_grad_()
    values = of_pixels(pixels, texts, RECORDS[:12])
    assert weight == 0.5 and torch.equal(values.detach(), scores)
    values.sum().backward()
    assert pixels.grad.abs().flatten(1).sum(1).min() > 0


def test_prompts_are_looked_at_before_the_first_image():
    check = load("nano_classifier").check
    check("two stars", prompts.parse("two stars"))
    with pytest.raises(RewardError, match="comes without a list 'include'"):
        check("a star", {})
    with pytest.raises(
        RewardError, match=r"cannot judge the prompt 'five stars': .*ask for at most"
    ):
        check("five stars", {"include": [{"class": "star", "count": 5}]})


@pytest.mark.slow
def test_training_is_reproducible(tmp_path):
    sizes = {"pictures": 40, "steps": 3, "batch_size": 8, "eval_images": 6}
    paths = [tmp_path / f"{n}" / "c.safetensors" for n in range(3)]
    records = [
        classifier.run(classifier.ClassifierTraining(out=path, seed=seed, **sizes))
        for path, seed in zip(paths, (0, 0, 1), strict=True)
    ]
    contents = [path.read_bytes() for path in paths]
    assert contents[0] == contents[1] != contents[2]
    assert records[0] == records[1]
    stored = json.loads(paths[0].with_name("c.safetensors.json").read_text())
    assert stored == records[0]
    assert stored["settings"] == {**sizes, "lr": 3e-3, "smoothing": 0.02, "seed": 0}
    assert set(stored["agreement"]) == {
        "renders",
        "decoded renders",
        "renders of mistaken prompts",
        "samples of the model",
    }


def test_training_lowers_the_loss():
    """Forty steps on a few renders: colours are told apart at once."""
    rng = np.random.default_rng(3)
    images = paint(classifier.random_cells(64, rng), rng)
    config = classifier.ClassifierTraining(out=None, steps=40, batch_size=32)
    network = classifier.train(images, config)
    colors = torch.from_numpy(classifier.labels(images)[1])
    known = colors >= 0
    with torch.no_grad():
        log_colors = network(torch.from_numpy(images).float())[1]
    right = (log_colors.argmax(-1) == colors)[known].float().mean()
    assert right > 0.6
