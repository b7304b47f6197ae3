"""session.py: its parts are commands that exist, stop in time, and do not stop each other."""

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
import session
from measuring import suites
from models import cases

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = runpy.run_path(str(BENCHMARKS / "__main__.py"))["PROGRAMS"]

PYTHON = sys.executable


def say(text):
    return [PYTHON, "-c", text]


@pytest.fixture
def in_the_background():
    """As a script's `python session.py &`: SIGINT is ignored, also by what it starts."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def parts(monkeypatch):
    """Four parts in place of the real ones."""
    sleeper = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('saved')"
    made = [
        session.Part("good", 30, [say("print('one')"), say("import os; print(os.environ['WORD'])")],
                 {"WORD": "two"}),
        session.Part("bad", 30, [say("raise SystemExit(3)"), say("print('never')")]),
        session.Part("slow", 2, [say(sleeper)]),
        session.Part("missing", 30, [say("print('never')")], absent="no such tool"),
    ]  # fmt: skip
    monkeypatch.setattr(session, "parts", lambda args: made)
    return made


@pytest.mark.slow
def test_a_part_has_what_earlier_ones_left(monkeypatch, tmp_path):
    """Within a total; without one every part has its own budget."""
    made = [
        session.Part("short", 4, [say("pass")]),
        session.Part("long", 1, [say("import time; time.sleep(1.6)")]),
        session.Part("next", 1, [say("import time; time.sleep(30)")]),
    ]
    monkeypatch.setattr(session, "parts", lambda args: made)
    assert session.main(["--out", str(tmp_path), "--total", "60"]) == 1
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [d["result"].split()[0] for d in summary] == ["passed", "passed", "stopped"]
    assert sum(d["seconds"] for d in summary) < 6 + session.GRACE
    assert session.main(["--out", str(tmp_path), "--parts", "short,long"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in the foreground", "in the background"])
def test_every_part_runs_and_is_reported(parts, tmp_path, capsys, request, where):
    if where == "in the background":
        request.getfixturevalue("in_the_background")
    out, archive = tmp_path / "out", tmp_path / "out.tar.gz"
    start = time.monotonic()
    assert session.main(["--out", str(out), "--archive", str(archive)]) == 1
    assert time.monotonic() - start < session.GRACE
    summary = json.loads((out / "summary.json").read_text())
    assert [d["result"] for d in summary] == [
        "passed", "failed with 3", "stopped after 2 s", "absent: no such tool"
    ]  # fmt: skip
    assert "one\n" in (out / "good.log").read_text() and "two" in capsys.readouterr().out
    assert (out / "slow.log").read_text().endswith("\nsaved\n")
    assert "never'" not in (out / "bad.log").read_text().split("\n", 1)[1]
    with tarfile.open(archive) as packed:
        assert "out/summary.json" in packed.getnames()


@pytest.mark.slow
def test_the_archive_has_what_there_is_when_the_rest_is_killed(parts, tmp_path, monkeypatch):
    archive = tmp_path / "out.tar.gz"

    def killed(part, *arguments):
        if part.name == "bad":
            raise SystemExit(9)
        return execute(part, *arguments)

    execute = session.execute
    monkeypatch.setattr(session, "execute", killed)
    with pytest.raises(SystemExit):
        session.main(["--out", str(tmp_path / "out"), "--archive", str(archive)])
    with tarfile.open(archive) as packed:
        assert {"out/summary.json", "out/good.log"} <= set(packed.getnames())


@pytest.mark.slow
def test_without_an_installation_the_tree_itself_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "there")
    show = say("import os; print(os.environ['PYTHONPATH'])")
    made = [
        session.Part("build", 30, [say("raise SystemExit(1)")]),
        session.Part("next", 30, [show]),
    ]
    monkeypatch.setattr(session, "parts", lambda args: made)
    assert session.main(["--out", str(tmp_path)]) == 1
    found = (tmp_path / "next.log").read_text().splitlines()[-1].split(os.pathsep)
    assert found == [str(session.ROOT), str(session.ROOT / "kernels"), "there"]


@pytest.mark.slow
def test_chosen_parts_and_the_total(parts, tmp_path, capsys):
    assert session.main(["--out", str(tmp_path), "--parts", "good"]) == 0
    assert not (tmp_path / "bad.log").exists()
    assert session.main(["--out", str(tmp_path), "--parts", "good", "--total", "1"]) == 1
    assert "no time left" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        session.main(["--out", str(tmp_path), "--parts", "goood"])
    assert "not goood" in capsys.readouterr().err


@pytest.fixture(scope="module")
def every_case():
    """Script -> the real cases, and how they are named."""
    training = lambda case: case.training_name  # noqa: E731
    return {
        "bench_rollout.py": (cases.rollout(), lambda case: case.name),
        "bench_update.py": (cases.update(), training),
        "bench_iteration.py": (cases.iteration(), training),
    }


@pytest.mark.parametrize("smoke", [False, True])
def test_commands_are_what_the_scripts_take(smoke, tmp_path, every_case):
    args = argparse.Namespace(out=tmp_path, smoke=smoke, wheels=None, scale=2.0)
    found = session.parts(args)
    names = [part.name for part in found]
    wanted = {"build", "tests", "kernels", "rollout", "update", "iteration", "memory", "nano"}
    assert wanted | {"blocks", "sanitizer"} <= set(names) and len(set(names)) == len(names)
    # Ten minutes for everything, stretched by --scale.
    assert smoke or sum(part.budget for part in found) <= 2 * 600
    for part in found:
        for command in part.commands:
            script = Path(command[1])
            if script.name == "bench_blocks.py":
                assert bench_blocks.cases(False, bench_blocks.parse(command[2:]).cases)
            elif script.name == "bench_kernels.py":
                parsed = bench_kernels.parse(command[2:])
                assert bench_kernels.cases(bench_kernels.SHAPES, parsed.cases)
            elif script.name.startswith("bench_"):
                parser = suites.parser("", "ours")
                parser.add_argument("--memory", action="store_true")
                parsed = parser.parse_args(command[2:])
                assert parsed.budget < part.budget and parsed.out.parent == tmp_path
                assert set(suites.listed(parsed.providers)) <= set(suites.PROVIDERS)
                # Only where there are minutes for it is anything compiled.
                later = {"compile", "ours-compiled"} & set(suites.listed(parsed.providers))
                assert not later or part.name.startswith("compiled-")
                real, name = every_case[script.name]
                assert smoke or suites.choose(real, parsed, name)
            elif script == BENCHMARKS:
                assert command[2] in PROGRAMS
            elif script.suffix == ".py":
                assert script.exists()


def test_the_files_with_gpu_tests(tmp_path):
    """Those alone: of the others some want libraries that a GPU machine may not have."""
    args = argparse.Namespace(out=tmp_path, smoke=False, wheels=None, scale=1.0)
    files = {Path(word).name for word in session.tests(args) if word.endswith(".py")}
    assert {"test_gpu.py", "test_cuda_graphs_gpu.py", "test_suites_gpu.py"} <= files
    assert not {"test_cli.py", "test_packaging.py", Path(__file__).name} & files


def test_wheels_are_installed_without_a_network(tmp_path):
    (tmp_path / "tyro-1.0-py3-none-any.whl").write_bytes(b"")
    args = argparse.Namespace(out=tmp_path, smoke=False, wheels=tmp_path, scale=1.0)
    wheels, project, *_ = session.build(args)
    assert "--no-index" in wheels and wheels[-1].endswith("tyro-1.0-py3-none-any.whl")
    assert {"--no-deps", "--no-build-isolation", str(session.ROOT)} <= set(project)


def test_processes_side_by_side_if_pytest_has_them_or_will(tmp_path, monkeypatch):
    monkeypatch.setattr(session.importlib.util, "find_spec", lambda name: None)
    args = argparse.Namespace(out=tmp_path, smoke=False, wheels=tmp_path, scale=1.0)
    assert "-n" not in session.tests(args)
    (tmp_path / "pytest_xdist-3.8.0-py3-none-any.whl").write_bytes(b"")
    command = session.tests(args)
    assert command[command.index("-n") + 1] == "8"


@pytest.mark.slow
def test_every_kernel_runs_in_the_sanitizers_program(tmp_path):
    done = subprocess.run(
        [PYTHON, BENCHMARKS, "sanitize", "cpu"], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0 and "every kernel ran on cpu" in done.stdout
