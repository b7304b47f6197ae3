"""flowgrpo plan: what it prints agrees with the dealing that a run would make."""

from __future__ import annotations

import pytest
from rich.console import Console

from flowgrpo import plan
from flowgrpo.cli.plan import show_plan
from flowgrpo.config import ConfigError, replace
from flowgrpo.distributed.dealing import deal
from flowgrpo.objectives import objective_of
from flowgrpo.recipes import recipe

QUIET = Console(quiet=True)


def test_the_paper_on_24_gpus():
    """1152 images in 2 updates: 72 chunks of 8 each, 3 a GPU; nobody waits."""
    lines = show_plan(["sd35m_geneval", "--gpus", "24", "--memory=80"], QUIET)
    assert (
        lines["processes"] == "24, each with 3 of the 72 parts of an update and 48 of 1152 images"
    )
    assert lines["idle"] == "0.0% of their time"
    config = recipe("sd35m_geneval", memory=80.0)
    arch = plan.sizes_of(config.policy.model)
    trained = sum(config.policy.lora_rank * (i + o) for i, o in arch.adapted)
    # Two sums of all gradients an iteration, each as a ring's all-reduce would send them.
    assert plan.traffic(config, trained, 24)["gradients"] == pytest.approx(
        2 * 8 * trained * 23 / 24
    )


@pytest.mark.parametrize("gpus", [2, 3, 5, 8, 48, 72])
def test_the_figures_are_those_of_the_dealing(gpus):
    config = recipe("sd35m_geneval", memory=80.0)
    objective, sample = objective_of(config), config.sample
    dealings = [
        deal(
            objective.micro_steps(config, sample.rows),
            config.optim.updates_per_iteration,
            sample.rows,
            sample.batch_size,
            gpus,
            rank,
        )
        for rank in range(gpus)
    ]
    work = [sum(len(leaves) for leaves in d.steps) for d in dealings]
    idle = 1 - sum(work) / (gpus * max(work))
    assert dealings[0].idle == pytest.approx(idle)
    assert plan.process_lines(config, gpus)["idle"].startswith(f"{idle:.1%}")
    one, many = (
        plan.expected_memory(config, plan.sizes_of(config.policy.model), n) for n in (1, gpus)
    )
    rows = max(len(d.own_rows) for d in dealings)
    assert many["trajectory"] == pytest.approx(one["trajectory"] * rows / sample.rows)
    assert many["total"] < one["total"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nano", "--gpus", "4"], "each of the 2 optimizer steps of an iteration has 1 chunk "),
        (["nano", "--gpus", "0"], "--gpus is '0', but a whole number above 0"),
        (["nano", "--gpus"], "--gpus has no value"),
        (["nano", "extra"], "plan takes one recipe, but 'extra'"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ConfigError, match=message):
        show_plan(arguments, QUIET)


def test_help(capsys):
    assert show_plan(["--help"]) == {} and capsys.readouterr().out.startswith(
        "usage: flowgrpo plan"
    )


def test_weights_in_pieces():
    """Gathered once a forward and once a backward, of rollout, reference and update."""
    options = ["sd35m_geneval", "--memory=80", "--run.parallel", "fsdp"]
    options += ["--sample.no-share-prefix", "--gpus"]
    eight = show_plan([*options, "8"], QUIET)
    config = recipe("sd35m_geneval", memory=80.0)
    sample, chunks = config.sample, config.sample.chunks / 8
    passes = 3 if config.optim.beta else 2
    gathers = chunks * (sample.steps + passes * sample.trained_steps)
    assert f"8 pieces; each process gathers all of them {gathers:g} times" in eight["weights"]
    with pytest.raises(ConfigError, match="all processes must run as many forwards"):
        show_plan([*options, "5"], QUIET)
    arch = plan.sizes_of(config.policy.model)
    assert "GiB of 80 a GPU (weights" in eight["memory"]
    fewer = plan.gathered(config, arch.parameters, 8, 0)
    assert fewer[1] == pytest.approx(fewer[0] * arch.parameters * 2 * 7 / 8)


def test_memory_of_pieces():
    """A process keeps an eighth of the transformer, and three blocks of it pass through."""
    config = recipe("sd35m_geneval", memory=80.0)
    arch = plan.sizes_of(config.policy.model)
    whole = plan.expected_memory(config, arch, 8)
    shared = replace(config, **{"run.parallel": "fsdp", "sample.share_prefix": False})
    pieces = plan.expected_memory(shared, arch, 8)
    transformer = 2 * arch.parameters / plan.GIB
    assert whole["weights"] - pieces["weights"] == pytest.approx(transformer * 7 / 8)
    copies = 2 * sum((i + 32) * o + 32 * i for i, o in arch.adapted) / plan.GIB
    assert config.policy.lora_rank == 32
    less = copies * 23 / 24 - transformer * 3 / 24
    assert whole["update"] - pieces["update"] == pytest.approx(less)
    there = plan.expected_memory(replace(shared, **{"run.cpu_offload": True}), arch, 8)
    assert whole["weights"] - there["weights"] == pytest.approx(transformer)


def test_memory_of_what_is_trained_whole():
    options = ["sd35m_geneval", "--policy.adapter", "full", "--sample.no-share-prefix"]
    options += ["--policy.no-fused", "--memory=80", "--gpus", "8"]
    one = show_plan(options, QUIET)["memory"]
    eight = show_plan([*options, "--run.parallel", "fsdp"], QUIET)["memory"]
    # Weight, gradient, two moments, average and reference, 4 bytes each.
    gib = 24 * 2_243_171_520 / 2**30
    assert one.startswith(f"{gib:.1f} GiB") and eight.startswith(f"{gib / 8:.1f} GiB")
