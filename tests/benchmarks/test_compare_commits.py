"""compare.py: two commits in turns, behind a green gate, each with its own library."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import subprocess
from pathlib import Path

import pytest

import compare
from measuring.timing import Timing
from measuring.worker import Worker, serve
from reporting import records

LIBRARY = "kernels/flowgrpo_kernels/libflowgrpo_native.so"
SETUP = """
import os, pathlib, sys
assert os.environ["FLOWGRPO_REQUIRE_NATIVE"] == "1"
folder = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1], "flowgrpo_kernels")
folder.mkdir(parents=True)
source = pathlib.Path("kernels/csrc/step.cpp").read_text()
if "error" in source:
    sys.exit("step.cpp:1: error")
(folder / "libflowgrpo_native.so").write_text("of " + source)
(folder / "_native_build.json").write_text("{}")
(folder / "other.py").write_text("")
"""


def git(folder, *words):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    command = ["git", *identity, *words]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A project of three commits: two of equal sources, and one that does not compile."""
    root = tmp_path / "project"
    for name, text in {
        "setup.py": SETUP, "CMakeLists.txt": "", "kernels/csrc/step.cpp": "one",
        "kernels/flowgrpo_kernels/step.py": "first", ".gitignore": "*.so\n_native_build.json",
    }.items():  # fmt: skip
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    git(root, "init", "--quiet")
    for tag, name, text in (
        ("first", "kernels/flowgrpo_kernels/step.py", "second"),
        ("broken", "kernels/csrc/step.cpp", "error"),
        ("second", "kernels/csrc/step.cpp", "two"),
    ):
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", tag)
        git(root, "tag", tag)
        (root / name).write_text(text)
    return root


@pytest.mark.slow
def test_a_tree_of_the_base_has_a_library_of_its_own(repository):
    with compare.worktree("first", repository) as tree:
        assert (tree / "kernels/flowgrpo_kernels/step.py").read_text() == "first"
        assert (tree / LIBRARY).read_text() == "of one"
        assert not (tree / "kernels/flowgrpo_kernels/other.py").exists()
    # Where the sources are equal, the library that is here is taken, and nothing compiled.
    (repository / LIBRARY).write_text("compiled here")
    (repository / "kernels/flowgrpo_kernels/_native_build.json").write_text("{}")
    (repository / "kernels/csrc/step.cpp").write_text("one")
    with compare.worktree("first", repository) as tree:
        assert (tree / LIBRARY).read_text() == "compiled here"
    assert not tree.exists() and len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("base", "words"),
    [("second", "could not be compiled:\nstep.cpp:1: error"), ("third", "finding third failed")],
)
def test_what_cannot_be_built_is_said(repository, base, words, monkeypatch, capsys):
    monkeypatch.setattr(compare.worktree.__wrapped__, "__defaults__", (repository,))
    assert compare.main([base]) == 2
    assert words in capsys.readouterr().err
    assert len(git(repository, "worktree", "list").splitlines()) == 1


@pytest.fixture
def trees(monkeypatch, tmp_path):
    """A base and this tree without a worktree: two folders with a test each."""
    folders = {}
    for name in ("base", "head"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "test_it.py").write_text("def test_it():\n    pass\n")

    class Worktree:
        __init__ = lambda self, base: None  # noqa: E731
        __enter__ = lambda self: folders["base"]  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

    monkeypatch.setattr(compare, "worktree", Worktree)
    monkeypatch.setattr(compare, "ROOT", folders["head"])
    return folders


class Commit:
    """A worker of a commit in this process: 1.25 times as fast as the other."""

    def __init__(self, name, log, seconds, names=("step", "loss")):
        self.log = log

        def round_of(case):
            # Both are slower in every second pair.
            disturbed = itertools.cycle([1, 2])

            def timed():
                log.append((name, case))
                if case == "loss" and name == "base":
                    raise ArithmeticError("no such op\nand more")
                return seconds * next(disturbed)

            return timed

        ready = {case: lambda names, case=case: {"ours": round_of(case)} for case in names}
        timings = [Timing(case, ("ours",), ready[case]) for case in names]
        self.worker = Worker([*timings, Timing("copy", ("ceiling",), dict)], "ours", "cpu")

    def ask(self, **message):
        out = io.StringIO()
        serve(self.worker, io.StringIO(json.dumps(message)), out)
        return json.loads(out.getvalue())

    def leave(self):
        self.log.append("left")


