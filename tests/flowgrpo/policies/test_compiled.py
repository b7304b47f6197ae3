"""A compiled transformer: rollout and update still agree to the bit, and nothing is kept."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._dynamo.utils import counters

from flowgrpo import cuda_graphs, train, update
from flowgrpo.policies import compiled
from flowgrpo.runs.state import State
from support import setups
from support.cpu_graphs import Recorder, as_without_modes, assert_equal

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("g++") is None and shutil.which("clang++") is None,
        reason="torch.compile needs a C++ compiler on a CPU",
    ),
]


# Half a minute of compilation, of the first and the last block alone: with beta 0 the form without
# adapters is not needed. Later tests find the code of the first one.
CHANGES = {"policy.compile": True, "policy.dtype": "bfloat16", "optim.beta": 0.0}


def graphs() -> int:
    """Forwards that were compiled since the process began."""
    return counters["stats"]["unique_graphs"]


def test_captured_it_has_the_bits_of_uncaptured_code(pixel_model, tmp_path):
    """Rollout and update, where nothing is compiled before the first capture warms up: its warm-ups
    compile all that there is, forward and backward, and what follows compiles nothing."""
    config = setups.config(pixel_model, tmp_path, **CHANGES)
    parts, found, before = setups.parts(config), [], graphs()
    policy, state = parts.policy, [p.detach().clone() for p in parts.policy.parameters()]
    as_without_modes(policy.transformer)
    recorder = Recorder()
    for made in (cuda_graphs.Graphs(policy, recorder), None):
        with torch.no_grad():
            for parameter, value in zip(policy.parameters(), state, strict=True):
                parameter.copy_(value)
        policy.graphs, micro = made, update.MicroStep(policy, parts.objective, made)
        again = State.create(policy.transformer, config.optim)
        parts = train.Components(**{**vars(parts), "micro_step": micro, "state": again})
        metrics, paths = [], []
        for again.iteration in range(2):
            experience = setups.experience(parts, config)
            paths.append(experience.trajectory)
            metrics.append(setups.update(parts, experience, config))
        found.append((metrics, [p.detach().clone() for p in policy.parameters()]))
        if made is not None:
            captured, count = paths, graphs()
    assert count in (before + 2, before), "the first block, and the last one"
    assert graphs() == count and recorder.captures == 2 and recorder.replays == 2 * (4 + 8)
    for pair in zip(captured, paths, strict=True):
        assert_equal(*pair)
    assert found[0][0] == found[1][0] and all(map(torch.equal, found[0][1], found[1][1]))
    assert all(one["max_ratio_error"] == 0.0 for one in found[0][0])
    assert not all(map(torch.equal, state, found[0][1]))


def test_nothing_is_compiled_in_a_capture(pixel_model, tmp_path):
    """A block that is new to the capture says so, and is not compiled in it."""
    config = setups.config(pixel_model, tmp_path, **CHANGES)
    policy = setups.parts(config).policy
    as_without_modes(policy.transformer)

    class Cold(Recorder):
        def warm_up(self, body):
            """As of code that depends on something else in each run."""

    policy.graphs = cuda_graphs.Graphs(policy, Cold())
    before, texts = graphs(), ["a circle"] * 5
    arguments = (torch.ones(5, *policy.latent_shape), torch.ones(5), policy.encode(texts))
    with torch.no_grad(), pytest.raises(cuda_graphs.CaptureError, match="recompile"):
        policy.graphs(velocity, policy, *arguments)
    assert graphs() == before and policy.graphs.recordings == {}


def velocity(policy, *arguments):
    return policy.velocity(*arguments)


def test_first_ratios_are_exactly_one(pixel_model, tmp_path):
    """An iteration with adapters that are not zero; the velocity is the eager one within
    rounding, with gradients and without."""
    eager = setups.parts(setups.config(pixel_model, tmp_path, **{"policy.dtype": "bfloat16"}))
    config = setups.config(pixel_model, tmp_path, **CHANGES)
    parts = setups.parts(config)
    policy = parts.policy
    assert policy.compiled and not eager.policy.compiled

    # As many rows as in a chunk, and as there with ready matrices: other forms are other code.
    conditioning = policy.encode(["a circle", "two square", "a dark triangle"])
    x = torch.randn(3, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    sigma = torch.tensor([0.9, 0.3, 0.1])
    with policy.frozen_weights():
        with_gradients = policy.velocity(x, sigma, conditioning)
        with torch.no_grad():
            without = policy.velocity(x, sigma, conditioning)
    with torch.no_grad():
        expected = eager.policy.velocity(x, sigma, conditioning)
    assert with_gradients.requires_grad and not without.requires_grad
    assert torch.equal(with_gradients, without)
    error = (without.float() - expected.float()).norm() / expected.float().norm()
    assert 0 < error < 0.02, "the compiled kernels run, and compute the same function"

    metrics = setups.update(parts, setups.experience(parts, config), config)
    assert metrics["max_ratio_error"] == 0.0


def test_training_form_keeps_nothing():
    layer = torch.nn.Linear(4, 4)
    with torch.no_grad(), compiled.as_training_forward():
        y = layer(torch.ones(2, 4)).square().sum()
    assert y.requires_grad
    with pytest.raises(RuntimeError, match="keeps nothing"):
        y.backward()


def test_all_blocks_are_compiled_one_by_one(pixel_model, tmp_path):
    config = setups.config(pixel_model, tmp_path, **{"policy.compile": True})
    policy = setups.parts(config).policy
    transformer, found = policy.transformer, policy.family.blocks_of(policy.transformer)
    assert found == list(transformer.transformer_blocks)
    assert all(block._compiled_call_impl is not None for block in found)
    assert transformer._compiled_call_impl is None
