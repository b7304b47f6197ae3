"""A session on a GPU machine in three calls of at most five minutes, the most valuable first.

    python benchmarks/run_all.py --call 1 --out DIR --wheels WHEELS    # then --call 2, --call 3
    python benchmarks/run_all.py --call 1 --out DIR --parts nano       # goes on with a part
    python benchmarks/run_all.py --smoke --out DIR                  # all calls, tiny, on the CPU

Call 1: the packages are installed; compiled kernels against Triton's bit for bit, and capture;
share of the copy bandwidth at the large and SD3.5's shapes; nano's whole default run; the other
GPU tests.
Call 2: SD3.5-M, random weights of the real size made on the device: a captured rollout beside
flow_grpo's, an update with max_ratio_error, an iteration with and without KL, peak memory.
Call 3: torch.compile, fused blocks, FLUX.1-dev, compute-sanitizer.
Call `more`, when there is time left: memory of the ops, profiles, the loss in one pass.

Needs a Python with PyTorch for CUDA, Triton, transformers, peft, accelerate, pytest,
pytest-benchmark and nvidia-ml-py; what else is missing may lie as wheels in a folder (--wheels;
README.md collects them). Nothing is downloaded. A part has a budget of seconds, and what the parts
before it have left of theirs; one that overruns is ended and noted, compilers included, one that
fails is noted, and the next one runs. No part begins that --total, the limit of a call, has no time
for. DIR gets the records (each is finished after each case), a log of each part, the tests' results
as JUnit's XML, and summary.json; --archive packs it, anew after each part. Exit code 1 if a part of
this call did not pass.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import sys
import time
from importlib import metadata
from pathlib import Path

from measuring import parts as running
from measuring.parts import Part, Summary

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MARK = "pytest.mark.gpu"
"""Text in the files that have tests for a GPU."""
BITS = "compiled_gives_the_bits or captur or synchronis or eager_bits or waits_for_the_gpu"
"""Tests that come first."""
Words = tuple[str, ...]
LIMIT = 285.0
"""Seconds of a call."""
GEOMETRY = "sd3.5-m t10 b16 no-cfg"


class Plan:
    """Parts of each call, for a GPU or, with --smoke, for a CPU."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, args.out
        self.device = "cpu" if args.smoke else "cuda"

    def calls(self) -> dict[str, list[Part]]:
        """Name of a call -> its parts, in the order in which they run."""
        return {"1": self.first(), "2": self.second(), "3": self.third(), "more": self.more()}

    def part(self, name: str, budget: float, *commands: list[str]) -> Part:
        return Part(name, budget * self.args.scale, list(commands))

    def suite(self, name: str, budget: float, script: str, options: Words, smoke: Words) -> Part:
        """A suite with its options, or those of its smoke form; no case begins in the last fifth of
        its budget."""
        # By name, so that a GPU that PyTorch does not see is no run on the CPU.
        options = (*smoke, "--smoke") if self.args.smoke else options
        record = self.out / f"{name}-{self.device}.json"
        command = [sys.executable, str(HERE / script), "--out", str(record), *options]
        limit = f"{0.8 * budget * self.args.scale:.0f}"
        return self.part(name, budget, [*command, "--device", self.device, "--budget", limit])

    def first(self) -> list[Part]:
        shapes = ("--large", "--cases", "large,sd3-512 b16", "--rounds", "20")
        shapes += ("--no-compile", "--no-reference")
        return [
            self.build(),
            self.tests("bits", 45, BITS),
            self.suite("kernels", 40, "bench_kernels.py", shapes, ("--cases", "odd")),
            self.part("nano", 75, self.nano()),
            self.tests("tests", 70, f"not ({BITS})"),
        ]

    def second(self) -> list[Part]:
        sd3 = ("--cases", "sd3.5-m", "--providers")
        rollout = (*sd3, "ours,ours-loop,eager", "--batch-sizes", "16,1")
        update = (*sd3, "ours,eager,ours-captured", "--batch-sizes", "16", "--alone")
        kl = ("--cases", f"{GEOMETRY} full", "--providers", "ours,eager", "--alone")
        memory = ("--memory", "--cases", f"{GEOMETRY} full kl")
        small, pair = ("--cases", "cfg w2 kl"), ("--providers", "ours,eager", "--cases")
        return [
            self.build(),
            self.suite("rollout", 70, "bench_rollout.py", rollout, ("--cases", "b1 cfg")),
            self.suite("update", 55, "bench_update.py", update, (*pair, "b1 cfg", "--alone")),
            self.suite("iteration", 65, "bench_iteration.py", kl, small),
            self.suite("memory", 40, "bench_iteration.py", memory, ("--memory", *small)),
        ]

    def third(self) -> list[Part]:
        # Alone, since making a baseline drops what was compiled before it.
        compiled = ("--alone", "--cases", GEOMETRY, "--providers")
        rollout = (*compiled, "ours,ours-compiled,ours-fused,eager,compile")
        update = (*compiled, "ours,ours-compiled,ours-fused,eager")
        blocks = ("--no-compile", "--cases", "b16")
        # 24 GB in bf16, 48 in float32: not all providers at once.
        flux = ("--cases", "flux.1-dev", "--alone", "--providers", "ours,ours-fused,eager")
        one, fused = ("--providers", "ours", "--cases"), ("--providers", "ours-fused", "--cases")
        return [
            self.build(),
            self.suite(
                "compiled-rollout", 65, "bench_rollout.py", rollout, (*fused, "b1 cfg")
            ),
            self.suite("blocks", 25, "bench_blocks.py", blocks, ("--cases", "tiny-flux")),
            self.suite("rollout-flux", 45, "bench_rollout.py", flux, (*one, "tiny-flux")),
            self.suite("update-flux", 35, "bench_update.py", flux, (*one, "tiny-flux")),
            self.sanitizer(),
            self.suite("compiled-update", 30, "bench_update.py", update, (*fused, "b1 cfg")),
        ]  # fmt: skip

    def more(self) -> list[Part]:
        # One after the other, so that a part that is stopped has the first ones.
        profile = ("--profile", "--cases", GEOMETRY, "--alone", "--providers")
        profile += ("ours,eager,ours-fused",)
        tiny = ("--profile", "--cases", "b1 cfg", "--providers", "ours")
        odd, memory = ("--cases", "odd"), ("--memory",)
        parts = [
            self.build(),
            self.suite("kernels-memory", 15, "bench_kernels.py", memory, (*memory, *odd)),
            self.suite("kernels-all", 60, "bench_kernels.py", ("--no-compile",), odd),
            self.suite("profile-rollout", 40, "bench_rollout.py", profile, tiny),
            self.suite("profile-update", 40, "bench_update.py", profile, tiny),
        ]
        single = [*program("single-pass-loss"), "--out", str(self.out / "single-pass-cuda.json")]
        return parts if self.args.smoke else [*parts, self.part("single-pass", 25, single)]

    def build(self) -> Part:
        """Wheels and packages are installed, and the GPU is asked for its name."""
        doctor = [sys.executable, "-m", "flowgrpo", "doctor"]
        if self.args.smoke:
            return self.part("build", 30, doctor)
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        wheels = sorted(self.args.wheels.glob("*.whl")) if self.args.wheels else []
        # What the machine has fits its other packages.
        missing = [str(wheel) for wheel in wheels if not has(wheel.name.split("-")[0])]
        first = [[*pip, "--no-index", *missing]] if missing else []
        # Without one the tests would all be skipped, and that is no failure.
        gpu = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
        package = [*pip, "--no-build-isolation", str(ROOT)]
        return self.part("build", 45, *first, package, doctor, gpu)

    def nano(self) -> list[str]:
        """Command of the default training run; one that was stopped goes on."""
        folder = self.out / "nano"
        command = [sys.executable, "-m", "flowgrpo", "train"]
        if (folder / "config.json").exists():
            return [*command, "--run.resume", str(folder)]
        command += ["--run.out", str(folder), "--policy.device", self.device]
        if not self.args.smoke:
            return command
        tiny = {"--run.steps": 1, "--run.eval-prompts": 2, "--run.eval-samples": 1}
        tiny |= {"--run.eval-guidance": 1, "--sample.eval-steps": 2, "--sample.batch-size": 2}
        tiny |= {"--sample.prompts-per-iteration": 2, "--sample.group-size": 2}
        return [*command, *(str(word) for pair in tiny.items() for word in pair)]

    def tests(self, name: str, budget: float, expression: str) -> Part:
        """Tests that need a GPU and match an expression of pytest's -k."""
        results = f"--junitxml={self.out / f'{name}.xml'}"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-k", expression, results]
        command += ["-p", "no:cacheprovider", "--tb=short", "--durations=10"]
        folder = ROOT / "tests"
        if self.args.smoke:
            # On a CPU they are all skipped: one file shows that the part runs.
            return self.part(name, budget, [*command, str(folder / "kernels" / "test_gpu.py")])
        # There, or among the wheels that the first part installs.
        wheels = self.args.wheels
        if (wheels and any(wheels.glob("pytest_xdist-*.whl"))) or importlib.util.find_spec("xdist"):
            # Most of their time is Triton's compiler, one core a process.
            command += ["-n", "8", "--dist", "worksteal"]
        # The other files would be imported for nothing, and may want libraries that are not there.
        paths = [p for p in folder.rglob("test_*.py") if MARK in p.read_text(encoding="utf-8")]
        # Kernels and capture before suites and blocks.
        order = ("test_gpu.py", "test_cuda_graphs_gpu.py")
        paths.sort(key=lambda path: (path.name not in order, str(path)))
        return self.part(name, budget, [*command, *map(str, paths)])

    def sanitizer(self) -> Part:
        """Every kernel once under compute-sanitizer."""
        if self.args.smoke:
            return self.part("sanitizer", 30, program("sanitize", "cpu"))
        # CUDA's folder too, which need not be on the PATH.
        path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
        tool = shutil.which("compute-sanitizer", path=path)
        commands = [
            [str(tool), "--tool", name, "--error-exitcode", "1", *program("sanitize")]
            for name in ("memcheck", "racecheck")
        ]
        part = self.part("sanitizer", 40, *commands)
        part.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        part.absent = "" if tool else "there is no compute-sanitizer"
        return part