@pytest.mark.slow
def test_nothing_is_timed_while_a_gate_is_red(trees, monkeypatch, capsys):
    """Each tree runs its own tests; a file that one of them does not have is no failure."""
    monkeypatch.setattr(compare, "Tree", None)
    # Toy trees need no plugin, and those of this environment take a second to load.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (trees["head"] / "test_it.py").write_text("def test_it():\n    assert 1 == 2\n")
    assert compare.main(["main", "--gate", "test_it.py test_new.py"]) == 1
    error = capsys.readouterr().err
    assert "assert 1 == 2" in error and "red in head, so nothing is timed" in error


def test_no_tests_at_all_are_no_green_gate(trees, capsys):
    assert not compare.is_green(trees["head"], "test_else.py")


def test_both_take_turns_and_what_fails_is_named(trees, monkeypatch, tmp_path, capsys):
    log, out = [], tmp_path / "compare.json"
    speed = {"base": 1.25e-6, "head": 1e-6}
    monkeypatch.setattr(compare, "is_green", lambda tree, gate: True)
    monkeypatch.setattr(
        compare, "Tree", lambda tree, *options: Commit(tree.name, log, speed[tree.name])
    )
    assert compare.main(["main", "--rounds", "6", "--device", "cpu", "--out", str(out)]) == 1
    rounds = [entry for entry in log if entry[1] == "step"][2:]
    assert all({"base", "head"} == {n for n, _ in rounds[i : i + 2]} for i in range(0, 12, 2))
    # Not always the same one first.
    assert len({rounds[i][0] for i in range(0, 12, 2)}) == 2
    output = capsys.readouterr()
    assert "loss, base: ArithmeticError: no such op" in output.err and "more" not in output.err
    assert "base/head 1.250 [1.250, 1.250]  faster" in output.out
    record = records.read(out)
    assert record["base"] == "main" and len(record["failures"]) == 1
    assert records.find(record["rows"], case="step", metric="base_over_head") == 1.25
    with pytest.raises(SystemExit):
        compare.parse(["main", "--rounds", "1"])


def test_the_interval_holds_the_ratio():
    """Of pairs that share what disturbs them, and of noise around no difference."""
    disturbed = [1.0, 5.0, 2.0, 9.0, 1.5, 3.0]
    one = compare.Comparison("a", [0.9 * t for t in disturbed], disturbed)
    assert one.ratio == pytest.approx(0.9) and one.interval() == pytest.approx((0.9, 0.9))
    assert one.line().endswith("slower")
    noise = [0.8, 1.3, 0.95, 1.1, 1.02, 0.9, 1.2, 0.99]
    equal = compare.Comparison("b", noise, [1.0] * 8)
    low, high = equal.interval()
    assert low < equal.ratio < high and low < 1 < high and equal.line().endswith("no difference")


def test_no_shared_case_is_an_error():
    base, head = Commit("base", [], 1.0, names=("old",)), Commit("head", [], 1.0)
    args = argparse.Namespace(cases="", suite="kernels")
    with pytest.raises(RuntimeError, match="matches no case of suite kernels"):
        compare.compare(base, head, args)


def test_a_process_that_ends_is_an_error(monkeypatch, tmp_path):
    """Its packages cannot be imported, say: the reason is in its output."""
    monkeypatch.setattr(compare.sys, "executable", "/bin/false")
    tree = compare.Tree(tmp_path, "kernels", "ours", "cpu", smoke=True)
    assert tree.ask(list=True) == {"error": "the process ended (see above)"}
    tree.leave()
    assert compare.environment(Path("/base"))["PYTHONPATH"].startswith("/base/kernels:/base")
