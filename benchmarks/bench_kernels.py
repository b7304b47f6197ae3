"""Suites `kernels` and `memory`: the fused step and losses beside the peers' eager code.

    python benchmarks/bench_kernels.py                  # this machine, all shapes
    python benchmarks/bench_kernels.py --smoke          # seconds; checks that everything runs
    python benchmarks/bench_kernels.py --device cuda --large
    python benchmarks/bench_kernels.py --memory         # suite memory: bytes of tensors of one call

Cases: `step` (one rollout step), `step-cfg` (with guidance), `loss` (forward and backward),
`loss-kl` (with a reference velocity), and `nft` and `nft-kl`, the same of DiffusionNFT's loss.
Providers: `ours` (native on the CPU, Triton in a replayed graph on a GPU), `ours-loop` (GPU: called
from Python), `reference` (our PyTorch fallback), `eager` (flow_grpo_ops.py, which looks up one
timestep for a rollout step and one a row for a loss; diffusion_nft_ops.py), `compile` (its
arithmetic as one compiled graph) and `ceiling`, a copy that moves the bytes that the op must move.

Bytes that must move, per element (v velocity, x sample and prev_sample, in bytes of their dtypes):
    step      v + x + x                 step-cfg  2 v + x + x
    loss      forward v + 2 x, backward v + 2 x + v;     loss-kl   2 v more
    nft       forward 2 v + 2 x, backward 2 v + 2 x + v;    nft-kl    2 v more
(the row's ratio must be known before its gradient, so both passes read; the native backend reads
once, since a row of this size stays in the cache, and may exceed the copy). Every call works on
another of several buffer sets, together larger than the caches, and providers are interleaved call
by call. `time` is the median and `best` the shortest call (on a busy machine the steadier of the
two); `bandwidth` is of the median; `kernels` (GPU, batch 16) counts the launches of one call.
Suite `memory`: `peak`, the most bytes of tensors that one call has at a time beyond its arguments.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from flowgrpo_kernels import (
    Transitions,
    backend_info,
    flow_sde,
    grpo_loss,
    log_prob,
    nft_loss,
    sde_step,
)
from flowgrpo_kernels.backends import dispatch
from measuring import memory, profiles, timers
from measuring.timing import Options, Timing, matches
from providers import diffusion_nft_ops, flow_grpo_ops
from reporting import records

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {
    "sd3-512": ((16, 64, 64), (16, 1, 64, 4, 9)),
    "flux-512": ((1024, 64), (16, 1, 4)),
    "video": ((16, 9, 60, 104), (1,)),
}
SMOKE_SHAPES = {"sd3-512": ((16, 64, 64), (1,)), "odd": ((3, 7, 11), (2,))}
# 2 GiB and more are moved by every op: 16 x 64 x 64 x 4 bytes x 3 tensors x 2750 rows = 2.01 GiB.
LARGE_SHAPES = {"large": ((16, 64, 64), (2752,))}
OPS = ("step", "step-cfg", "loss", "loss-kl", "nft", "nft-kl")
SIGMAS = torch.tensor([1 - i / 10 for i in range(11)], dtype=torch.float64)
STEP, SCALE, BETA = 4, 4.5, 0.04
# The bound of DiffusionNFT's advantages, which its code also multiplies the loss by.
NFT_CLIP = 5.0


class Case(NamedTuple):
    """An op on latents of one shape, batch size and pair of dtypes."""

    op: str
    model: str
    shape: tuple[int, ...]
    batch: int
    velocity: str
    sample: str

    @property
    def name(self) -> str:
        return f"{self.op} {self.model} b{self.batch} {self.velocity}/{self.sample}"

    @property
    def bytes(self) -> int:
        """Bytes that must move, by the table above."""
        v, x = DTYPES[self.velocity].itemsize, DTYPES[self.sample].itemsize
        per_element = {
            "step": v + 2 * x,
            "step-cfg": 2 * v + 2 * x,
            "loss": 3 * v + 4 * x,
            "loss-kl": 5 * v + 4 * x,
            "nft": 5 * v + 4 * x,
            "nft-kl": 7 * v + 4 * x,
        }[self.op]
        return per_element * self.batch * torch.Size(self.shape).numel()


@functools.cache
def tables(device: str) -> tuple[Transitions, flow_grpo_ops.Scheduler]:
    """Our table of transitions and flow_grpo's scheduler."""
    return flow_sde(SIGMAS, 0.7).to(device), flow_grpo_ops.Scheduler(SIGMAS.to(device))


