"""Captured micro-steps: gradients, weights and figures have the eager bits."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import cuda_graphs, train, update
from support import setups
from support.cpu_graphs import Recorder

CASES = {
    "plain": {},
    "guidance": {"sample.guidance_scale": 2.5},
    "guard, beta 0": {"optim.guard": True, "optim.beta": 0.0},
    "bfloat16, weighted": {"policy.dtype": "bfloat16", "optim.step_weighting": "std"},
    "float16": {"policy.dtype": "float16"},
    "full": {"policy.adapter": "full", "policy.dtype": "auto"},
    "recomputed": {"policy.gradient_checkpointing": True},
    "packed, recomputed": {"policy.quantize": "nf4", "policy.gradient_checkpointing": True},
}


def made(model, folder, record: bool, **changes):
    """Parts and config; with `record`, rollout and update are captured and share their graphs."""
    config = setups.config(
        model, folder, **{"sample.share_prefix": False, "sample.steps": 4, **changes}
    )
    parts = setups.parts(config)
    if record:
        parts.policy.graphs = cuda_graphs.Graphs(parts.policy, Recorder())
        micro = update.MicroStep(parts.policy, parts.objective, parts.policy.graphs)
        parts = train.Components(**{**vars(parts), "micro_step": micro})
    return parts, config


def iterations(parts, config, count=2):
    found = []
    for parts.state.iteration in range(count):
        found.append(setups.update(parts, setups.experience(parts, config), config))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_update_has_the_eager_bits(pixel_model, tmp_path, case):
    """Two iterations of two optimizer steps of two chunks at two trained steps, one graph."""
    eager, config = made(pixel_model, tmp_path, False, **CASES[case])
    parts, _ = made(pixel_model, tmp_path, True, **CASES[case])
    expected, found = iterations(eager, config), iterations(parts, config)
    assert found == expected
    assert all(metrics["max_ratio_error"] == 0.0 for metrics in found)
    assert all(norm > 0 for metrics in found for norm in metrics["grad_norm"])
    for name, parameter in parts.state.parameters.items():
        assert torch.equal(parameter, eager.state.parameters[name]), name
    recorder = parts.policy.graphs.recorder
    # One of the rollout's chunks and one of the micro-steps.
    assert recorder.captures == 2 and recorder.replays == 2 * (4 + 8)


@pytest.mark.slow
def test_gradients_survive_a_new_capture(pixel_model, tmp_path, caplog):
    """A parameter moves between two micro-steps: what had added up is not lost."""
    eager, config = made(pixel_model, tmp_path, False)
    parts, _ = made(pixel_model, tmp_path, True)
    for these in (eager, parts):
        weight = these.policy.transformer.transformer_blocks[0].ff.net[2].base_layer.weight
        micro = Moving(these.micro_step, weight)
        iterations(train.Components(**{**vars(these), "micro_step": micro}), config, 1)
        assert micro.calls == 8
    assert "run_micro_step is captured again" in caplog.text
    for name, parameter in parts.state.parameters.items():
        assert torch.equal(parameter, eager.state.parameters[name]), name


class Moving:
    """Micro-steps; before the second one a weight of the model moves."""

    def __init__(self, micro, weight):
        self.micro, self.weight, self.calls = micro, weight, 0
        self.accumulating = micro.accumulating
        self.policy, self.objective = micro.policy, micro.objective

    def __call__(self, *arguments):
        self.calls += 1
        if self.calls == 2:
            self.weight.data = self.weight.data.clone()
        return self.micro(*arguments)


@pytest.mark.slow
def test_a_loss_that_synchronises(pixel_model, tmp_path):
    """The message names the option of the update; gradients and weights are as before."""
    parts, config = made(pixel_model, tmp_path, True)
    experience = setups.experience(parts, config)
    before = {n: p.detach().clone() for n, p in parts.state.parameters.items()}
    hook = parts.policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: kwargs["hidden_states"].sum().item() and None,
        with_kwargs=True,
    )
    with pytest.raises(
        cuda_graphs.CaptureError, match=r"graph of run_micro_step .* set optim.capture to"
    ):
        setups.update(parts, experience, config)
    hook.remove()
    assert all(torch.equal(p, before[n]) for n, p in parts.state.parameters.items())
    assert all(not g.any() for g in parts.micro_step.gradients)
    assert setups.update(parts, experience, config)["max_ratio_error"] == 0.0
