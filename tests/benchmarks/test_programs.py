"""python benchmarks NAME: every program is there, explains itself, and a wrong name is answered."""

from __future__ import annotations

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
PROGRAMS = runpy.run_path(str(BENCHMARKS / "__main__.py"))["PROGRAMS"]
SUITES = sorted(BENCHMARKS.glob("bench_*.py"))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_take_their_arguments(name):
    """By their source: what some of them import is optional."""
    path = BENCHMARKS / f"{PROGRAMS[name].replace('.', '/')}.py"
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
    [main] = [function for function in functions if function.name == "main"]
    assert [argument.arg for argument in main.args.args] == ["argv"]
    assert f"python benchmarks {name}" in path.read_text().split('"""')[1]


def run(*words, cwd):
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_names_are_listed_and_checked(tmp_path):
    done = run(BENCHMARKS, "tables", "--check", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "")
    done = run(BENCHMARKS, cwd=tmp_path)
    assert done.returncode == 0 and all(name in done.stdout for name in PROGRAMS)
    done = run(BENCHMARKS, "table", cwd=tmp_path)
    assert done.returncode == 2 and "no program 'table'" in done.stderr


def test_no_module_changes_the_import_path():
    """Python puts the folder on the path of its scripts, pyproject.toml on that of the tests."""
    for path in BENCHMARKS.rglob("*.py"):
        assert "sys.path" not in path.read_text(encoding="utf-8"), path
    assert len(SUITES) == 10
