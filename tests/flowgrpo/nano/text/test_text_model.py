"""nano_text's networks, its pretraining for two steps a stage, its recipe and its weights."""

import json

import numpy as np
import pytest
import torch

from flowgrpo.nano import MODELS
from flowgrpo.nano.text import pretrain, prompts
from flowgrpo.nano.text.model import build
from flowgrpo.nano.text.pretrain import STAGES, Pictures, Pretraining, evaluate, judge, run
from flowgrpo.nano.text.scenes import COLORS, SURFACES, paint
from flowgrpo.policies import Policy
from flowgrpo.recipes import EMBEDDED, recipe
from flowgrpo.rewards import Scorer, load

TINY = {
    "autoencoder_steps": 2,
    "autoencoder_batch": 2,
    "clean_steps": 2,
    "mistaken_steps": 2,
    "batch_size": 4,
    "pictures": 8,
    "evaluate_every": 2,
    "eval_images": 6,
    "warmup": 1,
}


@pytest.fixture(scope="module")
def pipeline():
    return build()


def test_a_token_is_a_word_or_a_character(pipeline):
    tokenizer = pipeline.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(tokenizer('a red sign that says "A7Q"').input_ids)
    assert tokens == ["a", "red", "sign", "that", "says", "A", "7", "Q", "<eos>"]
    longest = prompts.compose("WXYZ", "card", "purple")
    assert len(tokenizer(longest).input_ids) == tokenizer.model_max_length == 10
    for m in prompts.records("train")[:300]:
        assert tokenizer.unk_token_id not in tokenizer(m["prompt"]).input_ids
    assert tokenizer.unk_token_id in tokenizer('a hat that says "A7"').input_ids


@pytest.mark.slow
def test_pretraining_in_one_go_and_in_stages(tmp_path, monkeypatch):
    """The log is whole; stages one by one give the same bits, whatever is measured in between; the
    trainer loads the model."""
    pytest.importorskip("rapidocr")
    last = run(Pretraining(tmp_path / "all", **TINY))
    lines = [json.loads(line) for line in (tmp_path / "all/pretrain.jsonl").open()]
    assert [line.get("stage") for line in lines] == [*STAGES, None] and lines[-1] == last
    assert set(last["heldout, 40 steps"]) == {"guidance 1.0", "guidance 2.0", "guidance 3.5"}
    assert all(0 < line["loss"] < 10 for line in lines[:-1])
    for name in ("evaluate", "evaluate_autoencoder"):
        monkeypatch.setattr(pretrain, name, lambda *_: {})
    run(Pretraining(tmp_path / "a", stages=STAGES[:1], **TINY))
    init = tmp_path / "a/autoencoder"
    run(Pretraining(tmp_path / "b", init=init, stages=STAGES[1:], **TINY))
    first, second = (
        Policy.load(str(tmp_path / name / "model"), device="cpu", dtype="float32")
        for name in ("all", "b")
    )
    for name in ("transformer", "vae", "text_encoder"):
        states = [getattr(p.pipeline, name).state_dict() for p in (first, second)]
        assert all(torch.equal(states[1][key], value) for key, value in states[0].items())
    # The height and width are the model's own.
    assert (first.height, first.width, *first.latent_shape) == (32, 80, 4, 4, 10)


def test_captions_are_wrong_at_the_rate(pipeline):
    rng = np.random.default_rng(0)
    pictures = Pictures(pipeline.vae, 32, rng)
    truths = set(pictures.words)
    for rate in (0.0, 1.0):
        latents, texts = pictures.draw(64, rate, rng)
        assert latents.shape == (64, 4, 4, 10)
        records = [prompts.parse(text) for text in texts]
        wrong = [m["word"] not in truths for m in records]
        # Two words of two characters may differ in one.
        assert sum(wrong) > 60 if rate else not any(wrong)
        assert 16 < sum("color" in m for m in records) < 48


@pytest.mark.slow
def test_real_pictures_are_read_and_wrong_ones_are_not():
    """The bound of the project: at least 0.98 of real pictures are read as they are."""
    pytest.importorskip("rapidocr")
    rng = np.random.default_rng(0)
    records = list(prompts.records("tune")[:120])
    surfaces = np.array([SURFACES.index(m["surface"]) for m in records])
    colors = rng.integers(len(COLORS), size=len(records))
    images = torch.from_numpy(paint([m["word"] for m in records], surfaces, colors, rng))
    true = judge(images, records)
    assert true["accuracy"] >= 0.98 and true["score"] >= true["accuracy"]
    other = [prompts.misread(m["word"], rng) for m in records]
    false = judge(torch.from_numpy(paint(other, surfaces, colors, rng)), records)
    assert false["accuracy"] <= 0.02 < 0.5 < false["score"] < 0.8


def test_the_recipe_reads_without_looking_for_lines():
    config = recipe("nano_text", steps=7, **{"optim.lr": 1e-4})
    assert (config.recipe, config.run.steps, config.optim.lr) == ("nano_text", 7, 1e-4)
    assert "nano_text" in EMBEDDED and next(iter(config.reward.report)) == "ocr_strict"
    scorer = Scorer.of(config.reward)
    assert scorer.rewards["ocr"].options["detect"] is False
    assert load("ocr").options["detect"] is True


@pytest.mark.slow
def test_the_embedded_model_writes():
    """The weights in the package are those that the documentation speaks of."""
    pytest.importorskip("rapidocr")
    files = [path for path in MODELS["nano_text"].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    policy = Policy.load("nano_text", device="cpu", dtype="float32")
    assert (policy.name, policy.height, policy.width) == ("nano_text", 32, 80)
    figures = evaluate(policy.pipeline, "tune", 90, steps=20)
    assert 0.45 <= figures["accuracy"] <= 0.75 and figures["score"] >= 0.75
    assert figures["quality"]["obeyed"] >= 0.95
