"""Suite `launch`: the host's part of a GPU kernel, compiled against Triton's JIT, without a GPU.

    python benchmarks/bench_launch.py               # under a minute; writes results/launch.json

Over a stand-in for the driver (measuring/stub_driver.py) whose calls take no time, so what is
measured is what each path does itself. Nothing runs on a GPU, and the driver's own share, which is
the same for both, is in none of the figures: about what a real driver takes to load a binary and to
launch says nothing here.

    cold start   seconds and work of the first sde_step, and of the first grpo_loss with its
                 gradient, in a process that has imported everything: an empty cache of Triton's
                 against the packs. JIT: kernels compiled, and its launcher in C.
    host         microseconds of a launch of sde_step's kernel with 16 arguments, called again and
                 again, and of the op around it; `ctypes`: without the native library.

Needs cc, Python's headers and Triton.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    # Before Triton is imported: its JIT, not its interpreter.
    os.environ["TRITON_INTERPRET"] = "0"

import torch

from flowgrpo_kernels import Transitions, flow_sde, grpo_loss, sde_step
from flowgrpo_kernels.backends import compiled, cuda_driver, dispatch, triton
from flowgrpo_kernels.sde_step import sde_step_kernel
from measuring import stub_driver
from measuring.timers import Timed, take_turns
from measuring.timing import Options, Timing
from reporting import records

PATH = records.RESULTS / "launch.json"
ROWS, SHAPE = 4, (16, 64, 64)
CALLS, ROUNDS = 200, 41
CASES, PROVIDERS = ("launch", "sde_step"), ("triton", "ours", "ours ctypes")


def inputs() -> dict[str, torch.Tensor]:
    """A batch in a trainer's dtypes, with guidance."""
    x = torch.zeros(ROWS, *SHAPE)
    v = x.bfloat16()
    return {
        "velocity": v, "uncond": v.clone(), "sample": x, "next": x.clone(),
        "rows": torch.zeros(ROWS), "seeds": torch.zeros(ROWS, dtype=torch.int64),
    }  # fmt: skip


def first_step(b: dict[str, torch.Tensor]) -> None:
    """A guided step of a rollout."""
    sde_step(
        b["velocity"], b["sample"], flow_sde([1.0, 0.5, 0.0]), 0, seeds=b["seeds"],
        uncond_velocity=b["uncond"], guidance_scale=4.5,
    )  # fmt: skip


def first_loss(b: dict[str, torch.Tensor]) -> None:
    """A micro-step with the KL term."""
    v = b["velocity"].clone().requires_grad_()
    loss = grpo_loss(
        v, b["sample"], b["next"], b["rows"], b["rows"], flow_sde([1.0, 0.5, 0.0]), 0,
        ref_velocity=b["uncond"], kl_weight=0.01,
    ).loss  # fmt: skip
    torch.autograd.grad(loss, v, torch.ones(()))


def cold(provider: str, library: Path) -> None:
    """Prints seconds of the first calls of a process, and what they loaded."""
    b, counts = inputs(), {}
    torch.set_num_threads(1)
    # Torch's own first calls are not of interest.
    with dispatch.use_backend("reference"):
        first_step(b)
        first_loss(b)
    stub, launch = stub_driver.Stub(library), compiled.launch
    # As torch leaves it.
    stub.set_device(0)
    tensors = stub.tensors_of("cpu")
    start = time.perf_counter()
    if provider == "triton":
        from measuring import stub_triton

        # Triton's launcher takes any address. It is compiled here.
        stub_triton.install(library)
        launch, tensors = triton.launch, contextlib.nullcontext()
    with tensors, dispatch.use_launch(launch):
        begun = time.perf_counter()
        first_step(b)
        stepped = time.perf_counter()
        first_loss(b)
        done = time.perf_counter()
    counts = {
        "launcher": begun - start, "step": stepped - begun, "loss": done - stepped,
        "loaded": stub.modules(), "launched": len(stub.launches()),
    }  # fmt: skip
    print(json.dumps(counts))


def cold_start(provider: str, library: Path) -> dict[str, float]:
    """The figures of `cold` in a process of its own, with an empty cache of Triton's."""
    with tempfile.TemporaryDirectory() as cache:
        env = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, __file__, "--cold", provider, "--library", str(library)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        kernels = list(Path(cache).rglob("*.cubin"))
    return json.loads(done.stdout) | {"compiled": len(kernels)}


PROGRAMS = ROWS * 16 * triton.PARTS


def kernel_arguments(
    b: dict[str, torch.Tensor], transitions: Transitions
) -> tuple[tuple, tuple, dict]:
    """(tensors, numbers, constants) of a launch of sde_step's kernel, in PROGRAMS programs."""
    step = transitions.row_numbers[0].expand(ROWS)
    sums = torch.empty(PROGRAMS)
    tensors = (
        b["velocity"], b["uncond"], b["sample"], None, b["next"], sums, transitions.table, step,
        b["seeds"], None, None,
    )  # fmt: skip
    numbers = (4.5, 65536, transitions.num_steps, 0, 16)
    constants = dict(
        ALIGN=16, GUIDED=True, NOISE="seeds", SINGLE=False, SPLIT=True, MEAN=False, X0=False,
        **triton.LAUNCH,
    )  # fmt: skip
    return tensors, numbers, constants


