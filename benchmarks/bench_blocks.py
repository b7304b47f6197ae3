"""Suite `blocks`: the fused element-wise ops of a transformer block beside diffusers' modules.

    python benchmarks/bench_blocks.py                  # this machine's GPU
    python benchmarks/bench_blocks.py --smoke          # seconds, on the CPU; checks that it runs

Cases: an op, a model at 512 x 512 with its own tokens, a batch, and what is run: `forward` as in a
rollout (no gradient), or `both` passes, with the gradients that adapters need (of tokens, not of
modulation or weights). In bfloat16 on a GPU, in float32 on a CPU.

    norm    LN(x) (1 + scale) + shift on all tokens; norm-second: two outputs, as in SD3.5-medium
    gate    x + gate y; gate-second: two branches
    heads   text and image queries: concatenation, RMSNorm of each head, rotary (FLUX)

Providers: `ours`, `eager` (diffusers' modules and functions), `compile` (those as one compiled
graph) and `ceiling`, a copy of as many bytes as must move: per element forward 2 (norm, heads) or 3
(norm-second, gate; gate-second 4) reads and writes, backward 3 (norm, heads), 4 (norm-second), 2
(gate), 3 (gate-second). On a GPU each is a replayed CUDA graph over several buffer sets, together
larger than the L2 cache, and providers take turns. `time` is the median of a call, `bandwidth` of
those bytes.
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
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.normalization import RMSNorm
from torch import Tensor

from flowgrpo_kernels.blocks import gated_residual, joint_heads, norm_modulate
from measuring import memory, timers
from measuring.timing import Options, Timing, matches
from reporting import records


class Model(NamedTuple):
    """Sizes of a model, tokens of both streams in its order, and the ops that it has."""

    tokens: tuple[int, int]
    width: int
    heads: int
    rotary: bool
    ops: tuple[str, ...]


SECOND = ("norm", "norm-second", "gate", "gate-second", "heads")
MODELS = {
    "sd3.5-m": Model((1024, 333), 1536, 24, False, SECOND),
    "flux.1-dev": Model((512, 1024), 3072, 24, True, ("norm", "gate", "heads")),
}
SMOKE = {
    "tiny-sd3": Model((16, 5), 48, 3, False, SECOND),
    "tiny-flux": Model((5, 16), 32, 2, True, ("norm", "gate", "heads")),
}
PROVIDERS = ("ours", "eager", "compile", "ceiling")
BATCHES = (16, 1, 8)
# Accesses of an element: forward, backward.
ACCESSES = {
    "norm": (2, 3),
    "norm-second": (3, 4),
    "gate": (3, 2),
    "gate-second": (4, 3),
    "heads": (2, 3),
}


class Case(NamedTuple):
    """An op on a model's tokens at one batch size, forward or both passes."""

    op: str
    name_of_model: str
    model: Model
    batch: int
    backward: bool

    @property
    def name(self) -> str:
        what = "both" if self.backward else "forward"
        return f"{self.op} {self.name_of_model} b{self.batch} {what}"

    def bytes(self, dtype: torch.dtype) -> int:
        """Bytes that must move, by ACCESSES."""
        elements = self.batch * sum(self.model.tokens) * self.model.width
        return elements * dtype.itemsize * sum(ACCESSES[self.op][: 1 + self.backward])


