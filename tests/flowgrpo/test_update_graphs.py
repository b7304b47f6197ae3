"""Options of the update: anchor by replay, several steps in a forward, recomputed activations,
float16."""

from __future__ import annotations

import pytest
import torch

from flowgrpo import objectives, train, update
from flowgrpo.config import ConfigError, replace
from flowgrpo.distributed.world import ALONE
from support import setups
from support.cpu_graphs import Operations

GUARD = {"optim.guard": True, "sample.guidance_scale": 2.0, "optim.beta": 0.0}


def config_of(model, folder, **changes):
    """2 chunks of 3 rows, of 4 steps or more."""
    return setups.config(model, folder, **{"sample.steps": 4, "sample.group_size": 3, **changes})


def gradients(parts):
    return {name: p.grad.clone() for name, p in parts.state.parameters.items()}


@pytest.fixture
def no_step(monkeypatch):
    """Gradients of all updates add up, and no weight changes."""
    step = lambda state: torch.ones(())  # noqa: E731
    monkeypatch.setattr("flowgrpo.runs.state.State.step", step)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, GUARD, {"policy.dtype": "bfloat16"}])
def test_replay_anchors_the_ratio(pixel_model, tmp_path, changes):
    """When rollout and update disagree, the first ratios are 1 by replay, and not without it. The
    price is one forward for each chunk and trained step."""
    config = config_of(pixel_model, tmp_path, **changes)
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    with torch.no_grad():
        # As if the rollout had run with other kernels.
        for parameter in parts.policy.parameters():
            parameter.mul_(1 + 1e-3)
    with pytest.raises(update.RatioError, match="ratio_tolerance"):
        setups.update(parts, experience, config)
    forwards = []
    parts.policy.transformer.register_forward_hook(lambda *_: forwards.append(1))
    plain = replace(config, **{"optim.ratio_tolerance": 1e9})
    setups.update(parts, setups.experience(parts, config), plain)
    without = len(forwards)
    forwards.clear()
    replay = replace(config, **{"optim.anchor": "replay"})
    experience = setups.experience(parts, config)
    with torch.no_grad():
        for parameter in parts.policy.parameters():
            parameter.mul_(1 + 1e-3)
    before = experience.trajectory.log_probs.clone()
    assert setups.update(parts, experience, replay)["max_ratio_error"] == 0.0
    assert torch.equal(before, experience.trajectory.log_probs)
    assert len(forwards) == without + 2 * 2


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, GUARD])
def test_several_steps_in_one_forward(pixel_model, tmp_path, no_step, changes):
    """The same gradient from half the forwards, and exact ratios with the replayed anchor."""
    config = config_of(
        pixel_model, tmp_path, **{"sample.window_size": 4, "sample.steps": 5, **changes}
    )
    parts = setups.parts(config)
    experience, found = setups.experience(parts, config), {}
    for count in (1, 2):
        sizes = []
        hook = parts.policy.transformer.register_forward_pre_hook(
            lambda module, args, kwargs, sizes=sizes: sizes.append(len(kwargs["hidden_states"])),
            with_kwargs=True,
        )
        options = {"optim.steps_per_forward": count, "optim.anchor": "replay"}
        parts.state.optimizer.zero_grad()
        metrics = setups.update(parts, experience, replace(config, **options))
        hook.remove()
        assert metrics["max_ratio_error"] == 0.0
        found[count] = (metrics, gradients(parts), sizes)
    (one, single, few), (two, double, many) = found[1], found[2]
    assert len(few) == 2 * len(many) and sum(few) == sum(many)
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-6)
    for name, gradient in single.items():
        torch.testing.assert_close(double[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optim.steps_per_forward": 3, "optim.anchor": "replay"}, "must divide the 4 trained"),
        ({"optim.steps_per_forward": 2}, "set optim.anchor to replay, or allow a deviation"),
        ({"optim.steps_per_forward": 0}, "must be greater than 0"),
        ({"sample.overlap": -1}, "sample.overlap is -1"),
    ],
)
def test_bad_options(pixel_model, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config_of(pixel_model, tmp_path, **{"sample.window_size": 4, "sample.steps": 5, **changes})


@pytest.mark.slow
def test_recomputed_activations_change_no_bit(pixel_model, tmp_path, no_step):
    found = []
    for recompute in (False, True):
        config = config_of(pixel_model, tmp_path, **{"policy.gradient_checkpointing": recompute})
        parts, calls = setups.parts(config), []
        block = parts.policy.transformer.transformer_blocks[0]
        experience = setups.experience(parts, config)
        # Before, because the second time a block is left when nothing more of it is needed.
        block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        metrics = setups.update(parts, experience, config)
        found.append((metrics, gradients(parts), len(calls)))
    (one, kept, few), (two, again, many) = found
    # 2 chunks at 2 steps: reference and forward, and once more in the backward pass.
    assert (few, many) == (8, 12)
    assert one == two and one["max_ratio_error"] == 0.0
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_a_forward_that_is_run_again_has_its_own_settings(pixel_model, tmp_path):
    """Not those of the backward pass it is run in, under which PyTorch has no cuDNN attention."""
    config = config_of(pixel_model, tmp_path, **{"policy.gradient_checkpointing": True})
    made, seen, level = setups.parts(config), [], torch.get_deterministic_debug_mode
    experience = setups.experience(made, config)
    batch = objectives.gather_trained_steps(made.schedule, experience, slice(0, 3), range(1))
    block = made.policy.transformer.transformer_blocks[0]
    block.attn.register_forward_pre_hook(lambda *_: seen.append(level()))
    try:
        torch.set_deterministic_debug_mode("warn")
        made.micro_step(batch, config, 1)
        assert level() == 1
    finally:
        torch.set_deterministic_debug_mode("default")
    # Reference, forward, and once more in the backward pass.
    assert seen == [1, 1, 1]


@pytest.mark.slow
def test_small_gradients_survive_float16(pixel_model, tmp_path):
    """A loss that is one of very many: unscaled, half of its gradients would be 0 in float16."""
    share, found = 1 << 16, {}
    for dtype in ("float32", "float16"):
        config = config_of(pixel_model, tmp_path, **{"policy.dtype": dtype})
        one_sum = replace(config, **{"run.reduction": "all_reduce"})
        made = setups.parts(config)
        experience = setups.experience(made, config)
        batch = objectives.gather_trained_steps(made.schedule, experience, slice(0, 3), range(1))
        micro, scale = made.micro_step, update.loss_scale(made.policy, 3, share)
        assert scale == (1.0 if dtype == "float32" else 2.0**21)
        with micro.accumulating(ALONE, made.dealing, one_sum):
            micro(batch, config, share)
        parameters = made.state.parameters.values()
        found[dtype] = torch.cat([p.grad.flatten() for p in parameters])
    exact, half = found.values()
    assert exact.norm() > 0 and (half - exact).norm() < 0.02 * exact.norm()


def test_a_model_that_cannot_recompute(pixel_model, tmp_path, monkeypatch):
    config = config_of(pixel_model, tmp_path, **{"policy.gradient_checkpointing": True})
    from diffusers import SD3Transformer2DModel

    monkeypatch.setattr(SD3Transformer2DModel, "_supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="but SD3Transformer2DModel has none; turn it off"):
        train.setup(config)


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, GUARD, {"policy.adapter": "full"}])
def test_an_update_reads_the_device_once(pixel_model, tmp_path, changes):
    """No operation from the first micro-step to the last optimizer step needs an answer."""
    config = config_of(pixel_model, tmp_path, **{"policy.dtype": "auto", **changes})
    parts = setups.parts(config)
    experience = setups.experience(parts, config)
    with Operations():
        metrics = setups.update(parts, experience, config)
    assert metrics["max_ratio_error"] == 0.0
    with pytest.raises(RuntimeError, match="not permitted"), Operations():
        experience.advantages.sum().item()
