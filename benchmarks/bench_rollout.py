"""Suite `rollout`: noise to latents, and to images, in one forward geometry after another.

    python benchmarks/bench_rollout.py                              # this machine
    python benchmarks/bench_rollout.py --cases sd3.5-m --batch-sizes 1,16 --providers ours,eager
    python benchmarks/bench_rollout.py --profile --batch-sizes 16   # where the time goes
    python benchmarks/bench_rollout.py --smoke                      # tiny models, seconds

Cases: SD3.5-M 512 x 512, T = 10, with 333 text tokens, with and without guidance; FLUX.1-dev 512 x
512, T = 6 and 10; nano. Providers: `ours` (the trainer's rollout as configured by default),
`ours-loop` (the same, not captured), `ours-compiled` (with policy.compile), `ours-fused` (with
policy.fused), `eager` and `compile` (providers/flow_grpo.py), `ceiling` (this device's matrix
products, all of the time). Rows: `images` a second by denoising alone and `images_with_decoding`,
`step` (milliseconds), `rate`, `mfu` (of 989 TFLOP/s), `of_measured` (of the ceiling),
`peak_memory`, `launches`, `kernels` and `syncs` a step (those of the whole rollout shared out: ours
waits for seeds and windows to get to the device, before its first step), `speedup_vs_eager`.
"""

from __future__ import annotations

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
    ideal = case.rows * run.ceiling.matmul / case.rollout_flops
    run.row(case.name, "ceiling", "images", ideal, "images/s")
    run.compare(case, case.name, _time_providers)


def _time_providers(run: SuiteRun, case: Case, names: list[str], text: dict) -> dict:
    """Measure providers that are in memory together; their seconds."""
    ready, rollouts = {}, {}
    for name in names:
        provider = run.attempt("set-up", name, case.name, lambda n=name: run.pool.build(n, case))
        if provider is None:
            continue
        peak = run.attempt(
            "rollout", name, case.name, lambda p=provider: memory.peak(p.rollout, run.device)
        )
        if peak is not None:
            ready[name], rollouts[name] = provider, peak.result
            run.memory_rows(case.name, name, peak)
    if run.args.profile:
        for name, provider in ready.items():
            run.profile(case.name, name, provider.rollout, "rollout", case.steps * case.chunks)
        return {}
    calls = {name: provider.rollout for name, provider in ready.items()}
    times = timers.interleaved(calls, run.rounds, run.device)
    for name, values in times.items():
        seconds = statistics.median(values)
        steps = case.steps * case.chunks
        run.row(case.name, name, "images", case.rows / seconds, "images/s")
        run.row(case.name, name, "step", 1e3 * seconds / steps, "ms")
        run.rate_rows(case.name, name, case.rollout_flops, seconds)
        run.host_rows(case.name, name, calls[name], steps, "step")
        text[name] = f"{case.rows / seconds:.3g} images/s"
    _decoding(run, case, ready, rollouts, times)
    return times


def _decoding(run: SuiteRun, case: Case, ready: dict, rollouts: dict, times: dict) -> None:
    """Rows of decoding, and of denoising and decoding together."""
    calls = {}
    for name, provider in ready.items():

        def call(provider=provider, out=rollouts[name]):
            return provider.decode(out)

        if run.attempt("decoding", name, case.name, call) is not None:
            calls[name] = call
    decoding = timers.interleaved(calls, run.rounds, run.device)
    for name, values in decoding.items():
        seconds = statistics.median(values)
        run.row(case.name, name, "decoding", 1e3 * seconds / case.rows, "ms/image")
        whole = statistics.median(times[name]) + seconds
        run.row(case.name, name, "images_with_decoding", case.rows / whole, "images/s")


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark: a whole rollout."""

    def rollout(provider: Any, case: Case) -> Callable[[], Any]:
        return provider.rollout

    chosen = cases.timed(cases.rollout, options)
    return model_timings.of(chosen, lambda case: case.name, options, False, rollout)


def test_rollout(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def main(argv: list[str] | None = None) -> int:
    providers = "ours,ours-loop,ours-compiled,ours-fused,eager,compile"
    args = suites.parser(__doc__, providers).parse_args(argv)
    chosen = suites.choose(cases.rollout(args.smoke), args, lambda case: case.name)
    run = SuiteRun("rollout", args)
    return run.each(chosen, lambda case: measure(run, case), lambda case: case.name)


if __name__ == "__main__":
    sys.exit(main())
