"""Suite `dropins`: a replay through each trainer's drop-in, beside its eager code and the bare op.

    python benchmarks/bench_dropins.py                  # this machine's CPU, a minute
    python benchmarks/bench_dropins.py --keep-memory    # the same without fresh pages
    python benchmarks/bench_dropins.py --smoke          # seconds; checks that everything runs

A replay scores a stored x' of 16 samples of 16 x 64 x 64 in float32, with autograd on for the
velocity as in training: the forward alone (`replay`), and with the gradient to the velocity
(`backward`). `host` is the forward of latents of 4 elements where the caches hold other things, as
they do behind a pass over large latents: what Python, autograd and the dispatcher take.

Providers: `ours` (the drop-in), `eager` (providers/peer_steps.py: the trainers' sequences of torch
ops, written from their formulas; their own code does not run here), `bare`, the op log_prob alone,
without the mean and x0 that the trainers' functions return as well, and `pass`: one torch op that
reads the three latents and writes a new tensor, as each function must that returns the mean; with
the gradient two of them, for it reads the latents again and writes the gradient. So eager / pass is
the most that any replacement gains over the sequence, on the machine and in the state of the run.
Providers take turns, in another order each round (a call finds the caches as the one before it left
them), and every call works on the next of several buffer sets, together larger than the caches.
Times are the processor's, of the one thread that computes: what other processes take is not in
them. `time` is the median, `best` the shortest.

With --keep-memory the process keeps what it has freed (glibc's MALLOC_TRIM_THRESHOLD_ and
MALLOC_MMAP_THRESHOLD_), for every provider: then no call is charged for fresh pages, which the
eager sequences ask for most.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from flowgrpo_kernels import flow_sde, log_prob
from flowgrpo_kernels.backends import dispatch
from flowgrpo_kernels.compat import (
    dance_grpo,
    flow_factory,
    flow_grpo,
    miles,
    mixgrpo,
    precise,
    unirl,
    verl_omni,
)
from measuring import timers
from measuring.timing import Options, Timing
from providers import flow_grpo_ops, peer_steps
from reporting import records

SHAPE, SMOKE_SHAPE = (16, 16, 64, 64), (2, 3, 5, 7)
TINY = (1, 2, 2)
SIGMAS = torch.tensor([1 - i / 10 for i in range(11)])
STEP, LEVEL, ETA = 4, 0.7, 0.3
PROVIDERS, METRICS = ("ours", "bare", "eager", "pass"), ("replay", "backward")
# So that glibc keeps what is freed.
MALLOC = {"MALLOC_TRIM_THRESHOLD_": "2000000000", "MALLOC_MMAP_THRESHOLD_": "2000000000"}


class Buffers(NamedTuple):
    """Latents of one call."""

    velocity: Tensor
    sample: Tensor
    prev_sample: Tensor

    @classmethod
    def make(cls, shape: tuple[int, ...], seed: int) -> Buffers:
        g = torch.Generator().manual_seed(seed)
        velocity, sample, prev_sample = (torch.randn(shape, generator=g) for _ in range(3))
        return cls(velocity.requires_grad_(), sample, prev_sample)


class Case(NamedTuple):
    """A trainer: calls that score, and where their log_prob is among their results."""

    name: str
    ours: Callable[[Buffers], tuple]
    ours_at: int
    eager: Callable[[Buffers], tuple]
    eager_at: int


def cases(batch: int) -> list[Case]:
    """Every drop-in, at mixed steps where the trainer has them."""
    steps = (torch.arange(batch) + STEP) % 9
    scheduler = flow_grpo_ops.Scheduler(SIGMAS)
    scheduler.is_eval, scheduler.dynamics_type = False, "Flow-SDE"
    t, t_next = scheduler.timesteps[steps], SIGMAS[steps + 1] * 1000
    s, p, second = SIGMAS[steps], SIGMAS[steps + 1], SIGMAS[1].expand(batch)
    strategy, backend = SimpleNamespace(canonical_name="flow"), miles.FlowSdeStepBackend()
    pair = {"sigmas": s, "next_sigmas": p, "sigma_max": second}
    step = flow_grpo.sde_step_with_logprob
    return [
        Case(
            "flow_grpo",
            lambda b: step(scheduler, b.velocity, t, b.sample, LEVEL, b.prev_sample), 1,
            lambda b: peer_steps.flow_grpo(scheduler, b[0], t, b.sample, b.prev_sample, LEVEL), 1,
        ),
        Case(
            "DanceGRPO",
            lambda b: dance_grpo.flux_step(*b[:2], ETA, SIGMAS, STEP, b[2], True, True), 2,
            lambda b: peer_steps.dance_grpo(*b[:2], ETA, SIGMAS, STEP, b[2], True), 2,
        ),
        Case(
            "Flow-Factory",
            lambda b: flow_factory.step(
                scheduler, b[0], t, b.sample, b[2], noise_level=LEVEL, return_dict=False
            ), 3,
            lambda b: peer_steps.flow_factory(scheduler, b[0], t, b.sample, b[2], LEVEL), 2,
        ),
        Case(
            "Flow-Factory pair",
            lambda b: flow_factory.step(
                scheduler, b[0], t, b.sample, b[2], t_next, noise_level=LEVEL, return_dict=False
            ), 3,
            lambda b: peer_steps.flow_factory_pair(b[0], t, t_next, *b[1:], LEVEL, SIGMAS[1]), 2,
        ),
        Case(
            "verl-omni",
            lambda b: verl_omni.sample_previous_step(
                scheduler, b.sample, b.velocity, t, prev_sample=b.prev_sample
            ), 1,
            lambda b: peer_steps.flow_grpo(scheduler, b[0], t, b.sample, b.prev_sample, LEVEL), 1,
        ),
        Case(
            "UniRL",
            lambda b: unirl.denoise(
                strategy, *b[:2], s, p, eta=LEVEL, prev_sample=b[2], sigma_max=SIGMAS[1]
            ), 1,
            lambda b: peer_steps.unirl(*b[:2], s, p, b[2], LEVEL, SIGMAS[1]), 1,
        ),
        Case(
            "MixGRPO flow",
            lambda b: mixgrpo.flow_grpo_step(*b[:2], LEVEL, SIGMAS, STEP, b[2]), 2,
            lambda b: peer_steps.mixgrpo_flow(*b[:2], LEVEL, SIGMAS, STEP, b[2]), 2,
        ),
        Case(
            "MixGRPO dance",
            lambda b: mixgrpo.dance_grpo_step(*b[:2], ETA, SIGMAS, STEP, b[2], True, True), 2,
            lambda b: peer_steps.dance_grpo(*b[:2], ETA, SIGMAS, STEP, b[2], False), 2,
        ),
        Case(
            "miles-diffusion",
            lambda b: backend.sde_step_logprob(
                *b[:2], prev_sample=b[2], noise_level=LEVEL, **pair
            ), 1,
            lambda b: peer_steps.miles(*b, LEVEL, s, p, second), 1,
        ),
        Case(
            "Precise",
            lambda b: precise.sde_step_with_logprob(
                scheduler, b.velocity, t, b.sample, 1.0, b.prev_sample, sde_type="precise"
            ), 1,
            lambda b: peer_steps.precise(scheduler, b[0], t, b.sample, b.prev_sample, 1.0), 1,
        ),
    ]  # fmt: skip


def bare(batch: int) -> Callable[[Buffers], tuple]:
    """The op alone, at the same steps."""
    transitions, steps = flow_sde(SIGMAS, LEVEL), (torch.arange(batch) + STEP) % 9
    return lambda b: (log_prob(*b, transitions, steps),)


def one_pass(b: Buffers) -> tuple:
    """Reads the three latents and writes a new tensor: (it,)."""
    return (torch.addcmul(b.sample, b.velocity.detach(), b.prev_sample),)


def two_passes(b: Buffers) -> tuple:
    """The same for the mean and, after it, for the gradient."""
    return (*one_pass(b), *one_pass(b))


def with_backward(call: Callable[[Buffers], tuple], at: int) -> Callable[[Buffers], None]:
    """The call and the gradient of its log_probs in the velocity."""

    def run(b: Buffers) -> None:
        torch.autograd.grad(call(b)[at].sum(), b.velocity)

    return run


def check(case: Case, b: Buffers) -> None:
    """Ours and the eager sequence give one log_prob and one gradient before they are timed."""
    results = []
    for call, at in ((case.ours, case.ours_at), (case.eager, case.eager_at)):
        score = call(b)[at]
        results.append((score, *torch.autograd.grad(score.sum(), b.velocity)))
    for ours, eager in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, eager, rtol=3e-5, atol=3e-5 * eager.detach().abs().max().item()
        )


def buffer_sets(shape: tuple[int, ...]) -> list[Buffers]:
    """Buffers of so many calls that none finds its own in a cache."""
    moved = 3 * 4 * torch.Size(shape).numel()
    # One more than a multiple of the providers, so that each meets every set.
    count = timers.buffer_sets(moved, "cpu") // len(PROVIDERS) * len(PROVIDERS) + 1
    return [Buffers.make(shape, seed) for seed in range(count)]


def ready(
    case: Case, shape: tuple[int, ...], metric: str, names: Sequence[str]
) -> dict[str, timers.Timed]:
    """Check a trainer's sequences and warm up some providers: seconds of the processor of one more
    call of each, on the set that was used longest ago."""
    sets = buffer_sets(shape)
    check(case, sets[0])
    wrap = with_backward if metric == "backward" else (lambda call, at: call)
    calls = {
        "ours": wrap(case.ours, case.ours_at),
        "bare": wrap(bare(shape[0]), 0),
        "eager": wrap(case.eager, case.eager_at),
        "pass": two_passes if metric == "backward" else one_pass,
    }
    turn = itertools.cycle(sets)

    def timed(call: Callable[[Buffers], object]) -> float:
        buffers = next(turn)
        start = time.thread_time()
        call(buffers)
        return time.thread_time() - start

    for name in names:
        calls[name](next(turn))
    return {name: functools.partial(timed, calls[name]) for name in names}


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark, on the CPU alone."""
    if options.device != "cpu":
        return []
    shape = SMOKE_SHAPE if options.smoke else SHAPE
    return [
        Timing(
            f"{case.name} {metric}", PROVIDERS, functools.partial(ready, case, shape, metric),
            threads=1,
        )
        for case in cases(shape[0])
        for metric in METRICS
    ]  # fmt: skip


