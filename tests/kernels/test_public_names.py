"""Private names of flowgrpo_kernels stay private: nothing outside its folder uses one."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "flowgrpo_kernels"
# Functions that take a name as a string, and the place of that name among their arguments.
BY_NAME = {"setattr": 1, "getattr": 1, "hasattr": 1, "delattr": 1}


def private(name: str) -> bool:
    return any(p.startswith("_") and not p.endswith("__") for p in name.split("."))


def of_package(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def imported_names(tree: ast.AST) -> set[str]:
    """Names that a file gives to modules of the package and to what it imports from them."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(a.asname or a.name).split(".")[0] for a in node.names if of_package(a.name)}
        elif isinstance(node, ast.ImportFrom) and of_package(node.module or ""):
            names |= {a.asname or a.name for a in node.names}
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            # MODULE = importlib.import_module("flowgrpo_kernels.grpo_loss")
            strings = [a.value for a in node.value.args if isinstance(a, ast.Constant)]
            if any(isinstance(s, str) and of_package(s) for s in strings):
                names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
    return names


def root_name(node: ast.AST) -> str:
    """The name that a chain of attributes begins with: `a` of a.b.c; empty after a call."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_uses(source: str) -> Iterator[str]:
    """Each use of a private name of the package, as "line: what"."""
    tree = ast.parse(source)
    names = imported_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if of_package(alias.name) and private(alias.name):
                    yield f"{node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and of_package(node.module or ""):
            for alias in node.names:
                if private(f"{node.module}.{alias.name}"):
                    yield f"{node.lineno}: from {node.module} import {alias.name}"
        elif isinstance(node, ast.Attribute) and private(node.attr):
            if root_name(node) in names:
                yield f"{node.lineno}: {ast.unparse(node)}"
        elif isinstance(node, ast.Call):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            function = node.func.id if isinstance(node.func, ast.Name) else function
            arguments = node.args[: BY_NAME.get(function, -1) + 1]
            if len(arguments) == 2 and root_name(arguments[0]) in names:
                value = getattr(arguments[1], "value", None)
                if isinstance(value, str) and private(value):
                    yield f"{node.lineno}: {ast.unparse(node)}"
        # Code for another process.
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
            if f"import {PACKAGE}" in text or f"from {PACKAGE}" in text:
                try:
                    yield from private_uses(textwrap.dedent(text))
                except SyntaxError:
                    continue


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["flowgrpo", "benchmarks", "tests"])
def test_nothing_outside_uses_a_private_name(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    uses = [
        f"{file.relative_to(ROOT)}:{use}"
        for file in files
        if file != Path(__file__).resolve()
        for use in private_uses(file.read_text())
    ]
    assert uses == []


@pytest.mark.parametrize(
    "source",
    [
        "import flowgrpo_kernels._ops",
        "from flowgrpo_kernels import _ops",
        "from flowgrpo_kernels._ops import op",
        "from flowgrpo_kernels.sde_step import _launch as launch",
        "import flowgrpo_kernels as fk\nfk.backends._chosen",
        "from flowgrpo_kernels.backends import dispatch\ndispatch._chosen.clear()",
        "def f():\n    from flowgrpo_kernels.backends import dispatch as d\n    d._requested = 1",
        "from flowgrpo_kernels import reference\nmonkeypatch.setattr(reference, '_mean', None)",
        "M = importlib.import_module('flowgrpo_kernels.grpo_loss')\nM._save",
        'CODE = "from flowgrpo_kernels import _ops; print(1)"',
    ],
)
def test_the_scan_sees_what_it_should(source):
    assert len(list(private_uses(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import flowgrpo_kernels as fk\nfk.__file__",
        "from flowgrpo_kernels.backends import dispatch\ndispatch.op('sde_step')._schema",
        "import other\nother._private\nfrom flowgrpo import _x",
        "from __future__ import annotations",
    ],
)
def test_the_scan_leaves_the_rest_alone(source):
    assert list(private_uses(source)) == []
