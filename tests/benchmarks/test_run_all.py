"""run_all.py: calls of five minutes whose parts exist, stop in time, do not stop each other; and a
rehearsal of all of them with tiny models on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import runpy
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import bench_blocks
import bench_kernels
import run_all
from measuring import parts as running
from measuring import suites
from models import cases
from providers import pool
from reporting import plots, records
from support import processes

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = runpy.run_path(str(BENCHMARKS / "__main__.py"))["PROGRAMS"]

PYTHON = sys.executable
SLEEPER = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved', flush=True)"
COMPILER = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {SLEEPER!r}])"
"""A command that waits for another one, as a suite does for a compiler."""
ROW = {"suite", "case", "provider", "metric", "value", "unit"}
UNITS = {
    "images": "images/s",
    "images_with_decoding": "images/s",
    "decoding": "ms/image",
    "step": "ms",
    "micro_step": "ms",
    "time": "s",
    "rate": "TFLOP/s",
    "matmul": "TFLOP/s",
    "copy": "GB/s",
    "of_measured": "%",
    "peak_memory": "GiB",
    "peak_tensors": "GiB",
    "max_ratio_error": "1",
    "out_of_memory": "1",
    "speedup_vs_eager": "x",
}


def say(text):
    return [PYTHON, "-c", text]


def session(monkeypatch, *parts):
    """Parts in place of those of call 1."""
    empty = {call: [] for call in ("2", "3", "more")}
    monkeypatch.setattr(run_all.Plan, "calls", lambda self: {"1": list(parts), **empty})


@pytest.fixture
def in_the_background():
    """As a script's `python run_all.py &`: SIGINT is ignored, also by what it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _termination():
    """`main` changes what SIGTERM does."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def overrunning(budget=1.0):
    return running.Part("slow", budget, [say(COMPILER)])


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the foreground", "in the background"])
def test_every_part_is_reported_and_one_that_overruns_is_ended(
    tmp_path, capsys, request, where, monkeypatch
):
    """With all that it has started, which is interrupted first."""
    if where == "in the background":
        request.getfixturevalue("in_the_background")
    words = [say("print('one')"), say("import os; print(os.environ['WORD'])")]
    session(
        monkeypatch,
        overrunning(),
        running.Part("good", 30, words, {"WORD": "two"}),
        running.Part("bad", 30, [say("raise SystemExit(3)"), say("print('never')")]),
        running.Part("missing", 30, [say("print('never')")], absent="no such tool"),
    )
    out, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    start = time.monotonic()
    assert run_all.main(["--out", str(out), "--archive", str(archive)]) == 1
    assert time.monotonic() - start < 60
    summary = json.loads((out / "summary.json").read_text())
    assert [(d["part"], d["result"]) for d in summary] == [
        ("slow", "stopped after 1 s"), ("good", "passed"), ("bad", "failed with 3"),
        ("missing", "absent: no such tool"),
    ]  # fmt: skip
    assert "saved" in (out / "slow.log").read_text()
    assert "one\n" in (out / "good.log").read_text() and "two" in capsys.readouterr().out
    assert "never'" not in (out / "bad.log").read_text().split("\n", 1)[1]
    with tarfile.open(archive) as packed:
        assert "out/summary.json" in packed.getnames()


class Clock:
    """Time that passes while parts run, as long as each takes or is given."""

    def __init__(self, monkeypatch, **seconds):
        self.now, self.seconds, self.granted = 0.0, seconds, {}
        monkeypatch.setattr(run_all.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(running, "execute", self.execute)

    def execute(self, part, out, folder, seconds):
        self.granted[part.name] = seconds
        spent = min(self.seconds[part.name], seconds)
        self.now += spent + (running.GRACE if spent < self.seconds[part.name] else 0)
        result = "passed" if spent == self.seconds[part.name] else "stopped"
        return {"part": part.name, "result": result, "seconds": spent}


def test_a_part_has_what_earlier_ones_left_and_the_call_its_limit(monkeypatch, tmp_path):
    names = ("short", "long", "endless", "last", "late")
    session(monkeypatch, *(running.Part(name, 50, []) for name in names))
    clock = Clock(monkeypatch, short=10, long=80, endless=10_000, last=1, late=1)
    assert run_all.main(["--out", str(tmp_path), "--call", "1", "--total", "180"]) == 1
    # Of 50 each: 40 are left over, 10 of them again.
    assert clock.granted == {"short": 50, "long": 90, "endless": 60}
    assert clock.now == 10 + 80 + 60 + running.GRACE <= 180
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [d["result"] for d in summary[3:]] == ["not begun: no time left"] * 2


def test_a_call_that_is_killed_leaves_what_there_was(monkeypatch, tmp_path):
    session(monkeypatch, running.Part("good", 30, []), running.Part("deadly", 30, []))

    def execute(part, *arguments):
        if part.name == "deadly":
            raise SystemExit(9)
        return {"part": part.name, "result": "passed", "seconds": 1.0}

    monkeypatch.setattr(running, "execute", execute)
    archive = tmp_path / "out.tar.gz"
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(tmp_path / "out"), "--archive", str(archive)])
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [(d["part"], d["result"]) for d in summary] == [
        ("good", "passed"), ("deadly", "not finished")
    ]  # fmt: skip
    # Another call adds to it.
    session(monkeypatch, running.Part("more", 30, []), running.Part("good", 30, []))
    assert run_all.main(["--out", str(tmp_path / "out"), "--parts", "more"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [d["part"] for d in summary] == ["good", "deadly", "more"]
    with tarfile.open(archive) as packed:
        assert "out/summary.json" in packed.getnames()


@pytest.mark.slow
def test_without_an_installation_the_tree_itself_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "there")
    show = say("import os; print(os.environ['PYTHONPATH'])")
    session(
        monkeypatch,
        running.Part("build", 30, [say("raise SystemExit(1)")]),
        running.Part("next", 30, [show]),
    )
    assert run_all.main(["--out", str(tmp_path)]) == 1
    paths = (tmp_path / "next.log").read_text().splitlines()[-1].split(os.pathsep)
    assert paths == [str(run_all.ROOT), str(run_all.ROOT / "kernels"), "there"]


def test_which_packages_are_there():
    assert run_all.has("pytest") and run_all.has("typing_extensions")
    assert not run_all.has("no_such_package")


def test_an_unknown_part(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_all.main(["--out", str(tmp_path), "--parts", "nanoo"])
    assert "not nanoo" in capsys.readouterr().err


def plan(tmp_path, smoke=False, wheels=None):
    args = argparse.Namespace(out=tmp_path, smoke=smoke, wheels=wheels, scale=1.0)
    return run_all.Plan(args).calls()


@pytest.fixture(scope="module")
def every_case():
    """Script -> the real cases and those of smoke runs, and how they are named."""
    training = lambda case: case.training_name  # noqa: E731
    return {
        "bench_rollout.py": (cases.rollout, lambda case: case.name),
        "bench_update.py": (cases.update, training),
        "bench_iteration.py": (cases.iteration, training),
    }


@pytest.mark.parametrize("smoke", [False, True])
def test_commands_are_what_the_scripts_take(smoke, tmp_path, every_case):
    calls = plan(tmp_path, smoke)
    for call, parts in calls.items():
        names = [part.name for part in parts]
        assert len(set(names)) == len(names) and names[0] == "build"
        # What is planned fits into the limit, whoever overruns.
        if call in ("1", "2", "3"):
            assert sum(part.budget for part in parts) <= run_all.LIMIT + 15 < 301, call
    names = {part.name for parts in calls.values() for part in parts}
    assert {"bits", "kernels", "nano", "tests", "rollout", "update", "iteration"} <= names
    assert {"memory", "blocks", "rollout-flux", "sanitizer", "compiled-rollout"} <= names
    for part in (part for parts in calls.values() for part in parts):
        for command in part.commands:
            script = Path(command[1])
            if script.name == "bench_blocks.py":
                assert bench_blocks.cases(smoke, bench_blocks.parse(command[2:]).cases)
            elif script.name == "bench_kernels.py":
                parsed = bench_kernels.parse(command[2:])
                shapes = bench_kernels.LARGE_SHAPES if parsed.large else {}
                shapes = bench_kernels.SMOKE_SHAPES if smoke else shapes | bench_kernels.SHAPES
                listed = [case.name for case in bench_kernels.cases(shapes, parsed.cases)]
                assert listed and (part.name != "kernels" or smoke or len(listed) == 18)
            elif script.name.startswith("bench_"):
                parser = suites.parser("", "ours")
                parser.add_argument("--memory", action="store_true")
                parsed = parser.parse_args(command[2:])
                assert parsed.budget < part.budget and parsed.out.parent == tmp_path
                assert set(suites.listed(parsed.providers)) <= set(pool.PROVIDERS)
                # Only where there are minutes for it is anything compiled.
                later = {"compile", "ours-compiled"} & set(suites.listed(parsed.providers))
                assert smoke or not later or part.name.startswith("compiled-")
                real, name = every_case[script.name]
                assert suites.choose(real(smoke), parsed, name)
            elif script == BENCHMARKS:
                assert command[2] in PROGRAMS
            elif script.suffix == ".py":
                assert script.exists()


def test_the_files_with_gpu_tests(tmp_path):
    """Those alone: of the others some want libraries that a GPU machine may not have."""
    bits, tests = (
        next(part for part in plan(tmp_path)["1"] if part.name == name)
        for name in ("bits", "tests")
    )
    for part in (bits, tests):
        [command] = part.commands
        files = [Path(word).name for word in command if word.endswith(".py")]
        assert {"test_gpu.py", "test_cuda_graphs_gpu.py", "test_suites_gpu.py"} <= set(files)
        assert set(files[:2]) == {"test_gpu.py", "test_cuda_graphs_gpu.py"}
        assert not {"test_cli.py", "test_packaging.py", Path(__file__).name} & set(files)
        assert f"--junitxml={tmp_path / part.name}.xml" in command
    text = (BENCHMARKS.parent / "tests" / "kernels" / "test_gpu.py").read_text()
    # The expression of the first part is about tests that are there.
    assert all(f"def test_{name}" in text for name in ("compiled_gives_the_bits", "captured_"))


def test_wheels_are_installed_without_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr(run_all.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run_all, "has", lambda name: name == "diffusers")
    for name in ("tyro-1.0", "diffusers-0.1"):
        (tmp_path / f"{name}-py3-none-any.whl").write_bytes(b"")
    build, bits, *_ = plan(tmp_path, wheels=tmp_path)["1"]
    wheels, project, *_ = build.commands
    assert "--no-index" in wheels and wheels[-1].endswith("tyro-1.0-py3-none-any.whl")
    # What is there stays as it is.
    assert not any("diffusers" in word for word in wheels)
    assert {"--no-deps", "--no-build-isolation", str(run_all.ROOT)} <= set(project)
    assert "-n" not in bits.commands[0]
    (tmp_path / "pytest_xdist-3.8.0-py3-none-any.whl").write_bytes(b"")
    _, bits, *_ = plan(tmp_path, wheels=tmp_path)["1"]
    assert bits.commands[0][bits.commands[0].index("-n") + 1] == "8"


class Forked:
    """A command in a process that has everything imported, with the face of a Popen."""

    def __init__(self, command, log, folder, env):
        self.fork = processes.Fork(Path(log.name), _become, command[1:], env)
        self.pid = self.fork.process.pid

    @property
    def returncode(self):
        return self.fork.process.exitcode

    def wait(self, timeout=None):
        self.fork.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a part", timeout)


def _become(words, env):
    """`python WORDS`, of a script, a folder or `-m MODULE`."""
    os.environ.update(env)
    if words[0] == "-m":
        processes.run_module(*words[1:])
    else:
        processes.run_script(Path(words[0]), run_all.ROOT, *words[1:])


@pytest.mark.slow
def test_rehearsal(tmp_path, monkeypatch, capsys):
    """All parts of the three calls with tiny models: each passes within its time and leaves a whole
    record."""
    real = running.execute

    def execute(part, out, folder, seconds):
        if part.name in ("bits", "tests"):
            # Two pytests with nothing to do on a CPU; test_commands_are_what_the_scripts_take.
            return {"part": part.name, "result": "passed", "seconds": 0.0}
        return real(part, out, folder, seconds, Forked)

    monkeypatch.setattr(running, "execute", execute)
    code = run_all.main(["--smoke", "--out", str(tmp_path), "--commit", "rehearsed"])
    summary = {d["part"]: d for d in json.loads((tmp_path / "summary.json").read_text())}
    logs = {name: (tmp_path / f"{name}.log").read_text()[-1500:] for name, d in summary.items()
            if d["result"] != "passed" and (tmp_path / f"{name}.log").exists()}  # fmt: skip
    assert code == 0 and not logs, logs
    calls = plan(tmp_path, smoke=True)
    assert set(summary) == {part.name for call in "123" for part in calls[call]}
    metrics, rows = {}, {}
    for part in (part for call in "123" for part in calls[call]):
        if "bench_" in part.commands[0][1]:
            record = records.read(tmp_path / f"{part.name}-cpu.json")
            assert record["failures"] == [] and record["skipped"] == [], part.name
            assert (
                "--smoke" in record["command"] and "python benchmarks/bench_" in record["command"]
            )
            rows[part.name] = record["rows"]
            for row in record["rows"]:
                assert set(row) == ROW and row["value"] >= 0
                assert part.name in ("kernels", "blocks") or row["unit"] == UNITS[row["metric"]], (
                    row
                )
                metrics.setdefault((part.name, row["provider"]), set()).add(row["metric"])
    assert "bandwidth" in metrics["kernels", "ours"] and "bandwidth" in metrics["blocks", "eager"]
    assert {name for part, name in metrics if part == "kernels"} == {
        "ours", "eager", "reference", "ceiling"
    }  # fmt: skip
    assert {row["case"].split()[0] for row in rows["kernels"]} == set(bench_kernels.OPS)
    rates = {"rate", "of_measured"}
    images = rates | {"images", "images_with_decoding", "decoding", "step", "peak_memory"}
    whole = rates | {"time", "images", "max_ratio_error"}
    for part, shared in (("rollout", images), ("iteration", whole)):
        for name in ("ours", "ours-fused"):
            assert metrics[part, name] == shared | {"speedup_vs_eager"}
        assert metrics[part, "eager"] == shared
    for name in ("ours", "ours-offload", "eager"):
        assert metrics["memory", name] == {"peak_memory", "peak_tensors"}
    assert metrics["update", "eager"] == rates | {"micro_step", "peak_memory", "max_ratio_error"}
    for part in ("update", "update-flux"):
        assert records.find(rows[part], provider="ours", metric="max_ratio_error") == 0.0
    assert metrics["compiled-rollout", "ours-fused"] == metrics["rollout-flux", "ours"] == images
    ceiling = records.find(rows["rollout"], provider="ceiling", metric="images")
    share = records.find(rows["rollout"], provider="ours", metric="of_measured")
    per_second = records.find(rows["rollout"], provider="ours", metric="images")
    assert per_second / ceiling == pytest.approx(share / 100, rel=1e-3)
    for part, options in (("rollout", ()), ("kernels", ("--cases", "odd"))):
        plots.main([str(tmp_path / f"{part}-cpu.json"), "--out", str(tmp_path / "p.png"), *options])
        assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
        (tmp_path / "p.png").unlink()
    assert (tmp_path / "nano" / "summary.json").exists()
    assert "every kernel ran on cpu" in (tmp_path / "sanitizer.log").read_text()
