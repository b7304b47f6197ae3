"""CUDA graphs of rollout, evaluation and update on a GPU: bits, synchronisation, faults."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from flowgrpo import cuda_graphs, objectives, train, update
from flowgrpo.prompts.batches import prompt_batch
from flowgrpo.rewards.background import BackgroundScoring
from support import setups
from support.cpu_graphs import assert_equal, eager, evaluate

pytestmark = pytest.mark.gpu

CUDA = {"policy.device": "cuda", "policy.dtype": "auto", "optim.capture": "on"}
CASES = {
    "plain": {},
    "float32, all steps": {"policy.dtype": "float32", "sample.window_size": 0},
    "float16": {"policy.dtype": "float16"},
    "guidance": {"sample.guidance_scale": 3.0},
    "guard": {"optim.guard": True, "optim.beta": 0.0},
    "recomputed": {"policy.gradient_checkpointing": True},
    "full": {"policy.adapter": "full"},
    "shared prefix": {"sample.shared_noise": True, "sample.guidance_scale": 3.0},
    "fused": {"policy.fused": True, "sample.guidance_scale": 3.0},
    "fused, full": {"policy.fused": True, "policy.adapter": "full"},
}


def made(model, folder, **changes):
    config = setups.config(model, folder, **{**CUDA, **changes})
    return setups.parts(config), config


@contextlib.contextmanager
def no_waiting():
    """Inside, an operation that makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("case", CASES)
def test_rollout_and_update_have_the_eager_bits(pixel_model, tmp_path, case):
    found = []
    for mode in ("on", "off"):
        changes = {**CASES[case], "sample.capture": mode, "optim.capture": mode}
        parts, config = made(pixel_model, tmp_path, **changes)
        metrics, paths = [], []
        for parts.state.iteration in range(3):
            experience = setups.experience(parts, config).to(parts.policy.device)
            paths.append(experience.trajectory)
            metrics.append(setups.update(parts, experience, config))
            assert metrics[-1]["max_ratio_error"] == 0.0
        found.append((metrics, paths, list(parts.state.parameters.values())))
    (one, first, trained), (two, second, again) = found
    assert one == two and all(map(torch.equal, trained, again))
    for pair in zip(first, second, strict=True):
        assert_equal(*pair)


def test_evaluation_has_the_eager_bits(pixel_model, tmp_path):
    policy = made(pixel_model, tmp_path)[0].policy
    for steps in (4, 7):
        assert torch.equal(evaluate(policy, steps), eager(policy, partial(evaluate, policy, steps)))
    with policy.reference():
        assert torch.equal(evaluate(policy), eager(policy, lambda: evaluate(policy)))
    assert len(policy.graphs.recordings) == 2


def test_nothing_waits_for_the_gpu(pixel_model, tmp_path):
    """Not in a replay, and not in an update from its first micro-step to its optimizer step,
    captured or eager."""
    parts, config = made(pixel_model, tmp_path)
    policy, graphs = parts.policy, parts.policy.graphs
    conditioning = policy.encode(setups.TEXTS[:2])
    train.collect(parts, conditioning, config)

    def watched(*arguments, **options):
        with no_waiting():
            return graphs(*arguments, **options)

    policy.graphs = watched
    train.collect(parts, conditioning, config)
    policy.graphs = graphs
    experience = setups.experience(parts, config).to(policy.device)
    experience = objectives.with_prepared_conditioning(policy, parts.schedule, experience)
    for micro in (parts.micro_step, update.MicroStep(policy, parts.objective, None)):
        batch = objectives.gather_trained_steps(parts.schedule, experience, slice(0, 3), range(1))
        for watch in (contextlib.nullcontext, no_waiting):
            with watch():
                with micro.accumulating(parts.world, parts.dealing, config) as gradients:
                    for leaf in parts.dealing.steps[0]:
                        micro(batch, config, 4)
                        gradients.add(leaf.number)
                parts.state.step()


def test_faults(pixel_model, tmp_path):
    """In a process of its own: a capture that breaks may leave torch in a state that spoils the
    tests behind this one, if it cannot be mended."""
    command = [sys.executable, __file__, str(pixel_model), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def faults(model, folder):
    """A wait, a copy from the host, memory that runs out, and a parameter that moves."""
    parts, config = made(model, folder)
    policy = parts.policy
    conditioning = policy.encode(setups.TEXTS[:2])
    collect = partial(train.collect, parts, conditioning, config)
    expected = eager(policy, collect)
    block = policy.transformer.transformer_blocks[1]
    faults = {
        "transformer_blocks.1.*test_cuda_graphs_gpu.py, line": lambda x: x.sum().item(),
        "transformer_blocks.1 does something": lambda x: x.new_tensor([1.0, 2.0]),
        "ran out of device memory": lambda x: x.new_empty(1 << 45),
    }
    for message, fault in faults.items():

        def hook(module, args, kwargs, fault=fault):
            fault(kwargs["hidden_states"])

        handle = block.register_forward_pre_hook(hook, with_kwargs=True)
        with pytest.raises(cuda_graphs.CaptureError, match=message):
            collect()
        handle.remove()
        assert policy.graphs.recordings == {}
        # Both raise while torch believes that it is capturing.
        torch.cuda.empty_cache(), torch.randn(3, device="cuda")
    assert_equal(collect(), expected)
    parameter = next(policy.parameters())
    parameter.data = parameter.data * 1.5
    moved = collect()
    assert_equal(moved, eager(policy, collect))
    assert not torch.equal(moved.latents, expected.latents)


def test_rewards_on_their_own_stream(pixel_model, tmp_path):
    """Scores of images that are decoded while the worker reads earlier ones."""
    parts, config = made(pixel_model, tmp_path)
    batch = prompt_batch(parts.prompts, config, 0)
    conditioning = parts.policy.encode(batch.texts)
    totals = []
    for worker in (None, parts.reward_thread, parts.reward_thread):
        scoring = BackgroundScoring(parts.scorer, batch, config.sample.group_size, worker)
        train.collect(parts, conditioning, config, scoring)
        totals.append(scoring.finish().total)
    assert torch.equal(totals[0], totals[1]) and torch.equal(totals[0], totals[2])


def test_a_run(pixel_model, tmp_path):
    """Evaluation, rollout, rewards and update captured, side by side with none of them."""
    summaries = []
    for mode in ("on", "off"):
        folder = tmp_path / mode
        folder.mkdir()
        changes = {**CUDA, "sample.capture": mode, "optim.capture": mode, "run.steps": 2}
        changes |= {"sample.eval_steps": 4, "run.eval_prompts": 3}
        summaries.append(train.run(setups.config(pixel_model, folder, **changes)))
    assert summaries[0]["max_ratio_error"] == summaries[1]["max_ratio_error"] == 0.0
    assert summaries[0]["after"]["accuracy"] == summaries[1]["after"]["accuracy"]


if __name__ == "__main__":
    faults(*map(Path, sys.argv[1:]))