class Ways(NamedTuple):
    """The ways that a launch can go, over a stub that is loaded."""

    stub: stub_driver.Stub
    calls: dict[str, Callable]
    """Case -> a call by the launch that it is given."""
    launches: dict[str, tuple]
    """Provider -> (launch of a kernel, launch of the driver)."""


@functools.cache
def ways(library: Path) -> Ways:
    """Load the stub, which stays in the process, and make the arguments once."""
    from measuring import stub_triton

    stub = stub_driver.Stub(library)
    stub.set_device(0)
    stub_triton.install(library)
    b, transitions = inputs(), flow_sde([1.0, 0.5, 0.0])
    tensors, numbers, constants = kernel_arguments(b, transitions)

    def kernel(launch) -> None:
        launch(sde_step_kernel, PROGRAMS, tensors, numbers, **constants)

    def op(launch) -> None:
        sde_step(
            b["velocity"], b["sample"], transitions, 0, seeds=b["seeds"],
            uncond_velocity=b["uncond"], guidance_scale=4.5, out=b["next"],
        )  # fmt: skip

    driver = cuda_driver.load()
    launches = {
        "triton": (triton.launch, driver.launch),
        "ours": (compiled.launch, driver.launch),
        "ours ctypes": (compiled.launch, driver.launch_by_ctypes),
    }
    return Ways(stub, {"launch": kernel, "sde_step": op}, launches)


def ready(case: str, names: Sequence[str]) -> dict[str, Timed]:
    """Warm up some providers: seconds of a call on the host, each the mean of CALLS calls."""
    stub, calls, launches = ways(stub_driver.build())
    call = calls[case]

    def timed(name: str) -> float:
        driver = cuda_driver.load()
        before, (launch, driver.launch) = driver.launch, launches[name]
        compiled.forget_plans()
        try:
            with stub.tensors_of("cpu"), dispatch.use_launch(launch):
                call(launch)
                stub.record(False)
                start = time.perf_counter()
                for _ in range(CALLS):
                    call(launch)
                return (time.perf_counter() - start) / CALLS
        finally:
            stub.record(True)
            driver.launch = before

    for name in names:
        timed(name)
    return {name: functools.partial(timed, name) for name in names}


def timings(options: Options) -> list[Timing]:
    """Cases for pytest-benchmark: the host's part, where no driver is that the stub would hide."""
    if options.device != "cpu" or stub_driver.missing():
        return []
    return [Timing(case, PROVIDERS, functools.partial(ready, case), threads=1) for case in CASES]


def test_launch(hand_over) -> None:
    """Under pytest-benchmark: each case and provider."""
    hand_over()


def host_times() -> dict[str, dict[str, float]]:
    """{case: {provider: microseconds}}, providers in turns, medians of the rounds."""
    torch.set_num_threads(1)
    return {
        case: {
            provider: 1e6 * statistics.median(values)
            for provider, values in take_turns(ready(case, PROVIDERS), ROUNDS).items()
        }
        for case in CASES
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, default=PATH)
    parser.add_argument("--cold", choices=["triton", "ours"], help=argparse.SUPPRESS)
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.cold:
        cold(args.cold, args.library)
        return 0
    library, rows = stub_driver.build(), []
    seconds = {}
    for provider in ("triton", "ours"):
        figures = cold_start(provider, library)
        seconds[provider] = figures["launcher"] + figures["step"] + figures["loss"]
        for part in ("launcher", "step", "loss"):
            case = f"cold start {part}"
            rows.append(records.row("launch", case, provider, "seconds", figures[part], "s"))
        for count in ("compiled", "loaded", "launched"):
            row = records.row("launch", "cold start", provider, count, figures[count], "kernels")
            rows.append(row)
    ratio = seconds["triton"] / seconds["ours"]
    rows.append(records.row("launch", "cold start", "ours", "times faster", ratio, "ratio"))
    print(f"cold start: {seconds['triton']:.2f} s by the JIT, {seconds['ours']:.4f} s compiled")
    for case, figures in host_times().items():
        for provider, micros in figures.items():
            rows.append(records.row("launch", case, provider, "host", micros, "us"))
            ratio = figures["triton"] / micros
            if provider != "triton":
                rows.append(records.row("launch", case, provider, "times faster", ratio, "ratio"))
            print(f"{case}: {provider} {micros:.2f} us, {ratio:.1f} times")
    content = records.record(rows, "cpu", note="over a stub of the driver: no GPU was used")
    records.write(content, args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
