"""Processes: how many at once, what becomes of those that fail, and how they are stopped.

The processes are shell scripts, which do what `flowgrpo train --run.resume FOLDER` does to the
outside: write metrics.jsonl, summary.json and a log, and end.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from flowgrpo.comparison import machine, running
from flowgrpo.comparison.folder import Folder, attempts
from flowgrpo.comparison.running import (
    Progress,
    Runner,
    Slots,
    last_line,
    share_machine,
    start_process,
)
from flowgrpo.config import ConfigError, replace
from flowgrpo.runs.process import Stop
from support import comparisons, processes

FINISH = "echo '{\"interrupted\": false}' > %s/summary.json"
ON_SIGNAL = "trap 'echo saved; exit 130' INT; echo ready > %s/ready; while :; do sleep 0.02; done"


class Setup:
    """Four runs, and what their processes do by name; by default they finish at once."""

    def __init__(self, tmp_path: Path) -> None:
        study, base = comparisons.study(), comparisons.recipe(tmp_path)
        self.out = tmp_path / "out"
        self.runs = comparisons.plan(study, base, (0, 1), self.out)
        self.folder = Folder.open(self.out, study, comparisons.configs(study, base))
        self.scripts: dict[str, str] = {}
        self.started: list[tuple[list[str], dict[str, str]]] = []
        self.most, self.events = 0, []

    def launch(self, command, log, env):
        self.started.append((command, env))
        folder = Path(command[command.index("--run.resume") + 1])
        script = self.scripts.get(folder.name, FINISH)
        text = script.replace("%s", shlex.quote(str(folder)))
        return start_process(["sh", "-c", text], log, env)

    def runner(self, slots=None, **options) -> Runner:
        slots = slots or Slots(2, 1, by_memory=False)

        def change(event, process, attempt):
            self.events.append((event, process.run.name))
            self.most = max(self.most, len(runner.active))

        options |= {"on_change": change, "launch": self.launch}
        runner = Runner(self.folder, self.runs, slots, **options)
        return runner

    def loop(self, runner: Runner, stop: Stop | None = None, tick=None) -> None:
        runner.loop(stop or Stop(), tick)


@pytest.fixture
def setup(tmp_path, monkeypatch):
    monkeypatch.setattr(running, "POLL", 0.01)
    monkeypatch.setattr(machine, "name_of", lambda gpu: (f"GPU {gpu}" if gpu else "a CPU", "6.1"))
    monkeypatch.setattr(machine, "commit", lambda: "abc")
    prepared = Setup(tmp_path)
    yield prepared
    prepared.folder.close()


@pytest.mark.slow
def test_all_runs_are_run_so_many_at_once(setup):
    names = [run.name for run in setup.runs]
    for name in names[:2]:
        setup.scripts[name] = f"sleep 0.1; {FINISH}"
    runner = setup.runner()
    setup.loop(runner)
    assert setup.most == 2 and not runner.failed and not runner.active
    assert all(run.finished for run in setup.runs)
    assert [name for event, name in setup.events if event == "begun"] == names
    assert sorted(name for event, name in setup.events if event == "finished") == sorted(names)
    for (command, env), run in zip(setup.started, setup.runs, strict=True):
        words = [sys.executable, "-m", "flowgrpo", "train", "--run.resume", str(run.folder)]
        assert command == [*words, "--run.threads", "1"]
        assert env["OMP_NUM_THREADS"] == "1" and env["PATH"] == os.environ["PATH"]
    [attempt] = attempts(setup.out)[names[0]]
    assert (attempt.exit, attempt.error, attempt.machine) == (0, "", "a CPU")
    assert (attempt.threads, attempt.at_once, attempt.commit) == (1, 2, "abc")


@pytest.mark.slow
def test_a_finished_run_is_not_run_again(setup):
    comparisons.write_run(setup.runs[1], [comparisons.evaluation(0, 0.0, [1] * 6)])
    setup.loop(setup.runner())
    assert setup.runs[1].name not in {name for _, name in setup.events}
    assert len(setup.started) == 3


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_the_others_go_on(setup):
    names = [run.name for run in setup.runs]
    setup.scripts[names[0]] = "echo 'loading'; echo 'error: no luck' >&2; exit 3"
    setup.scripts[names[1]] = "kill -KILL $$"
    setup.scripts[names[2]] = "exit 0"
    runner = setup.runner()
    setup.loop(runner)
    # The third ended well and left no result: it has failed too.
    assert {(a.run, a.exit, a.error) for a in runner.failed} == {
        (names[0], 3, "error: no luck"),
        (names[1], -9, ""),
        (names[2], 1, ""),
    }
    assert setup.runs[3].finished
    # The next call tries them again.
    setup.scripts.clear()
    again = setup.runner()
    setup.loop(again)
    assert all(run.finished for run in setup.runs) and not again.failed
    assert [a.exit for a in attempts(setup.out)[names[0]]] == [3, 0]
    assert len(attempts(setup.out)[names[3]]) == 1


@pytest.mark.slow
def test_stopping_asks_each_process_once_and_starts_no_other(setup):
    for run in setup.runs:
        setup.scripts[run.name] = ON_SIGNAL
    stop, runner = Stop(), setup.runner()

    def tick():
        if all((run.folder / "ready").exists() for run in setup.runs[:2]):
            stop.requested = True

    setup.loop(runner, stop, tick)
    assert len(setup.started) == 2 and not runner.failed
    assert [event for event, _ in setup.events].count("stopped") == 2
    for run in setup.runs[:2]:
        assert (setup.out / "logs" / f"{run.name}.log").read_text() == "saved\n"
        [attempt] = attempts(setup.out)[run.name]
        assert attempt.stopped and attempt.exit == 130 and attempt.error == ""
    assert [run.name for run in runner.waiting] == [run.name for run in setup.runs[2:]]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_what_does_not_want_to(setup, monkeypatch):
    monkeypatch.setattr(running, "GRACE", 0.1)
    deaf = "trap '' INT TERM; echo ready > %s/ready; while :; do sleep 0.02; done"
    setup.scripts[setup.runs[0].name] = deaf
    setup.scripts[setup.runs[1].name] = ON_SIGNAL
    runner, processes = setup.runner(), []

    def tick():
        if all((run.folder / "ready").exists() for run in setup.runs[:2]):
            processes.extend(process.popen for process in runner.active)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup.loop(runner, tick=tick)
    assert not runner.active and len(processes) == 2
    assert processes[0].returncode == -signal.SIGKILL
    assert all(attempts(setup.out)[run.name][0].stopped for run in setup.runs[:2])


def test_a_process_takes_ctrl_c_that_its_parent_ignores(tmp_path):
    """As a shell's background command does, which would then never save."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with open(tmp_path / "log", "wb") as log:
            process = start_process(["sh", "-c", "kill -INT $$; exit 3"], log, dict(os.environ))
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.wait(10) == -signal.SIGINT


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_process_ends_with_its_parent(tmp_path):
    """Also one that is killed, and can tell nobody."""
    parent = processes.Fork(tmp_path / "parent", start_and_wait, tmp_path / "log")
    wait_for(lambda: "ready" in read(tmp_path / "log"))
    parent.kill(signal.SIGKILL)
    parent.wait(code=-signal.SIGKILL)
    wait_for(lambda: "ended" in read(tmp_path / "log"))


