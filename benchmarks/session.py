"""One session on a GPU machine: its tests and every suite, part by part, within a limit of time.

    python benchmarks/session.py --out DIR                              # all parts
    python benchmarks/session.py --out DIR --parts build,kernels --scale 4  # some, more time each
    python benchmarks/session.py --out DIR --wheels WHEELS --total 570  # no network, ten minutes
    python benchmarks/session.py --out DIR --smoke                      # tiny, on the CPU

Needs a Python with PyTorch for CUDA, Triton, transformers, peft, accelerate and pytest; whatever
else is missing may lie as wheels in a folder (--wheels; README.md collects them). Nothing is
downloaded. Each part is a process or two with a budget of seconds (ten minutes in all; --scale
stretches them; with --total a part also has what those before it have left); one that fails or is
stopped is reported and the next one runs. The suites run twice: first without torch.compile, whose
minutes would be the first case's, then one geometry with it. DIR gets the records, a log of each
part and summary.json; --archive packs it, anew after each part. Exit code 1 if a part failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
GRACE = 20.0
"""Seconds for a stopped process to save and leave."""
MARK = "pytest.mark.gpu"
"""Text in the files that have tests for a GPU."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
"""Environment in which nothing waits for a network that is not there."""


@dataclass
class Part:
    """Commands that run one after the other, all within `budget` seconds."""

    name: str
    budget: float
    commands: list[list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    absent: str = ""
    """Reason why the part cannot run here; empty when it can."""


def suite(script: str, out: Path, budget: float, *more: str) -> list[str]:
    """Command of a suite; no case begins in the last fifth of its budget."""
    limit = f"{0.8 * budget:.0f}"
    return [sys.executable, str(HERE / script), "--out", str(out), *more, "--budget", limit]


def parts(args: argparse.Namespace) -> list[Part]:
    """Parts of the session in the order in which they run."""
    out = args.out
    device = "cpu" if args.smoke else "cuda"
    # By name, so that a GPU that PyTorch does not see is no run on the CPU.
    where = ["--device", device, *(["--smoke"] if args.smoke else [])]

    def one(name: str, budget: float, script: str, *more: str) -> Part:
        budget *= args.scale
        return Part(
            name, budget, [suite(script, out / f"{name}-{device}.json", budget, *more, *where)]
        )

    plain = ("--providers", "ours,ours-loop,ours-fused,eager")
    trained = ("--providers", "ours,eager,ours-captured,ours-fused")
    # Alone, since making a baseline drops what was compiled before it.
    compiled = ("--alone", "--providers", "ours,ours-compiled,eager,compile")
    large = ("--large", "--rounds", "20", "--no-compile")
    sd3 = ("--cases", "sd3.5-m,nano")
    # 24 GB in bf16, 48 in float32: not all providers at once.
    flux = ("--cases", "flux.1-dev", "--alone")
    if args.smoke:
        large = sd3 = flux = ()
    uncompiled = [
        Part("build", 40 * args.scale, build(args)),
        Part("tests", 75 * args.scale, [tests(args)]),
        one("kernels", 35, "bench_kernels.py", *large),
        one("blocks", 20, "bench_blocks.py", "--no-compile"),
        one("rollout", 50, "bench_rollout.py", *plain, *sd3),
        one("update", 35, "bench_update.py", "--alone", *trained, *sd3),
        one("iteration", 30, "bench_iteration.py", "--alone", *trained, *sd3),
        one("memory", 20, "bench_iteration.py", "--memory", *sd3),
        Part("nano", 30 * args.scale, [nano(args, device)]),
        sanitizer(args),
        one("profile-rollout", 25, "bench_rollout.py", "--profile", *filtered(args)),
        one("profile-update", 25, "bench_update.py", "--profile", *filtered(args)),
        one("kernels-memory", 10, "bench_kernels.py", "--memory"),
    ]
    if args.smoke:
        return uncompiled
    geometry = "sd3.5-m t10 b16 no-cfg"
    single = program("single-pass-loss", "--out", str(out / "single-pass-cuda.json"))
    return [
        *uncompiled,
        one("compiled-rollout", 45, "bench_rollout.py", *compiled, "--cases", geometry),
        one("compiled-update", 35, "bench_update.py", *compiled, "--cases", f"{geometry} w2 kl"),
        one("rollout-flux", 30, "bench_rollout.py", *plain, *flux),
        one("update-flux", 20, "bench_update.py", *trained, *flux),
        one("compiled-blocks", 15, "bench_blocks.py", "--cases", "sd3.5-m b16 both"),
        one("compiled-kernels", 20, "bench_kernels.py", "--cases", "sd3-512 b16 bfloat16"),
        Part("single-pass", 10 * args.scale, [single]),
    ]


def program(name: str, *arguments: str) -> list[str]:
    """Command of a program that is no suite."""
    return [sys.executable, str(HERE), name, *arguments]


def nano(args: argparse.Namespace, device: str) -> list[str]:
    """Command of the default training run, as far as it gets; a stopped one goes on."""
    folder = args.out / "nano"
    command = [sys.executable, "-m", "flowgrpo", "train"]
    if (folder / "config.json").exists():
        return [*command, "--run.resume", str(folder)]
    command += ["--run.out", str(folder), "--policy.device", device]
    if not args.smoke:
        return [*command, "--run.steps", "60"]
    tiny = {"--run.steps": 1, "--run.eval-prompts": 2, "--run.eval-samples": 1}
    tiny |= {"--run.eval-guidance": 1, "--sample.eval-steps": 2, "--sample.batch-size": 2}
    tiny |= {"--sample.prompts-per-iteration": 2, "--sample.group-size": 2}
    return [*command, *(str(word) for pair in tiny.items() for word in pair)]


def filtered(args: argparse.Namespace) -> list[str]:
    """Options that choose the cases of a profile."""
    if args.smoke:
        return ["--cases", "tiny-sd3", "--batch-sizes", "2"]
    # One after the other, so that a part that is stopped has the first ones.
    geometry = ["--cases", "sd3.5-m t10 b16 no-cfg", "--alone"]
    return [*geometry, "--providers", "ours,eager,ours-fused"]


def build(args: argparse.Namespace) -> list[list[str]]:
    """Commands that install wheels and packages, and say what runs here."""
    doctor = [sys.executable, "-m", "flowgrpo", "doctor"]
    if args.smoke:
        return [doctor]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    wheels = sorted(map(str, args.wheels.glob("*.whl"))) if args.wheels else []
    first = [[*pip, "--no-index", *wheels]] if wheels else []
    # Without one the tests would all be skipped, and that is no failure.
    gpu = [sys.executable, "-c", "import torch; print(torch.cuda.get_device_name())"]
    return [*first, [*pip, "--no-build-isolation", str(ROOT)], doctor, gpu]


def tests(args: argparse.Namespace) -> list[str]:
    """Command of the tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["--tb=short", "--durations=10"]
    folder = ROOT / "tests"
    if args.smoke:
        # On a CPU they are all skipped: one file shows that the part runs.
        return [*command, str(folder / "kernels" / "test_gpu.py")]
    # There, or among the wheels that the part before this one installs.
    has_wheel = args.wheels is not None and any(args.wheels.glob("pytest_xdist-*.whl"))
    if has_wheel or importlib.util.find_spec("xdist"):
        # Most of their time is Triton's compiler, one core a process.
        command += ["-n", "8", "--dist", "worksteal"]
    # The other files would be imported for nothing, and may want libraries that are not there.
    paths = sorted(folder.rglob("test_*.py"))
    return [*command, *(str(p) for p in paths if MARK in p.read_text(encoding="utf-8"))]


def sanitizer(args: argparse.Namespace) -> Part:
    """The part that runs every kernel under compute-sanitizer."""
    # CUDA's folder too, which need not be on the PATH.
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    tool = shutil.which("compute-sanitizer", path=path)
    if args.smoke:
        return Part("sanitizer", 40 * args.scale, [program("sanitize", "cpu")])
    commands = [
        [str(tool), "--tool", name, "--error-exitcode", "1", *program("sanitize")]
        for name in ("memcheck", "racecheck")
    ]
    absent = "" if tool else "there is no compute-sanitizer"
    return Part(
        "sanitizer", 30 * args.scale, commands, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, absent
    )


def heed_interrupts() -> None:
    """Undo, in a child, what a shell does to a command in the background: SIGINT is ignored there,
    and so by all of its children, which could then not be stopped in time to save."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def stop(process: subprocess.Popen) -> None:
    """Interrupt a process, so that it saves as on Ctrl-C; kill it after the grace."""
    for number, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            process.wait()
            return


def execute(part: Part, out: Path, seconds: float) -> dict:
    """Run one part; its entry in summary.json."""
    if part.absent:
        return {"part": part.name, "result": f"absent: {part.absent}", "seconds": 0.0}
    start, result = time.monotonic(), "passed"
    path = out / f"{part.name}.log"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **OFFLINE, **part.environment}
    with open(path, "w", encoding="utf-8") as log:
        for command in part.commands:
            log.write(f"$ {shlex.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment,
                start_new_session=True, preexec_fn=heed_interrupts,
            )  # fmt: skip
            try:
                process.wait(max(1.0, seconds - (time.monotonic() - start)))
            except subprocess.TimeoutExpired:
                stop(process)
                result = f"stopped after {seconds:.0f} s"
                break
            if process.returncode:
                result = f"failed with {process.returncode}"
                break
    spent = round(time.monotonic() - start, 1)
    return {"part": part.name, "result": result, "seconds": spent}


