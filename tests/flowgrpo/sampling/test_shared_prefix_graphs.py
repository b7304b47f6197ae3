"""The rollout that shares steps, replayed by graphs of one step: the eager bits, few graphs."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from test_shared_prefix import CASES, SHARED, THREE

from flowgrpo import cuda_graphs, train, update
from flowgrpo.config import replace
from flowgrpo.policies import lora
from flowgrpo.sampling import shared_prefix
from flowgrpo.sampling.schedule import table_rows
from measuring import on_meta
from models import configurations
from models.cases import Case
from providers import ours
from support import setups
from support.cpu_graphs import Silent, assert_equal, eager, evaluate, made

pytestmark = pytest.mark.slow
# Part 1 has 4, 3, 2 or 1 rows in forwards of 3, part 3 all of a chunk or, across groups, some.
LATE = {"sample.share_prefix": True, "sample.window_range": (1, 6)}
MORE = {
    **CASES,
    "fused": {"policy.fused": True},
    "guidance and guard, a window of all groups": {
        "sample.guidance_scale": 2.0,
        "optim.guard": True,
        "sample.batch_size": 12,
        "optim.updates_per_iteration": 1,
    },
}


def step_graphs(policy) -> list[int]:
    """Rows of the recorded steps."""
    return sorted(len(recording.inputs[0]) for recording in policy.graphs.recordings.values())


@pytest.mark.parametrize("case", MORE)
def test_it_has_the_eager_bits_and_exact_ratios(pixel_model, tmp_path, case):
    """Iterations with other windows and changed weights: captured in the first ones, then replayed;
    what is captured are steps of the few sizes."""
    parts, config = made(pixel_model, tmp_path, **{**SHARED, **LATE, **THREE, **MORE[case]})
    policy, starts, captures = parts.policy, set(), []
    for parts.state.iteration in range(3):
        experience = setups.experience(parts, config)
        found = experience.trajectory
        collect = partial(train.collect, parts, experience.conditioning, config)
        assert_equal(found, eager(policy, collect))
        starts.add(tuple(found.trained_steps[0, ::3].tolist()))
        metrics = setups.update(parts, experience, config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0
        captures.append(policy.graphs.recorder.captures)
    assert len(starts) > 2 and captures[1] == captures[-1]
    allowed = shared_prefix.forward_sizes(config.sample.batch_size, shared_prefix.SIZES)
    assert set(step_graphs(policy)) <= set(allowed) and captures[-1] <= len(allowed)


def test_captured_rollout_and_update(pixel_model, tmp_path):
    """All of training under capture, with evaluations between; weights end up equal."""
    changes = {**SHARED, **LATE, "sample.guidance_scale": 2.0, "optim.beta": 0.1}
    weights, metrics = [], []
    for record in (False, True):
        parts, config = made(pixel_model, tmp_path, **changes)
        policy = parts.policy
        graphs = policy.graphs if record else None
        policy.graphs = graphs
        parts = train.Components(
            **{**vars(parts), "micro_step": update.MicroStep(policy, parts.objective, graphs)}
        )
        found = []
        for parts.state.iteration in range(2):
            found.append(setups.update(parts, setups.experience(parts, config), config))
            with policy.reference():
                found.append(evaluate(policy, scale=2.0).float().mean().item())
            found.append(evaluate(policy).float().mean().item())
        metrics.append(found)
        weights.append([p.detach().clone() for p in policy.parameters()])
    assert metrics[0] == metrics[1] and metrics[0][0]["max_ratio_error"] == 0.0
    assert all(map(torch.equal, *weights))
    # Sizes of 3, 2 and 1 rows, the update, and two evaluations; room for more.
    assert policy.graphs.recorder.captures == len(policy.graphs.recordings) == 6 < cuda_graphs.LIMIT


def test_a_short_last_chunk_keeps_the_rows_of_an_update(pixel_model, tmp_path):
    """8 rows in chunks of 3: the last window has 2 rows, and nothing else new is recorded."""
    parts, config = made(pixel_model, tmp_path, **{**SHARED, **LATE})
    policy, rows = parts.policy, []
    positions = torch.tensor([[1] * 4 + [3] * 4, [2] * 4 + [4] * 4])

    seeds, table = torch.arange(8), table_rows(positions, config.sample.steps)

    def run():
        return shared_prefix.rollout_shared_prefix(
            policy,
            policy.encode(setups.TEXTS[:2]),
            parts.schedule,
            table,
            groups=torch.arange(8) // 4,
            seeds=seeds,
            leaders=shared_prefix.Leaders.of(table, positions, seeds, seeds // 4, 4),
            batch_size=3,
            trained_steps=positions,
        )

    found = run()
    policy.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["hidden_states"])), with_kwargs=True
    )
    assert_equal(found, eager(policy, run))
    # Part 1: both groups, then one twice. Chunks of 3, of 1 + 2 and of 2 rows; each at its window,
    # then the rows that have left theirs.
    first = [3, 3, 3, 3, 3]
    second = [3, 3, *[1] * 2, 3]
    assert rows == [2, 1, 1, *first, *second, 2, 2, 2]
    assert set(step_graphs(policy)) == {1, 2, 3}


def test_matrices_are_made_once_and_in_place(pixel_model, tmp_path, monkeypatch):
    """Once a rollout for all of its graphs; in a later one in the same memory, with new values."""
    parts, config = made(pixel_model, tmp_path, **{**SHARED, **LATE})
    policy, calls, make = parts.policy, [], lora.merge
    monkeypatch.setattr(lora, "merge", lambda *a: calls.append(a[0]) or make(*a))
    conditioning = policy.encode(setups.TEXTS[:4])
    products = [lora.product_of(layer) for layer in lora.lora_layers(policy.transformer)]
    # Query, key and value have theirs together.
    products = [product for product in products if product.layers]
    places = []
    for _ in range(2):
        train.collect(parts, conditioning, config)
        assert calls == [product.layers for product in products]
        calls.clear()
        places.append([t.data_ptr() for product in products for t in product.fixed[:2]])
        assert all(product.matrices is None for product in products)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.1)
    assert places[0] == places[1]


def test_a_rollout_waits_for_nothing_but_its_inputs():
    """On the device, captured and not: prompts, seeds, steps and the plan of all forwards go there
    once, whatever their number."""
    changes = {"sample.shared_noise": True, "sample.share_prefix": True}
    with on_meta.watching() as watch:
        provider = ours.Ours(Case(configurations.TINY_SD3, 2, 5, 2.0, 2, 0.0, 2), "meta")
        policy = provider.components.policy
        for graphs in (None, cuda_graphs.Graphs(policy, Silent(watch))):
            found, policy.graphs = {}, graphs
            for end in (3, 4):
                config = replace(provider.config, **changes, **{"sample.window_range": (0, end)})
                watch.restart()
                train.collect(provider.components, provider.conditioning, config)
                found[end] = list(watch.waits)
            assert len(found[3]) == len(found[4]) <= 8, found[4]
            for line in found[4]:
                assert any(f"{name}.py" in line for name in ("rollout", "prefix", "conditioning"))
    assert graphs.recorder.captures == 2, "chunks of two rows, and one alone"
    inputs = [t for recording in graphs.recordings.values() for t in recording.inputs]
    assert inputs and all(t.device.type == "meta" for t in inputs)
