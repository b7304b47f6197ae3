"""Rollout, update and evaluation of the real architectures, on the meta device instead of a GPU.

benchmarks/measuring/on_meta.py raises where a tensor of the host meets one of the device, and notes
each place where the host would wait for the device or copy to it. Inside `denoise` and a
micro-step, which a CUDA graph is to hold, there must be none; elsewhere their number is fixed.

One iteration is that of the models at their real sizes, with fewer of their blocks, which are
alike; what the options change is tried on the tiny ones of the same classes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace as changed

import pytest
import torch

from flowgrpo import cuda_graphs, train, update
from flowgrpo.config import replace
from flowgrpo.policies.surgery import recompute
from flowgrpo.records import Experience
from flowgrpo.sampling import rollout
from flowgrpo.sampling.schedule import ode_schedule
from measuring import on_meta
from models import configurations
from models.cases import Case
from providers import ours
from support import setups, short_models
from support.cpu_graphs import Silent

pytestmark = pytest.mark.slow
META = torch.device("meta")
REAL = {
    # Guidance and KL; at two chunks a second turn shows what is done once for each.
    "sd3": Case(short_models.SD35_MEDIUM, 2, 2, 4.5, 1, 0.04, 2),
    "flux": Case(short_models.FLUX_DEV, 2, 2, 1.0, 1, 0.0, 2),
    "flux2": Case(short_models.FLUX2_KLEIN_4B, 2, 2, 4.0, 1, 0.04, 2),
    "qwen": Case(short_models.QWEN_IMAGE, 2, 2, 4.0, 1, 0.04, 2),
    "wan": Case(changed(short_models.WAN22_TI2V_5B, frames=5), 2, 2, 5.0, 1, 0.04, 2),
    "zimage": Case(short_models.Z_IMAGE, 2, 2, 4.0, 1, 0.04, 2),
}
TINY = {
    "tiny-sd3": Case(configurations.TINY_SD3, 2, 3, 4.5, 2, 0.04, 2),
    "tiny-flux": Case(configurations.TINY_FLUX, 2, 3, 1.0, 2, 0.0, 2),
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
        (type(made[1].components.policy), "decode"),
        (update, "run_micro_step"),
    ):
        monkeypatch.setattr(module, name, observed(getattr(module, name)))
    micro_step = made[1].components.micro_step
    objective = micro_step.objective
    objective = dataclasses.replace(objective, gather=observed(objective.gather))
    monkeypatch.setattr(micro_step, "objective", objective)
    watch.restart()
    return found


def experience(provider, trajectory):
    rows = provider.case.rows
    conditioning, uncond = provider.conditioning, provider.components.uncond
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
        metrics = setups.update(provider.components, batch, provider.config)
        # Everything that is logged is read at once.
        assert len(watch.waits) == 1 and "update.py" in watch.waits[0], watch.waits
    # Two chunks, one trained step of each.
    assert quiet == {"calls": 2 + 2 + 2, "waits": []}
    assert metrics["max_ratio_error"] == 0
    assert trajectory.latents.shape == (3, 4, *provider.components.policy.latent_shape)
    for name, value in vars(trajectory).items():
        assert value is None or value.device == META, name


@tiny
@pytest.mark.parametrize(
    "options",
    [
        {
            "optim.guard": True,
            "optim.steps_per_forward": 2,
            "optim.ema_decay": 0.9,
            "sample.share_prefix": True,
            "sample.shared_noise": True,
            "sample.window_range": (1, 3),
        },
        {"optim.anchor": "replay"},
    ],
    ids=["guard, prefix", "replay"],
)
def test_micro_steps_of_other_forms_wait_for_nothing(made, quiet, options):
    watch, provider = made
    config = replace(provider.config, **options)
    parts = provider.components
    with on_meta.watching(watch):
        trajectory = train.collect(parts, provider.conditioning, config)
        batch = experience(provider, trajectory)
        watch.restart()
        setups.update(parts, batch, config)
        assert len(watch.waits) == 1, watch.waits
    assert quiet["waits"] == []


@tiny
def test_recomputed_activations_wait_for_nothing(made, quiet):
    watch, provider = made
    transformer = provider.components.policy.transformer
    recompute(transformer)
    try:
        with on_meta.watching(watch):
            batch = experience(provider, provider.rollout())
            setups.update(provider.components, batch, provider.config)
    finally:
        transformer.disable_gradient_checkpointing()
    assert quiet["waits"] == []


@tiny
def test_images_of_an_evaluation_are_made_without_waiting(made, quiet):
    watch, provider = made
    policy = provider.components.policy
    with on_meta.watching(watch):
        images = rollout.sample_images(
            policy,
            provider.conditioning,
            steps=4,
            groups=torch.zeros(3, dtype=torch.int64),
            seeds=torch.arange(3),
            batch_size=2,
            uncond=provider.components.uncond,
            guidance_scale=provider.case.guidance,
        )
    assert images.shape == (3, 3, 64, 64) and images.device == META
    assert quiet["waits"] == []


@tiny
def test_what_is_captured_has_all_of_its_inputs_on_the_device(made):
    """Rollout, a step of an evaluation and a micro-step, by the functions that a GPU records."""
    watch, provider = made
    parts, config = provider.components, provider.config
    recorder = Silent(watch)
    parts.policy.graphs = graphs = cuda_graphs.Graphs(parts.policy, recorder)
    parts = changed(parts, micro_step=update.MicroStep(parts.policy, parts.objective, graphs))
    try:
        with on_meta.watching(watch):
            batch = experience(provider, train.collect(parts, provider.conditioning, config))
            setups.update(parts, batch, config)
            assert recorder.captures == 2 and len(graphs.recordings) == 2
            watch.restart()
            rollout.rollout(
                parts.policy,
                provider.conditioning,
                ode_schedule(parts.policy, 4),
                torch.arange(4)[:, None].expand(4, 3),
                groups=torch.zeros(3, dtype=torch.int64),
                seeds=torch.arange(3),
                batch_size=2,
                keep_states=False,
            )
        assert recorder.captures == 3
    finally:
        parts.policy.graphs = None
    inputs = [t for r in graphs.recordings.values() for t in r.inputs]
    assert inputs and all(t.device == META for t in inputs)
