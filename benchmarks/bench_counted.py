"""Suite `counted`: memory, launches and waits of iterations at real size, counted and not measured.

    python benchmarks/bench_counted.py [--cases sd3.5-m] [--out RECORD]

No GPU and no memory is needed: measuring/on_meta.py says what is counted and what is not. Cases:
SD3.5-M and FLUX.1-dev, the geometries of suite `iteration` with one trained step of two, since
peaks and counts a step do not depend on their number. Providers: `ours` by default, `ours-fused`,
`ours-recomputed` (policy.gradient_checkpointing), `ours-int8` and `ours-nf4` (that and
policy.quantize, which needs bitsandbytes), `eager` (a lower bound, see on_meta.pretending;
`compile` runs code that Inductor makes for a device, and cannot be counted). Text encoders are not
in it. Rows: `counted_memory` (most bytes alive in an iteration, weights included),
`counted_weights` (before it), `launches` (operations) and `waits` of a step of the rollout and of a
micro-step without the optimizer's step, which is in neither. What a rollout does once is shared out
over its two steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from measuring import on_meta
from models import cases
from models.cases import Case
from providers import flow_grpo, ours
from providers.flow_grpo import FlowGrpoBaseline
from reporting import records

SUITE = "counted"
CHANGES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-fused": {"policy.fused": True},
    "ours-recomputed": {"policy.gradient_checkpointing": True},
    "ours-int8": {"policy.gradient_checkpointing": True, "policy.quantize": "int8"},
    "ours-nf4": {"policy.gradient_checkpointing": True, "policy.quantize": "nf4"},
}


def chosen(patterns: list[str]) -> list[Case]:
    """Cases of suite `iteration` on real models, shortened, each geometry once."""
    geometries = {}
    for case in cases.iteration():
        short = replace(case, steps=2, window=1)
        if case.model.name != "nano" and (not patterns or any(p in short.name for p in patterns)):
            geometries[short.training_name] = short
    return list(geometries.values())


def build(provider: str, case: Case) -> tuple[AbstractContextManager, Any]:
    """(context that counts, function that builds the provider inside it)."""
    if provider == "eager":
        setting = flow_grpo.setting(provider, case.model, "cpu")

        def eager() -> FlowGrpoBaseline:
            baseline = FlowGrpoBaseline(case.model, setting, "cpu")
            baseline.prepare(case)
            # Built when first asked for; here before anything is counted.
            assert baseline.trained is baseline.serving
            return baseline

        return on_meta.pretending(), eager
    return on_meta.watching(), lambda: ours.Ours(case, on_meta.DEVICE, **CHANGES[provider])


def peak(make: Callable[[], Any], watch: on_meta.Watch) -> tuple[Any, int, int]:
    """(the provider that `make` builds, its bytes, most bytes in its first iteration)."""
    provider = make()
    watch.restart()
    weights = watch.live
    provider.iteration()
    return provider, weights, watch.most


def count(name: str, case: Case) -> dict[str, tuple[float, str]]:
    """Metric -> (value, unit) of the provider `name`."""
    context, make = build(name, case)
    with context as watch:
        provider, weights, memory = peak(make, watch)
        # Once more, without what only the first call allocates.
        watch.restart()
        trajectory = provider.rollout()
        rollout = watch.launches / case.steps, len(watch.waits)
        watch.restart()
        accumulating, run = micro_step(provider, trajectory)
        with accumulating:
            watch.restart()
            run()
            update = watch.launches, len(watch.waits)
    gib = 1 << 30
    return {
        "counted_memory": (memory / gib, "GiB"),
        "counted_weights": (weights / gib, "GiB"),
        "rollout_launches": (rollout[0], "1/step"),
        "rollout_waits": (rollout[1], "1/rollout of 2 steps"),
        "update_launches": (update[0], "1/micro-step"),
        "update_waits": (update[1], "1/micro-step"),
    }


def micro_step(provider: Any, rollout: Any) -> tuple[AbstractContextManager, Callable[[], Any]]:
    """(context of an update's micro-steps, function of one forward and backward)."""
    if isinstance(provider, FlowGrpoBaseline):
        return nullcontext(), lambda: provider.micro_step(rollout[0], 0)[0].backward()
    from flowgrpo import objectives
    from flowgrpo.records import Experience

    components, rows = provider.components, slice(0, provider.case.batch)
    values = [torch.ones(provider.case.rows, device=on_meta.DEVICE) for _ in range(2)]
    experience = Experience(rollout, provider.conditioning, components.uncond, *values)
    policy, schedule, micro_step = components.policy, components.schedule, components.micro_step
    experience = objectives.with_prepared_conditioning(policy, schedule, experience)
    batch = objectives.gather_trained_steps(schedule, experience, rows, range(1))
    accumulating = micro_step.accumulating(components.world, components.dealing, provider.config)
    return accumulating, lambda: micro_step(batch, provider.config, 1)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these")
    parser.add_argument("--providers", default=",".join([*CHANGES, "eager"]))
    parser.add_argument("--out", type=Path, default=records.RESULTS / "counted-meta.json")
    args = parser.parse_args(argv)
    rows = []
    for case in chosen([pattern for pattern in args.cases.split(",") if pattern]):
        name = case.training_name
        for provider in args.providers.split(","):
            counts = count(provider, case)
            rows += [records.row(SUITE, name, provider, m, *value) for m, value in counts.items()]
            text = "  ".join(f"{m} {value:.4g}" for m, (value, _) in counts.items())
            print(f"{name:36s} {provider:16s} {text}", flush=True)
        records.write(records.record(rows, "cpu", counted="meta device; nothing ran"), args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
