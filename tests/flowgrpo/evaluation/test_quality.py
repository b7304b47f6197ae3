"""Quality figures: found by the prompt set, and held against their tolerances."""

from __future__ import annotations

import math

from flowgrpo.evaluation.quality import quality_of, tolerances_of, within_tolerance
from flowgrpo.nano import verify


def test_quality_of_a_prompt_set():
    assert quality_of("nano") is verify.quality
    assert tolerances_of("nano") == verify.TOLERANCES != {}
    assert quality_of("geneval") is None and tolerances_of("geneval") == {}


def test_within_tolerance():
    before, after = {"a": 0.5}, {"a": 0.4}
    assert within_tolerance("a", before, after, {})
    assert within_tolerance("a", before, after, {"a": 0.0})
    assert within_tolerance("a", before, after, {"a": -0.2})
    assert not within_tolerance("a", before, after, {"a": -0.05})
    assert not within_tolerance("a", after, before, {"a": 0.05})
    assert not within_tolerance("a", before, {"a": math.nan}, {"a": 0.05})
