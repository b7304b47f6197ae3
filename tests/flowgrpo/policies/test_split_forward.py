"""Several trained steps in one forward, with the bits of one step at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.policies import split_forward
from support import setups

CASES = {
    "plain": {},
    "guidance, fused": {"sample.guidance_scale": 3.0, "policy.fused": True},
    "recomputed": {"policy.gradient_checkpointing": True, "optim.beta": 0.0},
    "replay": {"optim.anchor": "replay", "optim.guard": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_has_the_bits_of_single_steps(pixel_model, tmp_path, case):
    """Ratios of exactly 1, the same metrics, and the same gradients but for the order of sums."""
    changes = {"sample.window_size": 4, "sample.batch_size": 6, **CASES[case]}
    config = setups.config(pixel_model, tmp_path, **changes)
    split = replace(config, **{"optim.steps_per_forward": 2, "optim.split_forward": True})
    results = []
    for one in (config, split):
        parts = setups.parts(one)
        metrics = setups.update(parts, setups.experience(parts, one), one)
        results.append((metrics, [p.detach() for p in parts.state.parameters.values()]))
    (single, weights), (joint, others) = results
    assert joint["max_ratio_error"] == 0.0
    assert joint["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)
    assert joint["kl"] == pytest.approx(single["kl"], rel=1e-4)
    for one, other in zip(weights, others, strict=True):
        # Adam's first steps have the size of lr whatever the gradient.
        assert (one - other).abs().mean() < 0.02 * config.optim.lr


class Doubles(nn.Module):
    """Counts its calls and the rows of each."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[torch.Tensor] = []

    def forward(self, x, scale=None, table=None, flag=False):
        self.calls.append(x)
        return (2 * x, None) if flag else 2 * x * (1 if scale is None else scale)


@pytest.mark.parametrize("halves", [1, 2])
def test_parts_have_the_rows_of_a_step(halves):
    """Rows are [halves, steps, b]; a part has its step's of both halves, and results go back."""
    module, parts = Doubles(), split_forward.Parts()
    split_forward.install([module], parts)
    x = torch.arange(24.0).view(12, 2)
    with parts.of(3), split_forward.rows(parts, 12, halves):
        y = module(x, scale=torch.ones(12, 1), table=torch.ones(5, 2))
        pair = module(x, flag=True)
    assert y.equal(2 * x) and pair[0].equal(2 * x) and pair[1] is None
    expected = x.view(halves, 3, -1, 2)
    for part, rows in enumerate(module.calls[:3]):
        assert rows.equal(expected[:, part].flatten(0, 1))
    assert module(x).equal(2 * x) and module.calls[-1] is x


def test_rows_that_cannot_be_split():
    parts = split_forward.Parts()
    with parts.of(5), pytest.raises(ValueError, match="12 rows cannot be split into 5 steps"):
        split_forward.rows(parts, 12, 1)


def test_a_second_run_is_split_as_the_first():
    parts = split_forward.Parts()
    with parts.of(3), split_forward.rows(parts, 12, 2):
        _, again = parts.contexts()
    assert parts.count == 1
    with again:
        assert (parts.count, parts.rows, parts.halves) == (3, 12, 2)
    assert (parts.count, parts.rows, parts.halves) == (1, 0, 1)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, r"optim\.split_forward is on with optim\.steps_per_forward 1"),
        ({"optim.steps_per_forward": 3, "policy.compile": True}, "choose one"),
    ],
)
def test_bad_settings(changes, sentence):
    with pytest.raises(ConfigError, match=sentence):
        replace(Config(), **{"optim.split_forward": True, **changes})


def test_a_split_forward_needs_no_tolerance():
    changes = {"optim.steps_per_forward": 3, "optim.split_forward": True}
    assert replace(Config(), **changes).optim.ratio_tolerance == 0
