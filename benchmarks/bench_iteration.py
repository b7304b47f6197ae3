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
device, as each has them by default, and `ours-offload` with policy.offload_text_encoders, whose
encoders are away. Rows: `peak_memory` (taken from the device: weights, activations, graph pools,
fragmentation) and `peak_tensors` beyond the weights.
"""

from __future__ import annotations

import statistics
import sys

import cases
import measure
import models
import suites
from cases import Case


def one(session: suites.Session, case: Case) -> None:
    session.compare(case, case.training_name, _some)


def _some(session: suites.Session, case: Case, names: list[str], text: dict) -> dict:
    """Measure providers that are in memory together; their seconds."""
    title, ready = case.training_name, {}
    for name in names:
        provider = session.attempt("set-up", name, title, lambda n=name: session.build(n, case))
        error = provider and session.attempt("iteration", name, title, provider.iteration)
        if error is not None:
            session.row(title, name, "max_ratio_error", error, "1")
            ready[name] = provider.iteration
    if session.args.profile:
        for name, call in ready.items():
            session.profile(title, name, call, "iteration", 1)
        return {}
    times = measure.interleaved(ready, session.rounds, session.device)
    for name, values in times.items():
        seconds = statistics.median(values)
        session.row(title, name, "time", seconds, "s")
        session.row(title, name, "images", case.rows / seconds, "images/s")
        session.rate_rows(title, name, case.iteration_flops, seconds)
        text[name] = f"{seconds:.4g} s"
    return times


def memory(session: suites.Session, case: Case) -> None:
    """Each provider alone."""
    title, text = case.training_name, {}
    for name in ("ours", "ours-offload", "eager"):
        session.drop("eager")
        session.forget()
        before = measure.held(session.device)
        found = session.attempt("iteration", name, title, lambda n=name: _alone(session, n, case))
        if found is None:
            continue
        resident, peak = found
        gib = (resident - before + peak.held) / measure.GIB
        session.row(title, name, "peak_memory", gib, "GiB")
        session.row(title, name, "peak_tensors", peak.used / measure.GIB, "GiB")
        text[name] = f"{gib:.4g} GiB"
    suites.line(title, text)


def _alone(session: suites.Session, name: str, case: Case) -> tuple[int, measure.Peak]:
    """(bytes held once built, peak of an iteration beyond them)."""
    if name == "eager":
        provider = session.build(name, case)
        half = provider.setting.embeds
        provider.encoders = models.text_encoders(case.model, session.device, half)
    else:
        provider = session.build("ours", case, whole=name == "ours")
    held = measure.held(session.device)
    return held, measure.peak(provider.iteration, session.device)


def main(argv: list[str] | None = None) -> int:
    parser = suites.parser(__doc__, "ours,ours-compiled,ours-fused,eager,compile")
    parser.add_argument("--memory", action="store_true", help="suite memory")
    args = parser.parse_args(argv)
    chosen = suites.choose(cases.iteration(args.smoke), args, lambda case: case.training_name)
    session = suites.Session("memory" if args.memory else "iteration", args)
    measured = memory if args.memory else one
    return session.each(
        chosen, lambda case: measured(session, case), lambda case: case.training_name
    )


if __name__ == "__main__":
    sys.exit(main())
