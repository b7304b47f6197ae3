"""Kills, stops and misleads ranks of a run, goes on with it, and compares what it ends with.

    python benchmarks ranks-drill --kills 20 --torchrun    # writes results/ranks-drill.json

Runs of seconds of the embedded model on two ranks. Each case does something to one of them: it is
killed by SIGKILL at a moment at random, its reward fails or hangs, its disk is full, it is asked to
stop, it never comes, or it differs from the other. The case holds if

- all ranks end within `run.rank_timeout` and the time of a start, with the exit code that belongs
  to it, and what is said of it is one sentence (two where each process has its own to say);
- what is left behind goes on, and ends with what an undisturbed run of one process ends with, bit
  for bit (crash_drill.py says of what).

With --torchrun some of them once more under torchrun, whose every process imports all anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from experiments import crash_drill
from flowgrpo.config import Config, replace
from reporting import records

WAY = "FLOWGRPO_DRILL"
"""Environment variable of a rank: what its reward does once the first iteration is logged."""
WATCHED = "FLOWGRPO_DRILL_METRICS"
"""The metrics.jsonl in which it looks."""
PATIENCE = 15.0
"""run.rank_timeout of the cases in which a rank does not come, in seconds."""
START = 60.0
"""Seconds that a start and an end may take beside it, on a machine with other work."""
PAUSE = 8.0
"""Seconds for which a reward waits, in an iteration, for what is to happen to its process."""
RANKS = 2
AGAIN = ("going on", "the end")

_context = multiprocessing.get_context("forkserver")


def score(images: Any, prompts: list[str], metadata: list[dict]) -> Any:
    """Darker images are better; a reward that misbehaves as `WAY` says."""
    way = os.environ.get(WAY, "")
    if way and lines_of(Path(os.environ[WATCHED]), "train"):
        in_main = threading.current_thread() is threading.main_thread()
        if way == "raise":
            raise ValueError("the drill's reward raises")
        if way == "nan":
            return [float("nan")] * len(images)
        if way == "wrong number":
            return [1.0]
        if way == "exit":
            raise SystemExit("the drill's reward has enough")
        pause = pause_of(Path(os.environ[WATCHED]).parent)
        if way == "pause" and os.environ["RANK"] == "1" and not pause.exists():
            pause.touch()
            time.sleep(PAUSE)
        if (way == "hang" and not in_main) or (way == "hang in an evaluation" and in_main):
            time.sleep(3600)
    return (255 - images.float().mean((1, 2, 3))) / 255


def pause_of(run: Path) -> Path:
    """Name the file beside the folder of a run that is there once rank 1 waits in an iteration."""
    return run.with_name(f"{run.name}.pause")


def lines_of(metrics: Path, kind: str) -> int:
    """Count the whole lines of a kind in metrics.jsonl."""
    try:
        lines = metrics.read_text().splitlines(keepends=True)
    except OSError:
        return 0
    return sum(line.endswith("\n") and f'"kind": "{kind}"' in line for line in lines)


def configuration(folder: Path, name: str, **changes: Any) -> Config:
    """A run of a few seconds in the folder `name`, of two chunks an update, each a group."""
    base = {
        "sample.prompts_per_iteration": 4,
        "reward.weights": {"experiments.ranks_drill:score": 1.0},
        "reward.report": ("experiments.ranks_drill:score", "nano_partial"),
        "reward.options": {},
        "run.out": str(folder / name),
        "run.rank_timeout": 2 * START,
    }
    return replace(crash_drill.tiny(folder), **{**base, **changes})


def be_rank(
    config: Config, log: Path, variables: Mapping[str, str], other: Mapping[str, Any]
) -> None:
    """One rank of `flowgrpo train`; the body of a process.

    Args:
        other: in what it differs: fields of the configuration, "cwd", "versions", or "stall", a
            number of seconds before it begins.
    """
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # The process inherits objects, not streams, of the one that it is forked from.
    sys.stdout = sys.stderr = open(1, "w", closefd=False)  # noqa: SIM115
    os.environ.update(variables)
    from flowgrpo import train
    from flowgrpo.cli import main
    from flowgrpo.cli import train as command
    from flowgrpo.distributed import world

    fields = dict(other)
    os.chdir(fields.pop("cwd", "."))
    versions = {**train.versions(), **fields.pop("versions", {})}
    train.versions = lambda: versions
    config = replace(config, **fields)
    command.parse_train = lambda argv: config
    try:
        code = main.main(["train"])
    finally:
        # Python calls it at the end of a process, but not of a fork.
        sys.stdout.flush()
        world.leave()
    sys.exit(code)


class Started:
    """The ranks of one start."""

    def __init__(
        self,
        config: Config,
        log: Path,
        ranks: Sequence[int] = range(RANKS),
        variables: Mapping[int, Mapping[str, str]] | None = None,
        other: Mapping[int, Mapping[str, Any]] | None = None,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.logs = {rank: log.with_name(f"{log.name}.{rank}") for rank in ranks}
        self.processes = {}
        for rank in ranks:
            self.logs[rank].unlink(missing_ok=True)
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(RANKS),
                "LOCAL_WORLD_SIZE": str(RANKS),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                **(variables or {}).get(rank, {}),
            }
            arguments = (config, self.logs[rank], environment, (other or {}).get(rank, {}))
            self.processes[rank] = _context.Process(target=be_rank, args=arguments)
            self.processes[rank].start()

    def kill(self, number: int, *ranks: int) -> None:
        """Send a signal to ranks; all if none is named."""
        for rank in ranks or self.processes:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def end(self, limit: float) -> tuple[dict[int, int | None], float]:
        """Wait for all; their exit codes, None for one that has to be killed, and the seconds."""
        start = time.monotonic()
        codes = {}
        for rank, process in self.processes.items():
            process.join(max(start + limit - time.monotonic(), 0))
            codes[rank] = process.exitcode
        seconds = time.monotonic() - start
        for process in self.processes.values():
            if process.is_alive():
                process.kill()
                process.join()
        return codes, seconds

    def said(self) -> dict[int, list[str]]:
        """Sentences of each rank about a fault."""
        texts = {rank: log.read_text() if log.exists() else "" for rank, log in self.logs.items()}
        return {rank: complaints(text) for rank, text in texts.items()}


def complaints(text: str) -> list[str]:
    """Lines of an output that say that something is wrong: errors, and the heads of tracebacks."""
    lines = text.splitlines()
    return [line for line in lines if line.startswith(("error: ", "Traceback"))]


class Drill:
    """Cases in a folder; each is a method that returns what is wrong, "" for nothing."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.rows: list[dict] = []
        self.losses: list[str] = []
        self.waited = 0.0
        """Seconds that the ranks of the present case took to end."""
        config = configuration(folder, "whole")
        begin = time.monotonic()
        process = _context.Process(target=be_rank, args=(config, folder / "whole.log", {}, {}))
        process.start()
        process.join(3 * START)
        self.seconds = time.monotonic() - begin
        if process.exitcode:
            raise RuntimeError(f"the undisturbed run failed: {(folder / 'whole.log').read_text()}")
        self.expected = crash_drill.contents(config.out_dir)

    def run(self, name: str, case: Callable[[], str]) -> None:
        """Run one case and note how it ended."""
        self.waited = 0.0
        problem = case()
        for metric, value, unit in (
            ("lost", float(bool(problem)), "1"),
            ("longest wait", self.waited, "s"),
        ):
            self.rows.append(records.row("ranks-drill", name, "ours", metric, value, unit))
        if problem:
            self.losses.append(f"{name}: {problem}")
        print(f"{name}: {problem or 'held'} ({self.waited:.1f} s)", flush=True)

    def start(self, config: Config, **options: Any) -> Started:
        return Started(config, self.folder / f"{config.out_dir.name}.log", **options)

    def ended(
        self,
        started: Started,
        codes: Mapping[int, Sequence[int]],
        words: str = "",
        limit: float = START,
        silent: bool = True,
    ) -> str:
        """Wait for the end and check exit codes and sentences.

        Args:
            codes: rank -> exit codes that are right.
            words: in the one sentence that rank 0, or the only rank that is left, says; "" for
                none.
            silent: the other ranks say nothing.
        """
        exits, seconds = started.end(limit)
        self.waited = max(self.waited, seconds)
        said = started.said()
        wrong = {rank: code for rank, code in exits.items() if code not in codes[rank]}
        if wrong:
            return f"exit codes {exits}, expected {dict(codes)}; {said}"
        speaker = next((rank for rank, code in exits.items() if code != -signal.SIGKILL), 0)
        if len(said[speaker]) != bool(words) or words not in "".join(said[speaker]):
            return f"rank {speaker} says {said[speaker]}, expected one sentence with {words!r}"
        others = {rank: lines for rank, lines in said.items() if rank != speaker and lines}
        return f"others speak as well: {others}" if others and silent else ""

    def same(self, config: Config) -> str:
        """Go on with a run, undisturbed, and compare what it ends with."""
        exits, _ = self.go_on(config).end(3 * START)
        if any(exits.values()):
            return f"{AGAIN[0]}: exit codes {exits}"
        problem = crash_drill.difference(config.out_dir, self.expected)
        return f"{AGAIN[1]}: {problem}" if problem else ""

    def go_on(self, config: Config) -> Started:
        """Start the same command again, or with --run.resume where there is something to resume."""
        if (config.out_dir / "config.json").exists():
            config = replace(config, **{"run.resume": str(config.out_dir)})
        config = replace(config, **{"run.rank_timeout": 2 * START})
        return Started(config, self.folder / f"{config.out_dir.name}.again.log")

    # Cases.

    def killed(self, number: int) -> str:
        """SIGKILL of one rank at a moment at random in the whole run."""
        rank = self.random.randrange(RANKS)
        for attempt in range(10):
            name = f"killed-{number}-{attempt}"
            config = configuration(self.folder, name, **{"run.rank_timeout": PATIENCE})
            started = self.start(config)
            time.sleep(self.random.random() * self.seconds)
            started.kill(signal.SIGKILL, rank)
            started.processes[rank].join()
            if started.processes[rank].exitcode == 0:
                # It had ended before.
                started.end(START)
                continue
            # Before they have found each other it is the command that is wrong.
            survivor = 1 - rank
            exits, seconds = started.end(PATIENCE + START)
            self.waited = max(self.waited, seconds)
            said = started.said()[survivor]
            if exits[survivor] not in (1, 2):
                # Its work was done.
                if exits[survivor] != 0 or (config.out_dir / "summary.json").exists() is False:
                    return f"exit codes {exits}; {said}"
            elif len(said) != 1 or "run.rank_timeout" not in said[0]:
                return f"rank {survivor} says {said}, expected one sentence"
            elif exits[survivor] == 1 and f"rank {rank} of the {RANKS}" not in said[0]:
                return f"the rank is not named: {said}"
            return self.same(config)
        return "all kills came after the end"

    def reward(self, way: str) -> str:
        """The reward of rank 1 misbehaves in the second iteration."""
        name = f"reward {way}".replace(" ", "-")
        patience = PATIENCE if way.startswith("hang") else 2 * START
        config = configuration(self.folder, name, **{"run.rank_timeout": patience})
        watched = {WAY: way, WATCHED: str(config.out_dir / "metrics.jsonl")}
        started = self.start(config, variables={1: watched})
        if way in ("raise", "nan"):
            # Its groups are dropped, and the run goes on.
            problem = self.ended(started, {0: [0], 1: [0]}, limit=3 * START)
            text = started.logs[1].read_text()
            if not problem and "rank 1: reward 'experiments.ranks_drill:score' failed" not in text:
                return f"rank 1 does not say that its reward failed: {text}"
            dropped = json.loads((config.out_dir / "summary.json").read_text())["dropped_groups"]
            return problem or ("" if dropped else "no group was dropped")
        if way == "hang in an evaluation":
            # Nothing interrupts the user's code in the main thread but its end, which a launcher
            # brings: SIGTERM, then SIGKILL.
            started.processes[0].join(PATIENCE + 3 * START)
            started.kill(signal.SIGTERM, 1)
            time.sleep(1)
            started.kill(signal.SIGKILL, 1)
            codes = {0: [1], 1: [-signal.SIGKILL]}
            problem = self.ended(started, codes, f"rank 1 of the {RANKS} processes")
        else:
            words = "rank 1: the rewards of a chunk" if way == "hang" else "rank 1: reward "
            problem = self.ended(started, {0: [2], 1: [2]}, words, PATIENCE + 3 * START)
            if not problem and not self.has_checkpoint(config):
                problem = "nothing was saved"
        return problem or self.same(config)

    def signals(self, name: str, codes: Sequence[int], *sent: tuple[int, ...]) -> str:
        """Signals to ranks after the first iteration: (number, rank ...), all ranks if none."""
        config = configuration(self.folder, name, **{"run.steps": 3})
        started = self.start(config)
        self.wait_for(config, started)
        for number, *ranks in sent:
            started.kill(number, *ranks)
            time.sleep(0.05)
        exits, seconds = started.end(2 * START)
        self.waited, said = seconds, started.said()
        # The end may have come before the signal.
        if not all(code in (*codes, 0) for code in exits.values()):
            return f"exit codes {exits}, expected {codes}; {said}"
        if any(line.startswith("Traceback") for lines in said.values() for line in lines):
            return f"a traceback: {said}"
        saved = [path.name for path in (config.out_dir / "checkpoints").glob("*")]
        if codes == (130,) and (said[0] or said[1] or not saved):
            return f"saved {saved}; {said}"
        return self.same(config)

    def full_disk(self) -> str:
        """The run directory's disk is full in the middle of the run."""
        disk = self.folder / "disk"
        with mounted(disk, "64m"):
            config = configuration(disk, "run", **{"run.rank_timeout": PATIENCE})
            started = Started(config, self.folder / "disk.log")
            self.wait_for(config, started)
            try:
                with open(disk / "filler", "wb") as file:
                    while True:
                        file.write(bytes(4096))
            except OSError:
                pass
            codes = {rank: [1] for rank in range(RANKS)}
            problem = self.ended(started, codes, "no space is left on a disk")
            (disk / "filler").unlink()
            if problem:
                return problem
            config = replace(config, **{"run.resume": str(config.out_dir)})
            again = Started(config, self.folder / "disk.again.log")
            exits, _ = again.end(3 * START)
            if any(exits.values()):
                return f"{AGAIN[0]}: exit codes {exits}"
            return crash_drill.difference(config.out_dir, self.expected)

    def never_comes(self, rank: int) -> str:
        """The rendezvous of two ranks of which only `rank` is there."""
        config = configuration(self.folder, f"alone-{rank}", **{"run.rank_timeout": 5.0})
        started = self.start(config, ranks=[rank])
        problem = self.ended(started, {rank: [2]}, "did not find each other", 5 + START)
        return problem or ("a run directory was made" if config.out_dir.exists() else "")

    def not_alike(self, name: str, words: str, other: Mapping[str, Any], **changes: Any) -> str:
        """Rank 1 differs from rank 0; the difference is named and nothing is written."""
        config = configuration(self.folder, name, **changes)
        started = self.start(config, other={0: {"cwd": str(self.folder)}, 1: other})
        problem = self.ended(started, {0: [2], 1: [2]}, words, 2 * START)
        return problem or ("a run directory was made" if config.out_dir.exists() else "")

    def not_seen(self) -> str:
        """A run directory of which rank 1 sees another, without the checkpoint."""
        here, there = self.folder / "here", self.folder / "there"
        config = self.stopped(here / "run")
        shutil.copytree(here / "run", there / "run")
        shutil.rmtree(there / "run" / "checkpoints")
        resumed = replace(config, **{"run.resume": "/proc/self/cwd/run", "run.out": ""})
        started = Started(
            resumed,
            self.folder / "not-seen.log",
            other={0: {"cwd": str(here)}, 1: {"cwd": str(there)}},
        )
        codes = {0: [2], 1: [2]}
        problem = self.ended(started, codes, "rank 1: the checkpoint", 2 * START)
        return problem or self.same(replace(config, **{"run.out": str(here / "run")}))

    def under_torchrun(self, name: str, code: int, words: str, act: Callable[..., None]) -> str:
        """Go on with a stopped run under torchrun; `act` gets the launcher and its log."""
        config = self.stopped(self.folder / name)
        log = self.folder / f"{name}.log"
        call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        call += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m", "flowgrpo"]
        call += ["train", "--run.resume", str(config.out_dir)]
        call += ["--run.rank_timeout", str(PATIENCE + START)]
        environment = dict(os.environ)
        if act is not nothing or name.endswith("reward"):
            way = "pause" if act is not nothing else "exit"
            environment |= {WAY: way, WATCHED: str(config.out_dir / "metrics.jsonl")}
        with open(log, "w") as file:
            launcher = subprocess.Popen(call, stdout=file, stderr=file, env=environment)
            try:
                act(launcher, log, config)
                begin = time.monotonic()
                exits = launcher.wait(6 * START)
                self.waited = time.monotonic() - begin
            finally:
                launcher.kill()
        text = log.read_text()
        said = [line for line in text.splitlines() if line.startswith("error: ")]
        if exits != code:
            return f"exit code {exits}, expected {code}: {text[-600:]}"
        if len(said) != bool(words) or words not in "".join(said):
            return f"said {said}, expected one sentence with {words!r}"
        return self.same(config)

    # Tools of the cases.

    def stopped(self, folder: Path) -> Config:
        """A run that was stopped after its first iteration, in a folder of its own."""
        config = configuration(folder.parent, folder.name)
        source = self.folder / "stopped"
        if not source.exists():
            first = configuration(self.folder, "stopped")
            started = self.start(first)
            self.wait_for(first, started)
            started.kill(signal.SIGTERM)
            exits, _ = started.end(2 * START)
            if set(exits.values()) != {130}:
                raise RuntimeError(f"a run could not be stopped: {exits}")
        shutil.copytree(source, folder)
        return replace(config, **{"run.resume": str(folder)})

    def wait_for(self, config: Config, started: Started) -> None:
        """Wait for the line of the first iteration."""
        begin = time.monotonic()
        while not lines_of(config.out_dir / "metrics.jsonl", "train"):
            if time.monotonic() - begin > 3 * START:
                raise TimeoutError(f"no iteration within {3 * START:g} seconds: {started.said()}")
            time.sleep(0.002)

    def has_checkpoint(self, config: Config) -> bool:
        names = [path.name for path in (config.out_dir / "checkpoints").iterdir()]
        return bool(names) and not any(name.startswith(".") for name in names)


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[None]:
    """A small disk in memory at `folder`, which needs the rights to mount."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def workers_of(launcher: subprocess.Popen) -> dict[int, int]:
    """Rank -> process id, of a launcher's workers."""
    pids = {}
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                pairs = (entry / "environ").read_bytes().split(b"\0")
                values = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
                pids[int(values[b"RANK"])] = int(entry.name)
        except (OSError, ValueError, KeyError):
            continue
    return pids