def has(distribution: str) -> bool:
    """Test whether a package is installed, in whatever version."""
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def program(name: str, *arguments: str) -> list[str]:
    """Command of a program that is no suite."""
    return [sys.executable, str(HERE), name, *arguments]


def use_the_tree() -> None:
    """Import the packages from the tree, where they are not installed: they need no installation,
    and their CPU library, which does, is not needed on a GPU."""
    folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))


def show(done: dict, out: Path, lines: int) -> None:
    """Print the part's result and the end of its log."""
    print(f"== {done['part']}: {done['result']}, {done['seconds']} s", flush=True)
    log = out / f"{done['part']}.log"
    if log.exists():
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(text[-lines:]), flush=True)


def run_call(parts: list[Part], args: argparse.Namespace) -> list[dict]:
    """Run the parts of one call within its limit; their results."""
    start, spare, results = time.monotonic(), 0.0, []
    summary = Summary(args.out)
    for part in parts:
        left = args.total - (time.monotonic() - start) - running.GRACE
        if left < running.GRACE and not part.absent:
            done = {"part": part.name, "result": "not begun: no time left", "seconds": 0.0}
        else:
            summary.begin(part)
            done = running.execute(part, args.out, ROOT, min(part.budget + spare, left))
            # What a part leaves is the next ones': a case that has begun may end.
            spare = max(0.0, spare + part.budget - done["seconds"])
        if part.name == "build" and done["result"].startswith(("failed", "stopped")):
            use_the_tree()
        show(done, args.out, args.lines)
        summary.note(done)
        results.append(done)
        if args.archive:
            # Each time: whoever ends this process has the results of the parts before.
            running.pack(args.out, args.archive)
    return results


