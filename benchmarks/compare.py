"""Times two commits against each other: `python benchmarks/compare.py BASE`.

    python benchmarks/compare.py main                          # suite kernels, this machine
    python benchmarks/compare.py main --suite dropins --cases verl-omni,UniRL
    python benchmarks/compare.py HEAD~3 --rounds 60 --out compare.json

BASE (any name of a commit) is checked out into a worktree beside this tree, and its native library
is built there. Then the tests of --gate run in both trees, each its own: while one is red, no time
is printed, since what computes something else may well be faster. Then one process for each tree
runs this tree's benchmark on that tree's packages, and the two take turns, round by round, in
another order each time. For each case: the medians, and base/head, above 1 where this tree is
faster: the median of the rounds' ratios with its 95 % interval (bootstrap). An interval that holds
1 shows no difference.

Exit code: 0, 1 when the gate is red or a case could not be timed, 2 when BASE cannot be built.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from measuring import gpu_state, timing
from reporting import records

ROOT = Path(__file__).resolve().parents[1]
SUITES = ("kernels", "dropins", "blocks", "launch")
GATE = "tests/kernels/test_golden.py tests/kernels/test_exactness.py"
SAMPLES = 2000
"""Resamples of the bootstrap."""


class CannotBuild(Exception):
    """The commit does not exist, or its tree cannot be made to run."""


def run(command: list[str], folder: Path, what: str) -> str:
    """Output of a command; CannotBuild with its last lines when it fails."""
    done = subprocess.run(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-15:])
        raise CannotBuild(f"{what} failed:\n{tail}")
    return done.stdout.strip()


@contextlib.contextmanager
def worktree(base: str, root: Path = ROOT) -> Iterator[Path]:
    """A tree of the commit, with its native library, for as long as it is used."""
    commit = run(["git", "rev-parse", "--verify", f"{base}^{{commit}}"], root, f"finding {base}")
    folder = Path(tempfile.mkdtemp(prefix="flowgrpo-base-"))
    tree = folder / "tree"
    try:
        add = ["git", "worktree", "add", "--quiet", "--detach", str(tree), commit]
        run(add, root, f"checking out {base}")
        build_native(tree, root)
        yield tree
    finally:
        remove = ["git", "worktree", "remove", "--force", str(tree)]
        subprocess.run(remove, cwd=root, capture_output=True)
        shutil.rmtree(folder, ignore_errors=True)


def native_files(tree: Path) -> list[Path]:
    """The compiled library of a tree and what says how it was built, as far as they are there."""
    folder = tree / "kernels" / "flowgrpo_kernels"
    return [*folder.glob("libflowgrpo_native.*"), *folder.glob("_native_build.json")]


def sources(tree: Path) -> dict[str, bytes]:
    """Everything that the native library is compiled from."""
    files = [tree / "CMakeLists.txt", *sorted((tree / "kernels" / "csrc").glob("*.[ch]*"))]
    return {str(file.relative_to(tree)): file.read_bytes() for file in files}


def build_native(tree: Path, root: Path) -> None:
    """Compile the native library of a tree; equal sources have this tree's library already."""
    if len(native_files(root)) == 2 and sources(tree) == sources(root):
        for file in native_files(root):
            shutil.copy2(file, tree / file.relative_to(root))
        return
    build = tree / "build-native"
    environment = {**os.environ, "FLOWGRPO_REQUIRE_NATIVE": "1"}
    command = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", str(build)]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-15:])
        raise CannotBuild(f"the native library of the base could not be compiled:\n{tail}")
    for file in (build / "flowgrpo_kernels").iterdir():
        if file.name.startswith(("libflowgrpo_native.", "_native_build")):
            shutil.copy2(file, tree / "kernels" / "flowgrpo_kernels" / file.name)