def in_an_iteration(config: Config) -> None:
    """Wait until rank 1 waits in an iteration."""
    begin = time.monotonic()
    while not pause_of(config.out_dir).exists() and time.monotonic() - begin < 4 * START:
        time.sleep(0.01)


def kill_worker(launcher: subprocess.Popen, log: Path, config: Config) -> None:
    in_an_iteration(config)
    os.kill(workers_of(launcher)[1], signal.SIGKILL)


def stop_launcher(launcher: subprocess.Popen, log: Path, config: Config) -> None:
    in_an_iteration(config)
    launcher.terminate()


def nothing(launcher: subprocess.Popen, log: Path, config: Config) -> None:
    pass


def cases(drill: Drill, kills: int, torchrun: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """All cases by name."""
    for number in range(kills):
        yield f"SIGKILL at random {number + 1}", lambda number=number: drill.killed(number)
    for way in ("raise", "nan", "wrong number", "exit", "hang", "hang in an evaluation"):
        yield f"reward: {way}", lambda way=way: drill.reward(way)
    term, interrupt = signal.SIGTERM, signal.SIGINT
    yield "SIGTERM to one", lambda: drill.signals("term-one", (130,), (term, 1))
    yield "SIGTERM to all", lambda: drill.signals("term-all", (130,), (term,))
    yield "Ctrl-C", lambda: drill.signals("ctrl-c", (130,), (interrupt,))
    # Of the two that abort, one may see the other gone before it is asked the second time.
    twice = ((interrupt,), (interrupt,))
    yield "Ctrl-C twice", lambda: drill.signals("ctrl-c-twice", (130, 1), *twice)
    yield "full disk", drill.full_disk
    for rank in range(RANKS):
        yield f"only rank {rank} comes", lambda rank=rank: drill.never_comes(rank)
    yield (
        "other configuration",
        lambda: drill.not_alike("other-lr", "optim.lr is", {"optim.lr": 0.5}),
    )
    yield (
        "other versions",
        lambda: drill.not_alike(
            "other-torch", "the version of torch", {"versions": {"torch": "1.0"}}
        ),
    )
    yield "other prompts", lambda: other_prompts(drill)
    yield "run directory not seen", drill.not_seen
    if torchrun:
        term_words = "has ended without a word"
        under = drill.under_torchrun
        yield "torchrun: undisturbed", lambda: under("torchrun-whole", 0, "", nothing)
        yield "torchrun: SIGKILL", lambda: under("torchrun-kill", 1, term_words, kill_worker)
        yield "torchrun: reward", lambda: under("torchrun-reward", 1, "reward ", nothing)
        yield "torchrun: SIGTERM", lambda: under("torchrun-term", 1, "", stop_launcher)


def other_prompts(drill: Drill) -> str:
    """The same path, and for each rank another file."""
    there = drill.folder / "elsewhere"
    there.mkdir()
    text = "one red circle\ntwo blue squares\nthree red circles\none blue star\n"
    (drill.folder / "prompts.txt").write_text(text)
    (there / "prompts.txt").write_text(text.replace("three", "four"))
    path = {"sample.prompts": "/proc/self/cwd/prompts.txt"}
    rewards = {"reward.report": ("experiments.ranks_drill:score",)}
    return drill.not_alike("other-prompts", "training is", {"cwd": str(there)}, **path, **rewards)


def drill(kills: int, seed: int, folder: Path, torchrun: bool = False, only: str = "") -> Drill:
    """Run the cases whose names contain `only` in `folder`, which is empty."""
    crash_drill.prepare_forkserver()
    _context.set_forkserver_preload([*crash_drill.PRELOAD, "experiments.ranks_drill"])
    outcome = Drill(folder, seed)
    for name, case in cases(outcome, kills, torchrun):
        if only in name:
            outcome.run(name, case)
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=20, help="default: 20")
    parser.add_argument("--torchrun", action="store_true", help="some cases under torchrun too")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--seed", type=int, default=0, help="of the moments, default: 0")
    parser.add_argument("--out", type=Path, default=records.RESULTS / "ranks-drill.json")
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay")
    args = parser.parse_args(argv)
    records.commit()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = drill(args.kills, args.seed, folder, args.torchrun, args.only)
    lost = sum(row["value"] for row in outcome.rows if row["metric"] == "lost")
    cases_run = sum(row["metric"] == "lost" for row in outcome.rows)
    for metric, value in (("cases", cases_run), ("lost", lost)):
        outcome.rows.append(records.row("ranks-drill", "all", "ours", metric, value, "1"))
    records.write(records.record(outcome.rows, "cpu", losses=outcome.losses), args.out)
    print(f"{cases_run} cases, {lost:.0f} lost; wrote {args.out}")
    return 1 if outcome.losses else 0
