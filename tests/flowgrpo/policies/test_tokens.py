"""Prompts that the text encoders cut: their number, said once."""

from __future__ import annotations

import pytest

from flowgrpo import train
from flowgrpo.config import PolicyConfig, replace
from flowgrpo.policies import Policy, load
from flowgrpo.policies.tokens import count_cut, warn_of_cut
from support import setups

SHORT, MIDDLE, LONG = "a red circle", "red " * 100, "red " * 400
CONFIG = PolicyConfig(text_cache="", resolution=16, max_sequence_length=128)


@pytest.fixture(params=["latent_model", "flux_model"])
def policy(request):
    model = str(request.getfixturevalue(request.param))
    return Policy.load(model, device="cpu", dtype="float32", config=CONFIG)


def lengths(policy, texts):
    """Tokens of each text, special ones too: limit -> a list of numbers, by each tokenizer."""
    return [(limit, [len(t(x).input_ids) for x in texts]) for t, limit in policy.token_limits()]


def test_the_limits_are_those_of_the_encoders(policy, monkeypatch):
    limits = [limit for _, limit in policy.token_limits()]
    clip = policy.pipeline.tokenizer.model_max_length
    assert set(limits) == {clip, 128} and limits[-1] == 128
    # Each tokenizer is really cut there by the pipeline.
    rows = {}
    for number, (tokenizer, limit) in enumerate(policy.token_limits()):
        assert len(tokenizer(LONG).input_ids) > limit, number
        rows[limit] = len(tokenizer(LONG, truncation=True, max_length=limit).input_ids)
    assert rows == {limit: limit for limit in limits}


def test_texts_are_counted_by_their_tokens(policy):
    texts = [SHORT, MIDDLE, LONG, "", SHORT]
    expected = {}
    for limit, numbers in lengths(policy, texts):
        longer = sum(number > limit for number in numbers)
        expected[limit] = max(longer, expected.get(limit, 0))
    assert count_cut(policy, texts) == expected and max(expected.values()) >= 1
    exact = {}
    for tokenizer, limit in policy.token_limits():
        words = 1
        while len(tokenizer("red " * (words + 1)).input_ids) <= limit:
            words += 1
        exact[limit] = "red " * words, "red " * (words + 1)
    for limit, (whole, cut) in exact.items():
        assert count_cut(policy, [whole])[limit] == 0 and count_cut(policy, [cut])[limit] == 1


def test_it_is_one_line_of_the_log(policy, caplog):
    warn_of_cut(policy, [SHORT, SHORT])
    assert not caplog.records
    warn_of_cut(policy, [SHORT, LONG, LONG])
    (record,) = caplog.records
    assert record.getMessage().startswith("of 2 prompts the text encoders cut 1 at ")
    assert "1 at 128 tokens" in record.getMessage()


def test_an_encoder_of_the_callers_own_has_no_limits(latent_model):
    policy = Policy.load(
        str(latent_model), device="cpu", dtype="float32", config=CONFIG, encode=lambda texts: None
    )
    assert policy.token_limits() == [] and count_cut(policy, [LONG]) == {}


@pytest.mark.slow
def test_a_run_says_it_once(pixel_model, tmp_path, caplog, monkeypatch):
    config = setups.config(pixel_model, tmp_path)
    train.setup(config)
    assert "encoders cut" not in caplog.text
    limit = load.load_policy(config).pipeline.tokenizer.model_max_length
    (tmp_path / "long.txt").write_text("\n".join(["a red circle", "red " * (limit + 5), "red"]))
    train.setup(replace(config, **{"sample.prompts": str(tmp_path / "long.txt")}))
    assert caplog.text.count("encoders cut") == 1
    assert f"of 3 prompts the text encoders cut 1 at {limit} tokens" in caplog.text


def test_held_out_prompts_are_counted_too(latent_model, tmp_path, caplog):
    """Of a folder with splits; those of one file are training's."""
    from flowgrpo.runs.monitor import Monitor
    from flowgrpo.runs.state import State
    from support import processes

    for split, text in (("train", SHORT), ("test", LONG)):
        (tmp_path / f"{split}.txt").write_text(f"{text}\n")
    reward = {"jpeg_compressibility": 1.0}
    config = replace(
        processes.make(tmp_path),
        **{"sample.prompts": str(tmp_path), "reward.weights": reward, "policy.resolution": 16},
    )
    policy = Policy.load(str(latent_model), device="cpu", dtype="float32", config=config.policy)
    state = State({}, None, config.optim, None)
    Monitor(config, policy, state)
    assert "of 1 held-out prompts the text encoders cut 1 at " in caplog.text
    caplog.clear()
    Monitor(replace(config, **{"sample.prompts": str(tmp_path / "test.txt")}), policy, state)
    assert "the text encoders cut" not in caplog.text
