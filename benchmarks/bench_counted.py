"""Suite `counted`: memory, launches and waits of iterations at real size, counted and not measured.

    python benchmarks/bench_counted.py [--cases sd3.5-m] [--out RECORD]

No GPU and no memory is needed: on_meta.py says what is counted and what is not. Cases: SD3.5-M and
FLUX.1-dev, the geometries of suite `iteration` with one trained step of two, since peaks and counts
a step do not depend on their number. Providers: `ours` by default, `ours-fused`,
`ours-recomputed` (policy.gradient_checkpointing), `eager` (a lower bound, see on_meta.pretending;
`compile` runs code that Inductor makes for a device, and cannot be counted). Text encoders are not
in it. Rows: `counted_memory` (at most alive in an iteration, weights included), `counted_weights`
(before it), `launches` (operations) and `waits` of a step of the rollout and of a micro-step
without the optimizer's step, which is in neither. What a rollout does once is shared out over its
two steps.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import family
import on_meta
import ours
import records
import torch
from cases import Case

SUITE = "counted"
CHANGES: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours-fused": {"policy.fused": True},
    "ours-recomputed": {"policy.gradient_checkpointing": True},
}


def chosen(parts: list[str]) -> list[Case]:
    """The real models' cases of suite `iteration`, shortened, each geometry once."""
    found = {}
    for case in cases.iteration():
        short = replace(case, steps=2, window=1)
        if case.model.name != "nano" and (not parts or any(p in short.name for p in parts)):
            found[short.training_name] = short
    return list(found.values())


def build(provider: str, case: Case) -> tuple[AbstractContextManager, Any]:
    """(context in which it is counted, what makes the provider there)."""
    if provider == "eager":
        setting = family.setting(provider, case.model, "cpu")

        def eager() -> family.Family:
            made = family.Family(case.model, setting, "cpu")
            made.prepare(case)
            # Made when first asked for; here before anything is counted.
            assert made.trained is made.serving
            return made

        return on_meta.pretending(), eager
    return on_meta.watching(), lambda: ours.Ours(case, on_meta.DEVICE, **CHANGES[provider])


def peak(make: Callable[[], Any], watch: on_meta.Watch) -> tuple[Any, int, int]:
    """(what `make` makes, its bytes, bytes at most in its first iteration)."""
    made = make()
    watch.restart()
    weights = watch.live
    made.iteration()
    return made, weights, watch.most


def count(provider: str, case: Case) -> dict[str, tuple[float, str]]:
    """Metric -> (value, unit)."""
    context, make = build(provider, case)
    with context as watch:
        made, weights, memory = peak(make, watch)
        # Once more, without what is made at the first call.
        watch.restart()
        found = made.rollout()
        rollout = watch.launches / case.steps, len(watch.waits)
        watch.restart()
        inside, one = micro_step(made, found)
        with inside:
            watch.restart()
            one()
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


def micro_step(made: Any, rollout: Any) -> tuple[AbstractContextManager, Callable[[], Any]]:
    """(where an update does it, one forward and backward)."""
    if isinstance(made, family.Family):
        return nullcontext(), lambda: made.micro_step(rollout[0], 0)[0].backward()
    from flowgrpo import objectives, update
    from flowgrpo.records import Experience

    parts, rows = made.parts, made.case.rows
    values = [torch.ones(rows, device=on_meta.DEVICE) for _ in range(2)]
    experience = Experience(rollout, made.conditioning, parts.uncond, *values)
    experience = update.with_prepared_conditioning(parts.policy, parts.schedule, experience)
    batch = objectives.gather_trained_steps(
        parts.schedule, experience, slice(0, made.case.batch), range(1)
    )
    inputs = (batch, made.config, 1)
    return parts.micro_step.accumulating(), lambda: parts.micro_step(*inputs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these")
    parser.add_argument("--providers", default=",".join([*CHANGES, "eager"]))
    parser.add_argument("--out", type=Path, default=records.RESULTS / "counted-meta.json")
    args = parser.parse_args(argv)
    rows = []
    for case in chosen([part for part in args.cases.split(",") if part]):
        name = case.training_name
        for provider in args.providers.split(","):
            found = count(provider, case)
            rows += [records.row(SUITE, name, provider, m, *value) for m, value in found.items()]
            text = "  ".join(f"{m} {value:.4g}" for m, (value, _) in found.items())
            print(f"{name:36s} {provider:16s} {text}", flush=True)
        records.write(records.record(rows, "cpu", counted="meta device; nothing ran"), args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