def start_and_wait(log: Path) -> None:
    script = "trap 'echo ended; exit' TERM; echo ready; while :; do sleep 0.02; done"
    start_process(["sh", "-c", script], open(log, "wb"), None)  # noqa: SIM115
    time.sleep(60)


def read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def wait_for(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def train_line(iteration: int, rows: int = 8) -> dict:
    seconds = {"rollout": 0.5, "reward": 0.25, "update": 0.25}
    return {"iteration": iteration, "kind": "train", "reward": 0.0, "seconds": seconds}


def append(run, *lines, end: str = "\n") -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write("\n".join(map(json.dumps, lines)) + end)


@pytest.mark.slow
def test_memory_decides_when_the_next_may_begin(setup, monkeypatch):
    """The first alone, until it is through two iterations; then as many as there is memory for."""
    gigabyte, sizes = 1 << 30, {}
    monkeypatch.setattr(machine, "process_memory", lambda pid: sizes.get(pid, (0, 0)))
    first = setup.runs[0]
    for run in setup.runs:
        setup.scripts[run.name] = f"while [ ! -f {setup.out}/go ]; do sleep 0.01; done; {FINISH}"
    runner, steps = setup.runner(Slots(4, 1)), []

    def free() -> int:
        taken = sum(sizes.get(process.popen.pid, (0, 0))[0] for process in runner.active)
        return int(6.7 * gigabyte) - taken

    monkeypatch.setattr(machine, "free_memory", free)

    def tick():
        steps.append(len(runner.active))
        for process in runner.active:
            sizes[process.popen.pid] = (gigabyte, 2 * gigabyte)
        if len(steps) == 5:
            append(first, train_line(1), train_line(2))
        if len(steps) == 12:
            (setup.out / "go").write_text("")

    setup.loop(runner, tick=tick)
    # Three of 2 GB fit into 6.7 GB, a fourth does not, and takes its turn.
    assert steps[:5] == [1] * 5 and max(steps) == 3 == steps[11], steps
    assert runner.need == 2 * gigabyte and all(run.finished for run in setup.runs)


@pytest.mark.parametrize(
    ("free", "need", "active", "fits"),
    [
        (10.0, 2.0, 0, True),
        (0.1, 2.0, 0, True),
        (2.3, 2.0, 1, False),
        (3.3, 2.0, 1, True),
        (3.3, 2.0, 2, False),
        (4.3, 2.0, 2, True),
        (9.0, 0.0, 1, False),
        (None, 2.0, 1, True),
    ],
)
def test_how_much_memory_is_enough(setup, monkeypatch, free, need, active, fits):
    """Each that is active has 1 GB of the 2 GB that it will take; 10 % are kept free."""
    gigabyte = 1 << 30
    monkeypatch.setattr(machine, "free_memory", lambda: free and int(free * gigabyte))
    monkeypatch.setattr(machine, "process_memory", lambda pid: (gigabyte, gigabyte))
    runner = setup.runner(Slots(4, 1), estimate=int(need * gigabyte))

    class Active:
        peak, progress = 0, Progress(setup.runs[0])
        popen = type("P", (), {"pid": 1})()

    runner.active = [Active()] * active
    assert runner._next_fits() is fits
    runner.active = []


@pytest.mark.slow
def test_gpus_are_taken_one_each(setup):
    for run in setup.runs[:2]:
        setup.scripts[run.name] = f"sleep 0.1; {FINISH}"
    setup.loop(setup.runner(Slots(2, 4, ("0", "GPU-7"), by_memory=False)))
    devices = [env["CUDA_VISIBLE_DEVICES"] for _, env in setup.started]
    assert sorted(devices[:2]) == ["0", "GPU-7"] and set(devices) == {"0", "GPU-7"}
    assert attempts(setup.out)[setup.runs[0].name][0].machine == "GPU 0"


@pytest.mark.parametrize(
    ("jobs", "runs", "device", "gpus", "expected"),
    [
        ("auto", 21, "auto", [], (8, 1, (), True)),
        ("auto", 3, "cpu", [], (3, 2, (), True)),
        (2, 21, "auto", [], (2, 4, (), False)),
        (16, 21, "auto", [], (16, 1, (), False)),
        (16, 3, "auto", [], (3, 2, (), False)),
        ("auto", 21, "auto", ["0", "1"], (2, 4, ("0", "1"), False)),
        ("auto", 21, "cpu", ["0", "1"], (8, 1, (), True)),
        ("auto", 21, "cuda:1", ["0", "1"], (1, 8, (), False)),
        (4, 21, "cuda", ["0", "1"], (4, 2, ("0", "1"), False)),
    ],
)
def test_how_the_machine_is_shared(monkeypatch, tmp_path, jobs, runs, device, gpus, expected):
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.setattr(machine, "gpus", lambda: gpus)
    config = replace(comparisons.recipe(tmp_path), **{"policy.device": device})
    slots = share_machine(jobs, runs, config)
    assert (slots.count, slots.threads, slots.gpus, slots.by_memory) == expected


def test_jobs_below_one_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="--jobs is 0, but auto or at least 1 is expected"):
        share_machine(0, 1, comparisons.recipe(tmp_path))


