"""Splits: one prompt has one split, whatever its spelling; shares by exact sums."""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowgrpo.curation.dataset import SPLITS
from flowgrpo.curation.splits import normalise, prompt_key, split_of

SHARES = (0.5, 0.25, 0.25)
LETTERS = "ab AßſİıﬁǰΐΣς１Å\u0301\u0345\u1e9e,.!–。かﾞ🐶+\t\n\u00a0\u2028"
"""Characters with several forms, and those that do not count."""


@pytest.mark.parametrize(
    ("prompt", "normal"),
    [
        ("A red dog.", "a red dog"),
        ("  a  RED\tdog\n", "a red dog"),
        ("a red, dog!", "a red dog"),
        ("“a red dog”", "a red dog"),
        ("ａ ｒｅｄ dog", "a red dog"),
        ("Straße", "strasse"),
        ("ein Hund – zwei", "ein hund zwei"),
        ("C++ and C", "c++ and c"),
        ("zwei hunde", "zwei hunde"),
        ("一只红色的狗。", "一只红色的狗"),
        ("?!", "?!"),
        ("🐶", "🐶"),
    ],
)
def test_normal_form(prompt, normal):
    assert normalise(prompt) == normal


@settings(max_examples=200)
@given(st.text(LETTERS, min_size=1, max_size=8))
def test_the_normal_form_is_a_fixed_point(prompt):
    assert normalise(normalise(prompt)) == normalise(prompt)


@settings(max_examples=50)
@given(st.lists(st.text(LETTERS, min_size=1, max_size=8), min_size=1), st.integers(0, 2**32))
def test_no_prompt_leaks(prompts, seed):
    """Of any prompts, those with one normal form are in one split; so are their other spellings."""
    splits: dict[str, set[str]] = {}
    for prompt in prompts:
        words = normalise(prompt).split()
        spellings = [prompt, prompt.upper(), f" {prompt}\n", "  ".join(words)]
        if words and words[0].isalnum():
            spellings.append(", ".join(words) + ".")
        for spelling in spellings:
            assert normalise(spelling) == normalise(prompt)
            assert prompt_key(spelling) == prompt_key(prompt)
            splits.setdefault(normalise(prompt), set()).add(split_of(spelling, SHARES, seed))
    assert all(len(names) == 1 for names in splits.values())


def test_the_split_is_the_documented_hash():
    digest = hashlib.sha256(b"3\na red dog").digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    bounds = (position * 0.99, position * 1.01 - position * 0.99)
    assert split_of("A red dog!", (*bounds, 1 - sum(bounds)), 3) == "validation"
    assert split_of("A red dog!", (position * 1.01, 0.0, 1 - position * 1.01), 3) == "train"
    assert split_of("A red dog!", (0.0, position * 0.99, 1 - position * 0.99), 3) == "test"


@pytest.mark.slow
def test_shares_are_met_and_a_share_of_0_is_empty():
    prompts = [f"prompt {number}" for number in range(4000)]
    counts = dict.fromkeys(SPLITS, 0)
    for prompt in prompts:
        counts[split_of(prompt, SHARES)] += 1
    # Standard errors of 4000 draws: 32 and 27 prompts.
    assert abs(counts["train"] - 2000) < 130 and abs(counts["test"] - 1000) < 110
    assert {split_of(prompt, (1.0, 0.0, 0.0)) for prompt in prompts} == {"train"}
    assert {split_of(prompt, (0.0, 0.5, 0.5)) for prompt in prompts} == {"validation", "test"}
    assert {split_of(prompt, (0.5, 0.5, 0.0)) for prompt in prompts} == {"train", "validation"}


def test_another_seed_splits_in_another_way():
    prompts = [f"prompt {number}" for number in range(100)]
    ways = {tuple(split_of(prompt, SHARES, seed) for prompt in prompts) for seed in range(4)}
    assert len(ways) == 4
    random.Random(0).shuffle(prompts)
    assert {p: split_of(p, SHARES) for p in prompts} == {
        p: split_of(p, SHARES) for p in sorted(prompts)
    }
