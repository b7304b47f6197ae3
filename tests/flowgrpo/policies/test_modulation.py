"""Modulations and projected text from a table: the same velocity, exact ratios, and when not."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from flowgrpo import train
from flowgrpo.policies import Policy, modulation
from flowgrpo.policies.families import family_of
from support import setups
from support.cpu_graphs import assert_equal, eager, evaluate, made

KINDS = ("sd3.5-medium", "sd3", "flux")
SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.2, 0.0])


def parts_of(kinds, kind, folder, **changes):
    model, own = kinds[kind]
    config = setups.config(model, folder, **{**own, **changes})
    return setups.parts(config), config


def sample_of(policy, rows):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, *policy.latent_shape, generator=generator)


def spoil(transformer):
    """No forward can compute constants any more without being found out."""
    with torch.no_grad():
        names = family_of(transformer).modulation
        for _, linear in modulation.layers(transformer, names):
            linear.weight.fill_(torch.nan)
        for name in (names.time, names.text):
            for parameter in getattr(transformer, name).parameters():
                parameter.fill_(torch.nan)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_velocity_looked_up_is_the_velocity(kinds, tmp_path, kind, fused):
    """At one step for all rows, and with each row at its own; gradients too."""
    parts, _ = parts_of(kinds, kind, tmp_path, **{"policy.fused": fused})
    policy = parts.policy
    plain = policy.encode(setups.TEXTS[:4])
    table = policy.prepare(plain, SIGMAS)
    assert table.table.shape[:2] == (4, 4) and policy.prepare(table, SIGMAS) is table
    x = sample_of(policy, 5)
    index, steps = torch.tensor([3, 0, 0, 2, 1]), torch.tensor([0, 3, 1, 1, 2])
    again = table.rows(index).rows_at(torch.arange(5), steps)
    cases = [
        (x[:4], SIGMAS[2].expand(4), plain, table.at(2)),
        (x, SIGMAS[steps], plain.rows(index), table.rows_at(index, steps)),
        (x, SIGMAS[steps], plain.rows_at(index, steps), again),
    ]
    wanted = [policy.velocity(x, sigma, text).detach() for x, sigma, text, _ in cases]
    spoil(policy.transformer)
    for (rows, sigma, _, text), expected in zip(cases, wanted, strict=True):
        found = policy.velocity(rows, sigma, text)
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=3e-6)
        with torch.no_grad():
            assert torch.equal(policy.velocity(rows, sigma, text), found)
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)


def test_two_tables_joined_are_the_table_of_both(kinds, tmp_path):
    """As velocity joins those of unconditional and conditional rows."""
    policy = parts_of(kinds, "sd3", tmp_path)[0].policy
    one, two = policy.encode([""]), policy.encode(setups.TEXTS[:2])
    prepare = partial(policy.prepare, sigmas=SIGMAS)
    joined = prepare(one).at(1).expand(2).then(prepare(two).at(1))
    whole = prepare(one.expand(2).then(two)).at(1)
    torch.testing.assert_close(joined.modulation, whole.modulation)
    torch.testing.assert_close(joined.embeds, whole.embeds)
    assert len(joined) == 4 and joined.table is None
    with pytest.raises(ValueError, match="prepared alike"):
        one.then(prepare(two))
    with pytest.raises(ValueError, match="of all steps; take one"):
        policy.velocity(sample_of(policy, 2), SIGMAS[:2], prepare(two))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fused", "changes"),
    [
        (True, {"sample.guidance_scale": 3.0, "optim.guard": True, "optim.beta": 0.0}),
        (False, {"sample.shared_noise": True, "sample.share_prefix": True}),
        (True, {"policy.gradient_checkpointing": True, "sample.window_size": 0}),
        (False, {"policy.gradient_checkpointing": True}),
        (False, {"optim.anchor": "replay", "optim.steps_per_forward": 2}),
    ],
)
def test_training_never_computes_them_in_a_forward(kinds, tmp_path, changes, fused, monkeypatch):
    """Neither in the rollout nor in the update; ratios exactly 1."""
    options = {"policy.fused": fused, "policy.dtype": "bfloat16", "sample.steps": 4, **changes}
    options["sample.group_size"] = 3
    parts, config = parts_of(kinds, "sd3.5-medium", tmp_path, **options)
    policy, inside, forward = parts.policy, [], parts.policy.velocity

    def velocity(*arguments):
        inside.append(1)
        try:
            return forward(*arguments)
        finally:
            inside.pop()

    calls, silu = [], torch.nn.functional.silu

    def counted(*arguments, **options):
        calls.append(len(inside))
        return silu(*arguments, **options)

    monkeypatch.setattr(policy, "velocity", velocity)
    # Of the time's embedding, the pooled text's and every norm's modulation, and of nothing else.
    monkeypatch.setattr(torch.nn.functional, "silu", counted)
    policy.transformer.context_embedder.register_forward_hook(lambda *_: calls.append(len(inside)))
    tables, table = [], modulation.precompute
    monkeypatch.setattr(modulation, "precompute", lambda *a: tables.append(len(a[-1])) or table(*a))
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0
    # All steps of the 2 prompts in one product, as many rows in the update as in the rollout.
    one = sorted([4 * 2] + [4] * (config.sample.guidance_scale != 1))
    assert [sorted(tables[i : i + len(one)]) for i in range(0, len(tables), len(one))] == [one] * 4
    assert len(calls) >= 2 * 2 * 4 and not any(calls)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fused", "changes", "reason"),
    [
        (
            False,
            {"policy.lora_targets": ("to_q", "context_embedder")},
            "context_embedder has an adapter",
        ),
        (
            True,
            {"policy.lora_targets": ("to_v", "norm1.linear")},
            r"transformer_blocks.0.norm1.linear has an adapter",
        ),
        (
            False,
            {"policy.lora_targets": ("to_v", "norm1.linear")},
            r"transformer_blocks.0.norm1.linear has an adapter",
        ),
        (True, {"policy.adapter": "full", "policy.dtype": "auto"}, "time_text_embed is trained"),
    ],
)
def test_what_is_trained_is_no_constant(kinds, tmp_path, changes, reason, fused):
    small = {"policy.fused": fused, "sample.group_size": 3, "sample.steps": 4}
    parts, config = parts_of(kinds, "sd3", tmp_path, **changes, **small)
    policy = parts.policy
    assert reason in policy.describe() and "in every forward" in policy.describe()
    text = policy.encode(setups.TEXTS[:2])
    assert policy.prepare(text, SIGMAS) is text
    for parts.state.iteration in range(2):
        metrics = setups.update(parts, setups.experience(parts, config), config)
        assert metrics["max_ratio_error"] == 0.0 and min(metrics["grad_norm"]) > 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_serves_all_prompts(kinds, tmp_path, kind):
    """The table is data to a captured rollout, and a step of it to a captured evaluation."""
    model, own = kinds[kind]
    parts, config = made(model, tmp_path, **{"sample.group_size": 3, "sample.steps": 4}, **own)
    policy = parts.policy
    assert "modulation once a rollout" in policy.describe()
    for parts.state.iteration in range(2):
        conditioning = policy.encode(setups.TEXTS[3 * parts.state.iteration :][:2])
        found = train.collect(parts, conditioning, config)
        assert_equal(found, eager(policy, partial(train.collect, parts, conditioning, config)))
    images = partial(evaluate, policy)
    assert torch.equal(images(), eager(policy, images))
    assert policy.graphs.recorder.captures == 2


def test_positions_are_cut_out_once(kinds):
    model, _ = kinds["sd3"]
    patches = Policy.load(str(model), device="cpu").transformer.pos_embed
    own = partial(type(patches).cropped_pos_embed, patches)
    assert torch.equal(patches.cropped_pos_embed(8, 8), own(8, 8))
    assert patches.cropped_pos_embed(8, 8) is patches.cropped_pos_embed(8, 8)
    assert torch.equal(patches.cropped_pos_embed(4, 6), own(4, 6))
    assert "_cropped" not in patches.state_dict()
