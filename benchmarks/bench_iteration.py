"""Suites `iteration` and `memory`: whole Flow-GRPO iterations, and the memory that they take.

    python benchmarks/bench_iteration.py                   # suite iteration
    python benchmarks/bench_iteration.py --memory          # suite memory
    python benchmarks/bench_iteration.py --smoke [--memory]

An iteration is a rollout, its images, a light reward (brightness, read by the host), advantages and
one optimizer step over all chunks and trained steps. Cases: SD3.5-M with all steps or a window of
three, with and without KL; the paper's with guidance; FLUX.1-dev with a window; nano. Rows of
`iteration`: `time` (seconds), `images` a second, `rate`, `mfu`, `of_measured` (operations of the
transformer alone; decoding is time without credit), `max_ratio_error`, `speedup_vs_eager`.

`memory` builds one provider at a time, whole: `ours` and `eager` with the text encoders on the
device, the default of both, and `ours-offload` with policy.offload_text_encoders, whose
encoders are away. Rows: `peak_memory` (taken from the device: weights, activations, graph pools,
fragmentation) and `peak_tensors` beyond the weights.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from typing import Any

from measuring import memory, model_timings, suites, timers
from measuring.suites import SuiteRun
from measuring.timing import Options, Timing
from models import cases, random_weights
from models.cases import Case


def measure(run: SuiteRun, case: Case) -> None:
    """Rows of one case."""
    run.compare(case, case.training_name, _time_providers)


def _time_providers(run: SuiteRun, case: Case, names: list[str], text: dict) -> dict:
    """Measure providers that are in memory together; their seconds."""
    title, ready = case.training_name, {}
    for name in names:
        provider = run.attempt("set-up", name, title, lambda n=name: run.pool.build(n, case))
        error = provider and run.attempt("iteration", name, title, provider.iteration)
        if error is not None:
            run.row(title, name, "max_ratio_error", error, "1")
            ready[name] = provider.iteration
    if run.args.profile:
        for name, call in ready.items():
            run.profile(title, name, call, "iteration", 1)
        return {}
    times = timers.interleaved(ready, run.rounds, run.device)
    for name, values in times.items():
        seconds = statistics.median(values)
        run.row(title, name, "time", seconds, "s")
        run.row(title, name, "images", case.rows / seconds, "images/s")
        run.rate_rows(title, name, case.iteration_flops, seconds)
        text[name] = f"{seconds:.4g} s"
    return times


def measure_memory(run: SuiteRun, case: Case) -> None:
    """Rows of the memory of one case, a provider at a time."""
    title, text = case.training_name, {}
    for name in ("ours", "ours-offload", "eager"):
        run.pool.drop("eager")
        run.pool.forget()
        before = memory.resident(run.device)
        usage = run.attempt("iteration", name, title, lambda n=name: _alone(run, n, case))
        if usage is None:
            continue
        resident, peak = usage
        gib = (resident - before + peak.reserved) / memory.GIB
        run.row(title, name, "peak_memory", gib, "GiB")
        run.row(title, name, "peak_tensors", peak.allocated / memory.GIB, "GiB")
        text[name] = f"{gib:.4g} GiB"
    suites.print_line(title, text)


def _alone(run: SuiteRun, name: str, case: Case) -> tuple[int, memory.Peak]:
    """(resident bytes of the provider, peak of an iteration beyond them)."""
    if name == "eager":
        provider = run.pool.build(name, case)
        half = provider.setting.embeds
        provider.encoders = random_weights.text_encoders(case.model, run.device, half)
    else:
        provider = run.pool.build("ours", case, whole=name == "ours")
    return memory.resident(run.device), memory.peak(provider.iteration, run.device)


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark: whole iterations."""

    def iteration(provider: Any, case: Case) -> Callable[[], Any]:
        return provider.iteration

    chosen = cases.timed(cases.iteration, options)
    return model_timings.of(chosen, lambda case: case.training_name, options, True, iteration)


def test_iteration(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def main(argv: list[str] | None = None) -> int:
    parser = suites.parser(__doc__, "ours,ours-compiled,ours-fused,eager,compile")
    parser.add_argument("--memory", action="store_true", help="suite memory")
    args = parser.parse_args(argv)
    chosen = suites.choose(cases.iteration(args.smoke), args, lambda case: case.training_name)
    run = SuiteRun("memory" if args.memory else "iteration", args)
    rows_of = measure_memory if args.memory else measure
    return run.each(chosen, lambda case: rows_of(run, case), lambda case: case.training_name)


if __name__ == "__main__":
    sys.exit(main())
