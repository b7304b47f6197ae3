"""The micro-steps of an update: their order, and the share of each in the loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from flowgrpo import objectives
from support import setups


def test_update_takes_the_chunks_in_order(pixel_model, tmp_path, monkeypatch):
    """Two updates of two chunks each, every chunk at each of its trained steps, the loss scaled."""
    config = setups.config(pixel_model, tmp_path, **{"sample.window_size": 3})
    parts = setups.parts(config)
    calls, gather = [], objectives.gather_trained_steps

    def gathered(schedule, experience, rows, turns):
        calls.append((len(steps), rows, turns))
        return gather(schedule, experience, rows, turns)

    def loss(policy, batch, config):
        leaf = torch.ones((), requires_grad=True)
        leaf.register_hook(lambda g: scales.append(g.item()))
        return objectives.Loss(leaf * 1.0, {"loss": torch.ones(())}, torch.ones(3))

    steps, scales = [], []
    row = dataclasses.replace(parts.objective, gather=gathered, loss=loss)
    monkeypatch.setattr(parts.micro_step, "objective", row)
    monkeypatch.setattr(type(parts.state), "step", lambda s: (steps.append(1), torch.ones(()))[1])
    metrics = setups.update(parts, setups.experience(parts, config), config)
    chunks = [(u, slice(r, r + 3)) for u in (0, 1) for r in (6 * u, 6 * u + 3)]
    order = [(*chunk, range(w, w + 1)) for chunk in chunks for w in range(3)]
    assert calls == order and metrics["loss"] == 1.0 and metrics["grad_norm"] == [1.0, 1.0]
    assert scales == [pytest.approx(1 / 6)] * 12