class Buffers:
    """Tensors that a case reads and writes, and a copy of as many bytes as it moves."""

    def __init__(self, case: Case, device: str, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        shape = (case.batch, *case.shape)

        def normal(dtype: str) -> torch.Tensor:
            return torch.randn(shape, generator=g, device=device).to(DTYPES[dtype])

        self.velocity = normal(case.velocity)
        self.other = normal(case.velocity) if case.op in ("step-cfg", "loss-kl", "nft-kl") else None
        self.sample = normal(case.sample)
        self.out = torch.empty_like(self.sample)
        self.scores = torch.empty(case.batch, device=device)
        self.seeds = torch.arange(case.batch, device=device) + seed
        self.step = torch.full((case.batch,), STEP, device=device)
        self.advantages = torch.linspace(-2, 2, case.batch, device=device)
        self.transitions, self.scheduler = tables(device)
        self.timestep = self.scheduler.timesteps[STEP].repeat(case.batch)
        self.prev, _ = sde_step(
            self.velocity, self.sample, self.transitions, self.step, seeds=self.seeds
        )
        self.old = log_prob(self.velocity, self.sample, self.prev, self.transitions, self.step)
        if case.op.startswith("nft"):
            # prev stands for x0, and sample for x_t: their values cost no time.
            self.old_velocity = normal(case.velocity)
            self.sigma = torch.linspace(0.1, 0.9, case.batch, device=device)
            self.optimality = self.advantages / NFT_CLIP / 2 + 0.5
            self.row_weight = torch.full_like(self.sigma, NFT_CLIP)
            self.kl_row_weight = torch.ones_like(self.sigma)
        if not case.op.startswith("step"):
            self.velocity = (self.velocity * 1.001).requires_grad_()
        source = torch.zeros(max(case.bytes // 2, 1), dtype=torch.uint8, device=device)
        self.copy = (torch.empty_like(source), source)


def ours(case: Case, b: Buffers) -> None:
    """One call of the fused op."""
    if case.op.startswith("step"):
        guidance = {} if b.other is None else {"uncond_velocity": b.other, "guidance_scale": SCALE}
        sde_step(
            b.velocity, b.sample, b.transitions, b.step,
            seeds=b.seeds, out=b.out, log_prob_out=b.scores, **guidance,
        )  # fmt: skip
        return
    kl = {} if b.other is None else {"ref_velocity": b.other, "kl_weight": BETA}
    if case.op.startswith("nft"):
        out = nft_loss(
            b.velocity, b.sample, b.prev, b.old_velocity, b.sigma, b.optimality,
            row_weight=b.row_weight, kl_row_weight=b.kl_row_weight, **kl,
        )  # fmt: skip
        torch.autograd.grad(out.loss, b.velocity)
        return
    out = grpo_loss(b.velocity, b.sample, b.prev, b.old, b.advantages, b.transitions, b.step, **kl)
    torch.autograd.grad(out.loss, b.velocity)


class Peers(NamedTuple):
    """The arithmetic of the peers' code, as it is or compiled."""

    guided: Callable = flow_grpo_ops.guided
    micro_step: Callable = flow_grpo_ops.micro_step
    nft_micro_step: Callable = diffusion_nft_ops.micro_step

    def compiled(self) -> Peers:
        """Each as one graph."""
        return Peers(*(torch.compile(f, fullgraph=True, dynamic=False) for f in self))


def eager(case: Case, b: Buffers, peers: Peers) -> None:
    """One call of flow_grpo's or DiffusionNFT's code."""
    if case.op.startswith("nft"):
        loss, _ = peers.nft_micro_step(
            b.velocity, b.sample, b.prev, b.old_velocity, b.sigma, b.advantages, b.other,
            BETA if b.other is not None else 0.0, adv_clip=NFT_CLIP,
        )  # fmt: skip
        torch.autograd.grad(loss, b.velocity)
        return
    if case.op.startswith("step"):
        with torch.no_grad():
            # In a rollout all rows are at one step: flow_grpo hands over one timestep.
            sigmas = b.scheduler.lookup(b.timestep[:1], b.sample.ndim)
            peers.guided(sigmas, b.velocity, b.other, SCALE, b.sample)
        return
    loss, _ = flow_grpo_ops.loss(
        b.scheduler, b.velocity, b.timestep, b.sample, b.prev, b.old, b.advantages, b.other,
        BETA if b.other is not None else 0.0, peers.micro_step,
    )  # fmt: skip
    torch.autograd.grad(loss, b.velocity)


def providers(case: Case, device: str, compiled: bool) -> dict[str, Callable[[Buffers], None]]:
    """Name -> one call on a buffer set."""

    def with_backend(name: str, b: Buffers) -> None:
        with dispatch.use_backend(name):
            ours(case, b)

    calls = {
        "ours": lambda b: ours(case, b),
        "reference": lambda b: with_backend("reference", b),
        "eager": lambda b: eager(case, b, Peers()),
        "ceiling": lambda b: b.copy[0].copy_(b.copy[1]),
    }
    if device == "cuda":
        calls["ours-loop"] = calls["ours"]
    if compiled:
        torch._dynamo.reset()
        peers = Peers().compiled()
        calls["compile"] = lambda b: eager(case, b, peers)
    return calls


def names_of_providers(case: Case, device: str, compiled: bool) -> list[str]:
    """Providers that are timed in a case."""
    # At the large shape the reference's float64 temporaries and int64 words do not fit beside the
    # buffers.
    small = case.bytes <= 1 << 30
    chosen = {"reference": small, "ours-loop": device == "cuda", "compile": compiled}
    names = ("ours", "reference", "eager", "ceiling", "ours-loop", "compile")
    return [name for name in names if chosen.get(name, True)]


def ready(case: Case, device: str, names: Sequence[str]) -> dict[str, timers.Timed]:
    """Make buffers and warm up some providers; one more round of each."""
    sets = [Buffers(case, device, seed) for seed in range(timers.buffer_sets(case.bytes, device))]
    calls = providers(case, device, "compile" in names)
    return timers.rotating({name: calls[name] for name in names}, sets, device)


def limit(device: str) -> float:
    """Seconds for a provider: called from Python on a GPU it takes long at the large shape."""
    return timers.LOOP_SECONDS if device == "cuda" else float("inf")


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark: all shapes but the large one."""
    return [
        Timing(
            case.name, tuple(names_of_providers(case, options.device, options.compiled)),
            functools.partial(ready, case, options.device), limit=limit(options.device),
        )
        for case in cases(SMOKE_SHAPES if options.smoke else SHAPES, "")
    ]  # fmt: skip


def test_kernels(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def time_rows(case: Case, device: str, rounds: int, compiled: bool, reference: bool) -> list[dict]:
    """Rows of a case's times and bandwidths, and on a GPU of its kernels."""
    names = names_of_providers(case, device, compiled)
    if not reference:
        names.remove("reference")
    timed = ready(case, device, names)
    times = timers.take_turns(timed, rounds, limit(device))
    rows, seconds = [], {}
    for name, values in times.items():
        seconds[name] = s = statistics.median(values)
        rows.append(records.row("kernels", case.name, name, "time", s * 1e6, "us"))
        rows.append(records.row("kernels", case.name, name, "best", min(values) * 1e6, "us"))
        gb = case.bytes / s / 1e9
        rows.append(records.row("kernels", case.name, name, "bandwidth", gb, "GB/s"))
    if device == "cuda" and case.batch == 16:
        calls, b = providers(case, device, compiled=False), Buffers(case, device, 0)
        for name in ("ours", "eager"):
            # A fresh call, not the replay: a graph's kernels would count as one launch.
            count = profiles.record(lambda n=name: calls[n](b), device).kernels
            rows.append(records.row("kernels", case.name, name, "kernels", count, "kernels"))
    speed = seconds["eager"] / seconds["ours"]
    best = min(times["eager"]) / min(times["ours"])
    share = seconds["ceiling"] / seconds["ours"]
    line = "  ".join(f"{n} {s * 1e6:.0f}" for n, s in seconds.items())
    print(f"{case.name:42s} {line} us", flush=True)
    print(f"{'':42s} eager/ours {speed:.1f} (best calls {best:.1f}), ceiling/ours {share:.2f}")
    return rows


def memory_rows(case: Case, device: str) -> list[dict]:
    """Rows of the bytes of one call's tensors, providers one after another."""
    b = Buffers(case, device, 0)
    calls = providers(case, device, compiled=False)
    rows, line = [], []
    for name in ("ours", "eager"):
        calls[name](b)
        peak = memory.tensor_peak(lambda n=name: calls[n](b), device)
        rows.append(records.row("memory", case.name, name, "peak", peak, "bytes"))
        elements = case.batch * torch.Size(case.shape).numel()
        line.append(f"{name} {peak / elements:.1f}")
    print(f"{case.name:42s} {'  '.join(line)} bytes an element", flush=True)
    return rows


def cases(shapes: dict, pattern: str) -> list[Case]:
    """Cases whose name contains one of the comma-separated texts of `pattern`."""
    every_case = []
    for model, (shape, batches) in shapes.items():
        for batch in batches:
            dtypes = [("float32", "float32")]
            if batch == 16:
                dtypes.append(("bfloat16", "float32"))
            for op in OPS:
                every_case += [Case(op, model, shape, batch, v, x) for v, x in dtypes]
    return [c for c in every_case if matches(c.name, pattern)]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--rounds", type=int, default=30, help="timed calls of each provider")
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these")
    parser.add_argument("--large", action="store_true", help="add a shape that moves 2 GiB")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-cases", default="", help="compile only cases whose name contains this"
    )
    parser.add_argument("--no-reference", action="store_true", help="leave our fallback out")
    parser.add_argument("--memory", action="store_true", help="suite memory instead of kernels")
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; no case begins after them"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, two rounds, no compile")
    parser.add_argument("--out", type=Path, help="default: results/SUITE-<device>.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    # The large one first: what a budget cuts off are the last.
    shapes = SMOKE_SHAPES if args.smoke else (LARGE_SHAPES if args.large else {}) | SHAPES
    rounds = 2 if args.smoke else args.rounds
    chosen = cases(shapes, args.cases)
    if not chosen:
        raise SystemExit(f"--cases {args.cases!r} matches no case")
    print(f"{records.cpu_name()}; {torch.get_num_threads()} threads; {backend_info()['ops']}")
    out = records.output_path("kernels-memory" if args.memory else "kernels", args)

    def rows_of(case: Case) -> list[dict]:
        compiled = not (args.smoke or args.no_compile) and args.compile_cases in case.name
        try:
            if args.memory:
                return memory_rows(case, args.device)
            return time_rows(case, args.device, rounds, compiled, not args.no_reference)
        finally:
            memory.release(args.device)

    facts = {"threads": torch.get_num_threads(), "backends": backend_info()["backends"]}
    return records.record_cases(chosen, rows_of, out, args.device, args.budget, **facts)


if __name__ == "__main__":
    sys.exit(main())
