"""Suite `update`: an optimizer step over micro-steps (one forward geometry at one trained step).

    python benchmarks/bench_update.py
    python benchmarks/bench_update.py --cases "sd3.5-m t10 b16" --profile
    python benchmarks/bench_update.py --smoke

Cases: SD3.5-M with and without guidance and KL, FLUX.1-dev, nano; two trained steps of each chunk
of rows. Rows: `micro_step` (milliseconds, the optimizer step shared out), `rate`, `mfu` and
`of_measured` by the operations of cases.py, `peak_memory`, `launches`, `kernels` and `syncs` a
micro-step (those of the whole update shared out: ours waits for its advantages to get there and
for its figures at the end), `max_ratio_error` (the largest |ratio - 1| of the first update after a
rollout), `speedup_vs_eager`.
"""

from __future__ import annotations

import functools
import statistics
import sys
from collections.abc import Callable
from typing import Any

from measuring import memory, model_timings, suites, timers
from measuring.suites import SuiteRun
from measuring.timing import Options, Timing
from models import cases
from models.cases import Case


def measure(run: SuiteRun, case: Case) -> None:
    """Rows of one case."""
    run.compare(case, case.training_name, _time_providers)


def _time_providers(run: SuiteRun, case: Case, names: list[str], text: dict) -> dict:
    """Measure providers that are in memory together; their seconds."""
    title, ready = case.training_name, {}
    per = case.chunks * case.trained_steps
    for name in names:
        provider = run.attempt("set-up", name, title, lambda n=name: run.pool.build(n, case))
        out = provider and run.attempt("rollout", name, title, provider.rollout)
        if out is None:
            continue

        def update(provider=provider, out=out):
            return provider.update(out)

        peak = run.attempt("update", name, title, lambda call=update: memory.peak(call, run.device))
        if peak is not None:
            run.memory_rows(title, name, peak)
            run.row(title, name, "max_ratio_error", peak.result, "1")
            ready[name] = update
    if run.args.profile:
        for name, call in ready.items():
            run.profile(title, name, call, "update", per)
        return {}
    times = timers.interleaved(ready, run.rounds, run.device)
    for name, values in times.items():
        seconds = statistics.median(values)
        run.row(title, name, "micro_step", 1e3 * seconds / per, "ms")
        run.rate_rows(title, name, per * case.micro_step_flops, seconds)
        run.host_rows(title, name, ready[name], per, "micro-step")
        text[name] = f"{1e3 * seconds / per:.4g} ms"
    return times


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark: an update after its rollout."""

    def update(provider: Any, case: Case) -> Callable[[], Any]:
        return functools.partial(provider.update, provider.rollout())

    chosen = cases.timed(cases.update, options)
    return model_timings.of(chosen, lambda case: case.training_name, options, True, update)


def test_update(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def main(argv: list[str] | None = None) -> int:
    providers = "ours,ours-captured,ours-compiled,ours-fused,eager,compile"
    args = suites.parser(__doc__, providers).parse_args(argv)
    chosen = suites.choose(cases.update(args.smoke), args, lambda case: case.training_name)
    run = SuiteRun("update", args)
    return run.each(chosen, lambda case: measure(run, case), lambda case: case.training_name)


if __name__ == "__main__":
    sys.exit(main())
