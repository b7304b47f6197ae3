"""The record of random input: examples are read from what Hypothesis prints."""

from __future__ import annotations

from experiments import fuzz

OUTPUT = """
tests/flowgrpo/test_random_input.py::test_replace:

  - during generate phase (0.24 seconds):
    - Typical runtimes: ~ 1-11 ms, of which ~ 0-7 ms in data generation
    - 40 passing, 1 failing, and 2 invalid test cases
  - during shrink phase (0.39 seconds):
    - 28 passing examples, 22 failing examples, 19 invalid examples


tests/flowgrpo/test_random_input.py::test_from_json:

  - during generate phase (0.24 seconds):
    - 7 passing, 0 failing, and 0 invalid test cases
"""


def test_examples_are_summed_by_test():
    passed, failed = fuzz.examples_of(OUTPUT)
    assert passed == {"test_replace": 68, "test_from_json": 7}
    assert failed == {"test_replace": 23, "test_from_json": 0}