def test_dropins(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def host_times(
    calls: dict[str, Callable[[Buffers], object]], tiny: Buffers, sets: list[Buffers], rounds: int
) -> dict[str, list[float]]:
    """Times calls on tiny latents, each after a pass over all sets: seconds of the processor."""

    def evict() -> None:
        for buffers in sets:
            one_pass(buffers)

    times: dict[str, list[float]] = {name: [] for name in calls}
    order, chance = list(calls), random.Random(0)
    for i in range(rounds + 1):
        chance.shuffle(order)
        for name in order:
            evict()
            start = time.thread_time()
            calls[name](tiny)
            if i > 0:
                times[name].append(time.thread_time() - start)
    return times


def rows_of_times(name: str, times: dict[str, list[float]]) -> list[dict]:
    """Rows of a case: median and best of each provider."""
    return [
        records.row("dropins", name, provider, kind, value * 1e6, "us")
        for provider, seconds in times.items()
        for kind, value in (("time", statistics.median(seconds)), ("best", min(seconds)))
    ]


def rows_of(case: Case, shape: tuple[int, ...], rounds: int) -> list[dict]:
    """Measures one trainer."""
    rows = []
    for metric in METRICS:
        timed = ready(case, shape, metric, PROVIDERS)
        times = timers.take_turns(timed, rounds, chance=random.Random(0))
        rows += rows_of_times(f"{case.name} {metric}", times)
    calls = {"ours": case.ours, "bare": bare(shape[0])}
    tiny = Buffers.make((shape[0], *TINY), 0)
    rows += rows_of_times(f"{case.name} host", host_times(calls, tiny, buffer_sets(shape), rounds))
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small latents, seconds")
    parser.add_argument("--rounds", type=int, default=25, help="timed calls of each provider")
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; no case begins later")
    parser.add_argument("--keep-memory", action="store_true", help="give no freed page back")
    parser.add_argument("--out", type=Path, help="the record (default: results/dropins-cpu.json)")
    args = parser.parse_args(arguments)
    args.device = "cpu"
    return args


def main(arguments: list[str] | None = None) -> int:
    args = parse(arguments)
    torch.set_num_threads(1)
    shape = SMOKE_SHAPE if args.smoke else SHAPE
    rounds = 2 if args.smoke else args.rounds
    facts = {"backend": dispatch.backend_of("log_prob", "cpu")}
    suite = "dropins-keep-memory" if args.keep_memory else "dropins"
    return records.record_cases(
        cases(shape[0]), lambda case: rows_of(case, shape, rounds),
        records.output_path(suite, args), "cpu", args.budget, **facts,
    )  # fmt: skip


if __name__ == "__main__":
    # Read by the allocator when the process begins.
    if "--keep-memory" in sys.argv and any(os.environ.get(n) != v for n, v in MALLOC.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **MALLOC})
    sys.exit(main())