def pack(folder: Path, path: Path) -> None:
    """Replace the archive by one of the folder as it is now."""
    beside = path.with_name(path.name + ".part")
    with tarfile.open(beside, "w:gz") as archive:
        archive.add(folder, arcname=folder.name)
    beside.replace(path)


def show(done: dict, out: Path, lines: int) -> None:
    """Print the part's result and the end of its log."""
    print(f"== {done['part']}: {done['result']}, {done['seconds']} s", flush=True)
    log = out / f"{done['part']}.log"
    if log.exists():
        text = log.read_text(encoding="utf-8", errors="replace").splitlines()
        print("\n".join(text[-lines:]), flush=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for records and logs")
    parser.add_argument("--parts", default="", help="comma-separated; default: all")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that `build` installs")
    parser.add_argument("--total", type=float, default=float("inf"), help="seconds for everything")
    parser.add_argument("--scale", type=float, default=1.0, help="multiply every part's budget")
    parser.add_argument("--commit", help="what is measured, where the tree is no repository")
    parser.add_argument("--lines", type=int, default=25, help="lines of each log to print")
    parser.add_argument("--archive", type=Path, help="pack the folder into this .tar.gz")
    parser.add_argument("--smoke", action="store_true", help="tiny models on the CPU")
    args = parser.parse_args(argv)
    if args.smoke:
        # Most of a smoke run is imports, which take their time on a busy CPU.
        args.scale *= 4
    if args.commit:
        os.environ["FLOWGRPO_COMMIT"] = args.commit
    # The parts run in the repository's root.
    args.out, args.wheels = args.out.resolve(), args.wheels and args.wheels.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    plan = parts(args)
    names = [part.name for part in plan]
    chosen = [name for name in args.parts.split(",") if name] or names
    if unknown := set(chosen) - set(names):
        parser.error(f"--parts knows {', '.join(names)}, not {', '.join(unknown)}")
    start, summary, spare = time.monotonic(), [], 0.0
    for part in plan:
        if part.name not in chosen:
            continue
        left = args.total - (time.monotonic() - start) - GRACE
        if left < GRACE:
            done = {"part": part.name, "result": "not begun: no time left", "seconds": 0.0}
        else:
            done = execute(part, args.out, min(part.budget + spare, left))
        if args.total < float("inf"):
            # What a part leaves is the next ones': a case that has begun may end.
            spare = max(0.0, spare + part.budget - done["seconds"])
        if part.name == "build" and done["result"] != "passed":
            # The packages need no installation; their CPU library, which does, is not needed here.
            folders = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
            os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
        show(done, args.out, args.lines)
        summary.append(done)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if args.archive:
            # Each time: whoever ends this process has the results of the parts before.
            pack(args.out, args.archive)
    print(*(f"{d['part']:16s} {d['seconds']:7.1f} s  {d['result']}" for d in summary), sep="\n")
    return 0 if all(d["result"] == "passed" for d in summary if "absent" not in d["result"]) else 1


if __name__ == "__main__":
    sys.exit(main())