def installed() -> str:
    """Say that the packages are installed here; an empty string when they are not."""
    there = all(map(has, ("flowgrpo", "diffusers", "tyro")))
    return "the packages are installed already" if there else ""


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for records and logs")
    parser.add_argument("--call", choices=("1", "2", "3", "more"), help="default: 1, 2 and 3")
    parser.add_argument("--parts", default="", help="comma-separated; default: all of the call")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that `build` installs")
    parser.add_argument("--total", type=float, default=LIMIT, help="seconds of a call")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every part's budget")
    parser.add_argument("--commit", help="what is measured, where the tree is no repository")
    parser.add_argument("--lines", type=int, default=25, help="lines of each log to print")
    parser.add_argument("--archive", type=Path, help="pack the folder into this .tar.gz")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args(argv)
    if args.smoke:
        # Most of a smoke run is imports, which take their time on a busy CPU.
        args.scale, args.total = 4 * args.scale, 4 * args.total
    # The parts run in the repository's root.
    args.out, args.wheels = args.out.resolve(), args.wheels and args.wheels.resolve()
    args.plan = Plan(args).calls()
    calls = [args.call] if args.call else ["1", "2", "3"]
    names = [part.name for call in calls for part in args.plan[call]]
    args.chosen = [name for name in args.parts.split(",") if name]
    if unknown := set(args.chosen) - set(names):
        parser.error(f"--parts knows {', '.join(names)}, not {', '.join(unknown)}")
    args.calls = calls
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.commit:
        os.environ["FLOWGRPO_COMMIT"] = args.commit
    args.out.mkdir(parents=True, exist_ok=True)
    # Whoever ends this process ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results: list[dict] = []
    for call in args.calls:
        parts = [p for p in args.plan[call] if not args.chosen or p.name in args.chosen]
        for part in parts:
            if part.name == "build" and not args.chosen and not args.smoke and call != "1":
                # On a machine that is still held from the call before.
                part.absent = installed()
        results += run_call(parts, args)
    print(*(f"{d['part']:16s} {d['seconds']:7.1f} s  {d['result']}" for d in results), sep="\n")
    return 0 if all(d["result"].startswith(("passed", "absent")) for d in results) else 1


if __name__ == "__main__":
    sys.exit(main())