def test_progress_reads_what_is_new(setup):
    run = setup.runs[0]
    progress = Progress(run)
    progress.update()
    assert (progress.iteration, progress.share, progress.evaluated) == (0, 0.0, -1)
    evaluation = comparisons.evaluation(0, 0.0, [1, 0])
    append(run, evaluation, train_line(1), {**train_line(2)}, end="")
    progress.update()
    # The last line has no end yet, and counts once it has.
    assert (progress.iteration, progress.seconds, progress.accuracy) == (1, 1.0, 0.5)
    append(run, end="\n")
    progress.update()
    assert (progress.iteration, progress.images, progress.share) == (2, 16, 0.5)
    # Gone on with from a checkpoint: the file is shorter, and grows again.
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text("".join(lines[:1]))
    progress.update()
    assert (progress.iteration, progress.seconds, progress.evaluated) == (0, 0.0, 0)


def test_the_share_is_of_the_budget_that_is_furthest_from_its_end(setup):
    run = setup.runs[0]
    changed = replace(run.config, **{"run.min_seconds": 10.0})
    progress = Progress(type(run)(run.arm, run.seed, changed))
    append(run, train_line(1), train_line(2))
    progress.update()
    assert progress.share == 0.2


def test_the_last_line_of_a_log(tmp_path):
    path = tmp_path / "log"
    assert last_line(path) == ""
    path.write_text("a\nerror: b  \n\n \n")
    assert last_line(path) == "error: b"
    path.write_bytes(b"x" * 100_000 + b"\nimages 1/9\rimages 2/9\r")
    assert last_line(path) == "images 2/9"
    path.write_bytes(b"\xff\xfe broken\n")
    assert last_line(path).endswith("broken")
