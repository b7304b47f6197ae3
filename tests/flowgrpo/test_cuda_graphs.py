"""Captured rollouts and evaluations have the bits of eager ones.

On the CPU a recorder of tensor operations stands in for CUDA (support/cpu_graphs.py);
test_cuda_graphs_gpu.py
has the same checks for a GPU.
"""

from __future__ import annotations

import logging
from functools import partial

import pytest
import torch

from flowgrpo import cuda_graphs, train
from flowgrpo.config import replace
from flowgrpo.sampling.rollout import rollout
from flowgrpo.sampling.schedule import table_rows, training_schedule
from support import setups
from support.cpu_graphs import Recorder, assert_equal, eager, evaluate, made

CASES = {
    "plain": {},
    "bfloat16, all steps": {"policy.dtype": "bfloat16", "sample.window_size": 0},
    "guidance and guard": {"sample.guidance_scale": 3.0, "optim.guard": True, "optim.beta": 0.0},
    "cps, shared noise": {"sample.transition": "cps", "sample.shared_noise": True},
    "full": {"policy.adapter": "full", "policy.dtype": "auto"},
}


@pytest.fixture(scope="module")
def shared(pixel_model, tmp_path_factory):
    return made(pixel_model, tmp_path_factory.mktemp("capture"))


@pytest.fixture
def parts(shared):
    """Without graphs of another test."""
    shared[0].policy.graphs = cuda_graphs.Graphs(shared[0].policy, Recorder())
    return shared[0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_captured_rollout_has_the_eager_bits(pixel_model, tmp_path, case):
    """Over iterations with other windows, prompts and seeds, after optimizer steps, and at another
    noise level: one graph serves all of them."""
    parts, config = made(pixel_model, tmp_path, **{"sample.steps": 4, **CASES[case]})
    policy, starts = parts.policy, set()
    for parts.state.iteration in range(3):
        conditioning = policy.encode(setups.TEXTS[parts.state.iteration :][:2])
        found = train.collect(parts, conditioning, config)
        assert_equal(found, eager(policy, partial(train.collect, parts, conditioning, config)))
        starts.add(tuple(found.trained_steps[0].tolist()))
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.01)
        if parts.state.iteration == 1:
            quieter = replace(config, **{"sample.noise_level": 0.4})
            parts = train.Components(
                **{**vars(parts), "schedule": training_schedule(policy, quieter.sample)}
            )
    assert policy.graphs.recorder.captures == 1 and policy.graphs.recorder.replays == 3 * 4
    assert len(starts) > 1 or config.sample.window_size == 0


@pytest.mark.slow
@pytest.mark.parametrize(("model", "pixels"), [("latent_model", 0), ("flux_model", 16)])
def test_models_of_the_real_classes_can_be_captured(request, tmp_path, model, pixels):
    """Nothing in diffusers' forwards waits for the device or reads host memory."""
    changes = {"policy.lora_targets": None, "policy.resolution": pixels, "sample.steps": 4}
    parts, config = made(request.getfixturevalue(model), tmp_path, **changes)
    policy = parts.policy
    conditioning = policy.encode(setups.TEXTS[:2])
    found = train.collect(parts, conditioning, config)
    assert_equal(found, eager(policy, partial(train.collect, parts, conditioning, config)))
    assert torch.equal(evaluate(policy), eager(policy, partial(evaluate, policy)))


@pytest.mark.slow
def test_a_short_chunk_is_filled_up(parts, shared):
    """7 rows in chunks of 3: the last one has the bits of a whole chunk, captured and not, because
    it is one."""
    policy, config, rows = parts.policy, shared[1], []

    def run(rows):
        positions = torch.ones(2, rows, dtype=torch.int64) + torch.arange(2)[:, None]
        return rollout(
            policy,
            policy.encode(setups.TEXTS[:2]),
            parts.schedule,
            table_rows(positions, config.sample.steps),
            groups=torch.arange(rows) // 5,
            seeds=torch.arange(rows) + 5,
            batch_size=3,
            trained_steps=positions,
        )

    found, expected = run(7), eager(policy, lambda: run(9))
    assert torch.equal(found.latents, expected.latents[:, :7])
    assert torch.equal(found.log_probs, expected.log_probs[:, :7])
    assert policy.graphs.recorder.captures == 1 and len(found.seeds) == 7
    hook = policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    assert_equal(found, eager(policy, lambda: run(7)))
    hook.remove()
    assert rows == [3] * 3 * config.sample.steps


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_one_step_serves_any_number_of_steps(parts, scale):
    policy = parts.policy
    for steps in (3, 5, 2):
        expected = eager(policy, lambda n=steps: evaluate(policy, n, scale=scale))
        assert torch.equal(evaluate(policy, steps, scale=scale), expected)
    assert policy.graphs.recorder.captures == 1
    assert policy.graphs.recorder.replays == 2 * (3 + 5 + 2)


@pytest.mark.slow
def test_reference_and_averaged_weights(parts, caplog, monkeypatch):
    """Adapters off is another graph; weights that are swapped in place are the same one."""
    policy, images = parts.policy, {}
    # So many updates that the average is what an evaluation shows.
    monkeypatch.setattr(parts.state.ema, "updates", 100)
    assert parts.state.ema.weights == "average"
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        images["trained"] = evaluate(policy)
        with policy.reference():
            images["base"] = evaluate(policy)
            assert torch.equal(images["base"], eager(policy, lambda: evaluate(policy)))
        with parts.state.ema.swapped():
            images["average"] = evaluate(policy)
            assert torch.equal(images["average"], eager(policy, lambda: evaluate(policy)))
        assert torch.equal(evaluate(policy), images["trained"])
    assert policy.graphs.recorder.captures == 2 and not caplog.records
    assert not torch.equal(images["trained"], images["base"])
    assert not torch.equal(images["trained"], images["average"])


@pytest.mark.slow
def test_a_kept_reference_is_another_graph(pixel_model, tmp_path):
    parts, _ = made(pixel_model, tmp_path, **CASES["full"])
    policy = parts.policy
    for _ in range(2):
        trained = evaluate(policy)
        with policy.reference():
            assert torch.equal(evaluate(policy), eager(policy, lambda: evaluate(policy)))
            assert not torch.equal(evaluate(policy), trained)
    assert policy.graphs.recorder.captures == 2
