"""What can go wrong with a graph is said, or mended; a stale one is never replayed."""

from __future__ import annotations

import re

import pytest
import torch

from flowgrpo import cuda_graphs, train
from flowgrpo.config import ConfigError
from flowgrpo.policies import lora
from flowgrpo.sampling.schedule import table_rows
from support import setups
from support.cpu_graphs import Recorder, assert_equal, eager, evaluate, made


@pytest.fixture(scope="module")
def shared(pixel_model, tmp_path_factory):
    return made(pixel_model, tmp_path_factory.mktemp("capture"))


@pytest.fixture
def parts(shared):
    """Without graphs of another test."""
    shared[0].policy.graphs = cuda_graphs.Graphs(shared[0].policy, Recorder())
    return shared[0]


def move(policy, how):
    """Give one tensor of the transformer other storage and values."""
    name, parameter = next(iter(policy.transformer.named_parameters()))
    owner = policy.transformer.get_submodule(name.rpartition(".")[0])
    if how == "data":
        parameter.data = parameter.data * 1.5
    elif how == "parameter":
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.detach() * 1.5))
    else:
        owner = policy.transformer.pos_embed
        name, owner._cropped = "pos_embed._cropped", owner._cropped * 1.5
    return name


@pytest.mark.slow
@pytest.mark.parametrize("how", ["data", "parameter", "buffer"])
def test_a_moved_storage_means_a_new_graph(pixel_model, tmp_path, how, caplog, monkeypatch):
    parts, _ = made(pixel_model, tmp_path)
    policy = parts.policy
    before = evaluate(policy)
    name = move(policy, how)
    expected = eager(policy, lambda: evaluate(policy))
    assert not torch.equal(before, expected)
    with monkeypatch.context() as patch:
        # What the comparison is for: without it the graph goes on reading the old memory.
        addresses = next(iter(policy.graphs.recordings.values())).addresses
        patch.setattr(cuda_graphs, "_addresses", lambda policy: addresses)
        assert torch.equal(evaluate(policy), before)
    assert torch.equal(evaluate(policy), expected)
    assert policy.graphs.recorder.captures == 2 and len(policy.graphs.recordings) == 1
    assert f"sampler_step is captured again, because the storage of {name} moved" in caplog.text


@pytest.mark.slow
def test_a_function_that_synchronises(parts, shared):
    """The message names module and line; nothing is kept; without the fault all goes on."""
    policy, config = parts.policy, shared[1]
    block = policy.transformer.transformer_blocks[1]
    conditioning = policy.encode(setups.TEXTS[:2])
    expected = eager(policy, lambda: train.collect(parts, conditioning, config))
    faults = {
        "wait": lambda module, inputs: inputs[0].sum().item() and None,
        "host": lambda module, inputs: torch.tensor([1.0, 2.0]) is None or None,
    }
    for fault in faults.values():
        hook = block.ff.register_forward_pre_hook(fault)
        with pytest.raises(cuda_graphs.CaptureError) as caught:
            train.collect(parts, conditioning, config)
        hook.remove()
        message = str(caught.value)
        assert "transformer_blocks.1" in message and "CUDA graph of denoise" in message
        assert re.search(r"\(\w+\.py, line \d+: C.*during|permitted", message)
        assert message.endswith("mend that line, or set sample.capture to off.")
        assert policy.graphs.recordings == {}
    assert_equal(train.collect(parts, conditioning, config), expected)


@pytest.mark.slow
@pytest.mark.parametrize("call", [0, 1])
def test_out_of_memory(parts, shared, call):
    """In the warm-up or in the capture itself."""
    policy, config = parts.policy, shared[1]
    conditioning, calls = policy.encode(setups.TEXTS[:2]), []

    def full(module, inputs):
        calls.append(1)
        if len(calls) > call * config.sample.steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    hook = policy.transformer.register_forward_pre_hook(full)
    with pytest.raises(
        cuda_graphs.CaptureError, match=r"ran out of device memory .CUDA.*batch_size"
    ):
        train.collect(parts, conditioning, config)
    hook.remove()
    expected = eager(policy, lambda: train.collect(parts, conditioning, config))
    assert_equal(train.collect(parts, conditioning, config), expected)


def test_a_mistake_of_the_model_is_not_called_a_capture_error(parts):
    hook = parts.policy.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(parts.policy)
    hook.remove()
    assert parts.policy.graphs.recordings == {}


@pytest.mark.slow
def test_another_shape_is_another_graph_and_the_oldest_goes(parts, caplog):
    policy = parts.policy
    for rows in (1, 2, 3):
        expected = eager(policy, lambda n=rows: evaluate(policy, rows=n, batch_size=n))
        assert torch.equal(evaluate(policy, rows=rows, batch_size=rows), expected)
    assert policy.graphs.recorder.captures == 3
    oldest = next(iter(policy.graphs.recordings))
    for number in range(cuda_graphs.LIMIT - 2):
        evaluate(policy, rows=2, steps=2, scale=1.5 + number)
    assert len(policy.graphs.recordings) == cuda_graphs.LIMIT
    assert oldest not in policy.graphs.recordings and "the oldest is dropped" in caplog.text


def test_matrices_that_will_be_let_go_are_refused(parts):
    policy = parts.policy
    layers = lora.lora_layers(policy.transformer)
    with (
        lora.merged_matrices(layers),
        pytest.raises(RuntimeError, match=r"inside Policy\.frozen_weights, whose"),
    ):
        policy.graphs(lambda policy: None, policy)
    assert policy.graphs.recordings == {}
    # Those of a policy with graphs stay where they are.
    with policy.frozen_weights():
        assert torch.equal(evaluate(policy), eager(policy, lambda: evaluate(policy)))


@pytest.mark.parametrize("option", ["sample.capture", "optim.capture"])
def test_capture_needs_cuda(pixel_model, tmp_path, option):
    config = setups.config(pixel_model, tmp_path, **{option: "on"})
    with pytest.raises(ConfigError, match=f"{option} is on with policy.device cpu"):
        train.run(config)
    assert not (tmp_path / "run").exists()


def test_a_window_outside_the_schedule():
    for positions in ([[5], [6]], [[-1], [0]]):
        with pytest.raises(ConfigError, match=r"steps .* but the schedule has the steps 0 to 5"):
            table_rows(torch.tensor(positions), 6)