def environment(tree: Path, *more: Path) -> dict[str, str]:
    """Environment in which the packages of a tree are imported."""
    paths = [*map(str, more), str(tree / "kernels"), str(tree), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def is_green(tree: Path, gate: str) -> bool:
    """Run the gate's tests in a tree; print the end of their output when they fail."""
    words = [word for word in gate.split() if word.startswith("-") or (tree / word).exists()]
    if not words:
        print(f"{tree}: the gate's tests are not there", file=sys.stderr)
        return False
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    done = subprocess.run(command, cwd=tree, env=environment(tree), capture_output=True, text=True)
    if done.returncode:
        print("\n".join(done.stdout.splitlines()[-15:]), file=sys.stderr)
    return done.returncode == 0


class Tree:
    """The worker of one tree."""

    def __init__(self, tree: Path, suite: str, provider: str, device: str, smoke: bool) -> None:
        command = [sys.executable, "-m", "measuring.worker", suite, provider, device]
        self.process = subprocess.Popen(
            [*command, *(["--smoke"] if smoke else [])], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True, env=environment(tree, ROOT / "benchmarks"),
        )  # fmt: skip

    def ask(self, **message: Any) -> dict[str, Any]:
        """The answer; one with "error" where the process has ended."""
        try:
            print(json.dumps(message), file=self.process.stdin, flush=True)
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return json.loads(line) if line else {"error": "the process ended (see above)"}

    def leave(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate(json.dumps({"leave": True}) + "\n")


@dataclass
class Comparison:
    """Seconds of the rounds of both commits, in pairs."""

    case: str
    base: list[float]
    head: list[float]

    @property
    def ratio(self) -> float:
        """Base over head: the median of the pairs' ratios."""
        return statistics.median(b / h for b, h in zip(self.base, self.head, strict=True))

    def interval(self, seed: int = 0) -> tuple[float, float]:
        """95 % of the medians of resampled pairs."""
        ratios = [b / h for b, h in zip(self.base, self.head, strict=True)]
        chance = random.Random(seed)
        medians = sorted(
            statistics.median(chance.choices(ratios, k=len(ratios))) for _ in range(SAMPLES)
        )
        return medians[int(0.025 * SAMPLES)], medians[int(0.975 * SAMPLES) - 1]

    def line(self) -> str:
        low, high = self.interval()
        verdict = "no difference" if low <= 1 <= high else "faster" if low > 1 else "slower"
        base, head = (1e6 * statistics.median(times) for times in (self.base, self.head))
        return (
            f"{self.case:42s} base {base:9.1f} us  head {head:9.1f} us  "
            f"base/head {self.ratio:.3f} [{low:.3f}, {high:.3f}]  {verdict}"
        )

    def rows(self, suite: str) -> list[dict]:
        """Rows of a record."""
        low, high = self.interval()
        median = {n: statistics.median(t) for n, t in (("base", self.base), ("head", self.head))}
        return [
            *(records.row(suite, self.case, n, "time", s * 1e6, "us") for n, s in median.items()),
            records.row(suite, self.case, "head", "base_over_head", self.ratio, "x"),
            records.row(suite, self.case, "head", "base_over_head_low", low, "x"),
            records.row(suite, self.case, "head", "base_over_head_high", high, "x"),
        ]


def measure(case: str, base: Any, head: Any, rounds: int) -> Comparison:
    """Time a case of both, in turns; RuntimeError names the commit that could not."""
    both, times = {"base": base, "head": head}, {"base": [], "head": []}
    for name, tree in both.items():
        if "error" in (reply := tree.ask(ready=case)):
            raise RuntimeError(f"{case}, {name}: {reply['error']}")
    order, chance = list(both), random.Random(0)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            reply = both[name].ask(round=True)
            if "error" in reply:
                raise RuntimeError(f"{case}, {name}: {reply['error']}")
            times[name].append(reply["seconds"])
    return Comparison(case, times["base"], times["head"])


def shared_cases(base: Any, head: Any, pattern: str) -> list[str]:
    """Cases of both commits whose name contains one of the comma-separated patterns."""
    listed = {name: tree.ask(list=True) for name, tree in (("base", base), ("head", head))}
    for name, reply in listed.items():
        if "error" in reply:
            raise RuntimeError(f"{name}: {reply['error']}")
    shared = set(listed["base"]["cases"])
    return [c for c in listed["head"]["cases"] if c in shared and timing.matches(c, pattern)]


def compare(base: Any, head: Any, args: argparse.Namespace) -> int:
    """Time all cases, print them, write the record; the exit code."""
    rows: list[dict] = []
    failures: list[str] = []
    cases = shared_cases(base, head, args.cases)
    if not cases:
        raise RuntimeError(f"--cases {args.cases!r} matches no case of suite {args.suite}")
    for case in cases:
        with gpu_state.watched(args.device) as watch:
            try:
                comparison = measure(case, base, head, args.rounds)
            except RuntimeError as error:
                failures.append(str(error))
                print(f"could not be timed: {error}", file=sys.stderr, flush=True)
                continue
        print(comparison.line(), flush=True)
        marked = comparison.rows(args.suite)
        watch.mark(marked)
        records.tell_throttled(case, watch)
        rows += marked
    if args.out:
        facts = {"base": args.base, "failures": failures}
        records.write(records.record(rows, args.device, **facts), args.out)
    return 1 if failures else 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("base", help="the commit to compare this tree with")
    parser.add_argument("--suite", choices=SUITES, default="kernels")
    parser.add_argument("--provider", default="ours")
    parser.add_argument("--cases", default="", help="comma-separated parts of names; default: all")
    parser.add_argument("--rounds", type=int, default=40, help="timed calls of each commit")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--gate", default=GATE, help="arguments of pytest; must be green in both")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    parser.add_argument("--out", type=Path, help="also write a record")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}: an interval needs 2 or more")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        with worktree(args.base) as tree:
            for name, folder in (("base", tree), ("head", ROOT)):
                if not is_green(folder, args.gate):
                    print(f"{args.gate}: red in {name}, so nothing is timed", file=sys.stderr)
                    return 1
            options = (args.suite, args.provider, args.device, args.smoke)
            both = [Tree(folder, *options) for folder in (tree, ROOT)]
            try:
                return compare(*both, args)
            except RuntimeError as error:
                print(error, file=sys.stderr)
                return 1
            finally:
                for worker in both:
                    worker.leave()
    except CannotBuild as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