class Buffers:
    """Tensors that a case reads, and a copy of as many bytes as it moves."""

    def __init__(self, case: Case, device: str, dtype: torch.dtype, seed: int) -> None:
        g = torch.Generator(device).manual_seed(seed)
        model, size = case.model, case.model.width // case.model.heads

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, device=device).to(dtype)

        def tokens(count: int) -> Tensor:
            return normal(case.batch, count, model.width).requires_grad_(case.backward)

        # Views of one modulation tensor, as the models make them.
        self.rows = normal(case.batch, 9 * model.width).chunk(9, dim=1)
        if case.op == "heads":
            self.leaves = [tokens(count) for count in model.tokens]
        else:
            self.leaves = [tokens(sum(model.tokens)) for _ in range(ACCESSES[case.op][0] - 1)]
        if case.op.startswith("norm"):
            del self.leaves[1:]
        self.norm = torch.nn.LayerNorm(model.width, elementwise_affine=False, eps=1e-6)
        self.rms = [RMSNorm(size, 1e-6).to(device, dtype).requires_grad_(False) for _ in range(2)]
        angle = torch.randn(sum(model.tokens), size // 2, generator=g, device=device)
        angle = angle.repeat_interleave(2, 1)
        self.rotary = (angle.cos(), angle.sin()) if model.rotary else None
        source = torch.zeros(case.bytes(dtype) // 2, dtype=torch.uint8, device=device)
        self.copy = (torch.empty_like(source), source)
        outputs = ours(case, self)
        self.cotangents = [normal(*output.shape) for output in outputs]


def ours(case: Case, b: Buffers) -> tuple[Tensor, ...]:
    """The fused op of a case."""
    scale, shift, scale2, shift2, *_ = b.rows
    second = case.op.endswith("second")
    if case.op.startswith("norm"):
        pair = (scale2, shift2) if second else None
        outputs = norm_modulate(b.leaves[0], scale, shift, second=pair)
        return outputs if second else (outputs,)
    if case.op.startswith("gate"):
        pair = (shift, b.leaves[2]) if second else None
        return (gated_residual(b.leaves[0], scale, b.leaves[1], second=pair),)
    weights = [norm.weight for norm in b.rms]
    return (joint_heads(b.leaves, weights, heads=case.model.heads, rotary=b.rotary),)


def eager(case: Case, b: Buffers) -> tuple[Tensor, ...]:
    """The ops in diffusers' AdaLayerNorm modules, transformer blocks and attention processors."""
    scale, shift, scale2, shift2, *_ = b.rows
    if case.op.startswith("norm"):
        h = b.norm(b.leaves[0])
        y = h * (1 + scale[:, None]) + shift[:, None]
        if case.op == "norm":
            return (y,)
        return y, h * (1 + scale2[:, None]) + shift2[:, None]
    if case.op.startswith("gate"):
        out = b.leaves[0] + scale.unsqueeze(1) * b.leaves[1]
        return (out if case.op == "gate" else out + shift.unsqueeze(1) * b.leaves[2],)
    heads = [tokens.unflatten(-1, (case.model.heads, -1)) for tokens in b.leaves]
    joined = torch.cat([norm(h) for norm, h in zip(b.rms, heads, strict=True)], dim=1)
    return (joined if b.rotary is None else apply_rotary_emb(joined, b.rotary, sequence_dim=1),)


def providers(case: Case, compiled: bool) -> dict[str, Callable[[Buffers], None]]:
    """Name -> one call on a buffer set, with its backward pass where the case has one."""

    def run(function) -> Callable[[Buffers], None]:
        def call(b: Buffers) -> None:
            if case.backward:
                torch.autograd.grad(function(case, b), b.leaves, b.cotangents)
            else:
                with torch.no_grad():
                    function(case, b)

        return call

    calls = {"ours": run(ours), "eager": run(eager)}
    if compiled:
        torch._dynamo.reset()
        calls["compile"] = run(torch.compile(eager, fullgraph=True, dynamic=False))
    calls["ceiling"] = lambda b: b.copy[0].copy_(b.copy[1])
    return calls


def dtype_on(device: str) -> torch.dtype:
    """The dtype of the tokens: float32 on a CPU, whose bfloat16 may be emulated."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def ready(case: Case, device: str, names: Sequence[str]) -> dict[str, timers.Timed]:
    """Make buffers and warm up some providers; one more round of each."""
    dtype = dtype_on(device)
    count = min(16, max(2, 250_000_000 // case.bytes(dtype))) if device == "cuda" else 2
    sets = [Buffers(case, device, dtype, seed) for seed in range(count)]
    calls = providers(case, "compile" in names)
    return timers.rotating({name: calls[name] for name in names}, sets, device, PROVIDERS)


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark."""
    names = tuple(name for name in PROVIDERS if options.compiled or name != "compile")
    return [
        Timing(case.name, names, functools.partial(ready, case, options.device))
        for case in cases(options.smoke, "")
    ]


def test_blocks(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def time_rows(case: Case, device: str, rounds: int, compiled: bool) -> list[dict]:
    """Rows of a case's times and bandwidths."""
    names = [name for name in PROVIDERS if compiled or name != "compile"]
    times = timers.take_turns(ready(case, device, names), rounds)
    moved = case.bytes(dtype_on(device))
    rows, line = [], []
    for name, values in times.items():
        t = statistics.median(values)
        rows.append(records.row("blocks", case.name, name, "time", t * 1e6, "us"))
        rows.append(records.row("blocks", case.name, name, "bandwidth", moved / t / 1e9, "GB/s"))
        line.append(f"{name} {t * 1e6:.1f}")
    print(f"{case.name:36s} {'  '.join(line)} us", flush=True)
    return rows


def cases(smoke: bool, pattern: str) -> list[Case]:
    """Cases whose name contains one of the comma-separated texts of `pattern`. The largest batch
    comes first: a limit of time cuts off the others."""
    models, batches = (SMOKE, (2,)) if smoke else (MODELS, BATCHES)
    every_case = [
        Case(op, name, model, batch, backward)
        for batch in batches
        for name, model in models.items()
        for op in model.ops
        for backward in (False, True)
    ]
    return [case for case in every_case if matches(case.name, pattern)]


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--rounds", type=int, default=20, help="timed calls of each provider")
    parser.add_argument("--cases", default="", help="only cases whose name contains one of these")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument(
        "--compile-cases", default="", help="compile only cases whose name contains this"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds; no case begins after them"
    )
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, two rounds, no compile")
    parser.add_argument("--out", type=Path, help="default: results/blocks-<device>.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    chosen = cases(args.smoke, args.cases)
    if not chosen:
        raise SystemExit(f"--cases {args.cases!r} matches no case")
    out = records.output_path("blocks", args)

    def rows_of(case: Case) -> list[dict]:
        compiled = not (args.smoke or args.no_compile) and args.compile_cases in case.name
        try:
            return time_rows(case, args.device, 2 if args.smoke else args.rounds, compiled)
        finally:
            memory.release(args.device)

    return records.record_cases(chosen, rows_of, out, args.device, args.budget)


if __name__ == "__main__":
    sys.exit(main())
