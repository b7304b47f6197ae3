"""Rollout, update and evaluation of the real architectures, on the meta device instead of a GPU.

benchmarks/on_meta.py raises where a tensor of the host meets one of the device, and notes each
place where the host would wait for the device or copy to it. Inside `denoise` and a micro-step,
which a CUDA graph is to hold, there must be none; elsewhere their number is fixed.

One iteration is that of the models at their real widths, with a block or two of each kind: what
waits in one waits in all. What the options change is tried on the tiny ones of the same classes.
"""

from __future__ import annotations

import sys
from dataclasses import replace as changed
from pathlib import Path

import pytest
import torch
from recorded import Silent

from flowgrpo import capture, losses, rollout, train
from flowgrpo.config import replace
from flowgrpo.records import Experience

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
try:
    import models
    import on_meta
    import ours
    from cases import Case
finally:
    sys.path.remove(str(BENCHMARKS))


def shallow(model: models.Model, parameters: int, **blocks) -> models.Model:
    """The model with as many blocks, and so as many parameters."""
    return changed(model, parameters=parameters, transformer={**model.transformer, **blocks})


pytestmark = pytest.mark.slow
META = torch.device("meta")
# A block with dual attention, one without, and the last one; two double and two single blocks.
SD3 = shallow(models.SD35_MEDIUM, 260_259_264, num_layers=3, dual_attention_layers=(0,))
FLUX = shallow(models.FLUX_DEV, 1_026_971_200, num_layers=2, num_single_layers=2)
REAL = {
    # Guidance and KL; at two chunks a second turn shows what is done once for each.
    "sd3": Case(SD3, 2, 2, 4.5, 1, 0.04, 2),
    "flux": Case(FLUX, 2, 2, 1.0, 1, 0.0, 2),
}
TINY = {
    "tiny-sd3": Case(models.TINY_SD3, 2, 3, 4.5, 2, 0.04, 2),
    "tiny-flux": Case(models.TINY_FLUX, 2, 3, 1.0, 2, 0.0, 2),
}


@pytest.fixture(scope="module", params=[*REAL, *TINY])
def made(request):
    """(watch, provider) of one architecture, kept by the tests of this file."""
    with on_meta.watching() as watch:
        provider = ours.Ours({**REAL, **TINY}[request.param], "meta")
    return watch, provider


real = pytest.mark.parametrize("made", REAL, indirect=True)
tiny = pytest.mark.parametrize("made", TINY, indirect=True)


@pytest.fixture
def quiet(monkeypatch, made):
    """Notes what `denoise`, the decoding and each micro-step wait for; (calls, waits)."""
    watch, found = made[0], {"calls": 0, "waits": []}

    def observed(inner):
        def call(*args, **kwargs):
            before = len(watch.waits)
            result = inner(*args, **kwargs)
            found["calls"] += 1
            found["waits"] += watch.waits[before:]
            return result

        return call

    for module, name in (
        (rollout, "denoise"),
        (type(made[1].parts.policy), "decode"),
        (losses, "gather"),
        (train, "micro_step"),
    ):
        monkeypatch.setattr(module, name, observed(getattr(module, name)))
    watch.restart()
    return found


def experience(provider, trajectory):
    rows = provider.case.rows
    conditioning, uncond = provider.conditioning, provider.parts.uncond
    given = (trajectory, conditioning, uncond, torch.ones(rows), torch.ones(rows))
    return Experience(*given).to(META)


@real
def test_an_iteration_waits_for_the_device_only_between_its_stages(made, quiet):
    watch, provider = made
    with on_meta.watching(watch):
        trajectory = provider.rollout()
        # Prompts, seeds and steps of the rows go to the device once, whatever there are of them.
        assert len(watch.waits) <= 5 and all("rollout.py" in line for line in watch.waits)
        batch = experience(provider, trajectory)
        watch.restart()
        metrics = train.update(provider.parts, batch, provider.config)
        # Everything that is logged is read at once.
        assert len(watch.waits) == 1 and "train.py" in watch.waits[0], watch.waits
    # Two chunks, one trained step of each.
    assert quiet == {"calls": 2 + 2 + 2, "waits": []}
    assert metrics["max_ratio_error"] == 0
    assert trajectory.latents.shape == (3, 4, *provider.parts.policy.latent_shape)
    for name, value in vars(trajectory).items():
        assert value is None or value.device == META, name


@tiny
@pytest.mark.parametrize(
    "options",
    [
        {"optim.guard": True, "optim.steps_per_forward": 2, "optim.ema_decay": 0.9},
        {"optim.anchor": "replay"},
        {"sample.share_prefix": True, "sample.shared_noise": True, "sample.window_range": (1, 3)},
    ],
    ids=["guard", "replay", "prefix"],
)
def test_micro_steps_of_other_forms_wait_for_nothing(made, quiet, options):
    watch, provider = made
    config = replace(provider.config, **options)
    parts = provider.parts
    with on_meta.watching(watch):
        trajectory = train.collect(parts, provider.conditioning, config)
        batch = experience(provider, trajectory)
        watch.restart()
        train.update(parts, batch, config)
        assert len(watch.waits) == 1, watch.waits
    assert quiet["waits"] == []


@tiny
def test_recomputed_activations_wait_for_nothing(made, quiet):
    watch, provider = made
    transformer = provider.parts.policy.transformer
    train.recompute(transformer)
    try:
        with on_meta.watching(watch):
            batch = experience(provider, provider.rollout())
            train.update(provider.parts, batch, provider.config)
    finally:
        transformer.disable_gradient_checkpointing()
    assert quiet["waits"] == []


@tiny
def test_images_of_an_evaluation_are_made_without_waiting(made, quiet):
    watch, provider = made
    policy = provider.parts.policy
    with on_meta.watching(watch):
        images = rollout.sample(
            policy,
            provider.conditioning,
            steps=4,
            groups=torch.zeros(3, dtype=torch.int64),
            seeds=torch.arange(3),
            batch_size=2,
            uncond=provider.parts.uncond,
            guidance_scale=provider.case.guidance,
        )
    assert images.shape == (3, 3, 64, 64) and images.device == META
    assert quiet["waits"] == []


@tiny
def test_what_is_captured_has_all_of_its_inputs_on_the_device(made):
    """Rollout, a step of an evaluation and a micro-step, by the functions that a GPU records."""
    watch, provider = made
    parts, config = provider.parts, provider.config
    recorder = Silent(watch)
    parts.policy.graphs = graphs = capture.Graphs(parts.policy, recorder)
    parts = changed(parts, micro_step=train.MicroStep(parts.policy, graphs))
    try:
        with on_meta.watching(watch):
            batch = experience(provider, train.collect(parts, provider.conditioning, config))
            train.update(parts, batch, config)
            assert recorder.captures == 2 and len(graphs.recordings) == 2
            watch.restart()
            rollout.rollout(
                parts.policy,
                provider.conditioning,
                rollout.ode_schedule(parts.policy, 4),
                torch.arange(4)[:, None].expand(4, 3),
                groups=torch.zeros(3, dtype=torch.int64),
                seeds=torch.arange(3),
                batch_size=2,
                keep=False,
            )
        assert recorder.captures == 3
    finally:
        parts.policy.graphs = None
    inputs = [t for r in graphs.recordings.values() for t in r.inputs]
    assert inputs and all(t.device == META for t in inputs)
