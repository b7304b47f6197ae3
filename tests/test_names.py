"""Names and docstrings: no placeholders, and a docstring says what a thing does or is.

A name of `PLACEHOLDERS` says how a value came about and not what it is: `found`, of a search for
blocks, is `blocks`. In the code of this repository each of them stood for dozens of different
things, so a reader had to keep the meaning of one word apart from function to function.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flowgrpo", "kernels", "benchmarks")
FILES = sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py"))

PLACEHOLDERS = {
    "found",
    "made",
    "given",
    "own",
    "these",
    "every",
    "told",
    "kept",
    "held",
    "wanted",
}
"""Not as a local, a parameter, an attribute or the name of a function or class."""

OPENERS = {"What", "Whether", "Of", "As"}
"""First words that leave open which thing a docstring is about; a verb or a noun comes first."""

DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of all that a file names: assignments, parameters, attributes, definitions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, DEFINITIONS[1:]):
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.lineno, node.rest


def placeholders(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and name of the placeholders; a leading underscore makes no difference."""
    return [(line, name) for line, name in bound_names(tree) if name.strip("_") in PLACEHOLDERS]


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of the docstrings of public things, those under fields and constants too."""
    for node in ast.walk(tree):
        if not isinstance(node, DEFINITIONS) or getattr(node, "name", "").startswith("_"):
            continue
        if text := ast.get_docstring(node):
            yield node.body[0].lineno, text
        if not isinstance(node, ast.Module | ast.ClassDef):
            continue
        for statement, below in zip(node.body, node.body[1:], strict=False):
            if not isinstance(statement, ast.Assign | ast.AnnAssign):
                continue
            if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
                yield below.lineno, str(below.value.value)


def open_docstrings(tree: ast.AST) -> list[tuple[int, str]]:
    """Line and text of the docstrings that begin with one of `OPENERS`."""
    return [
        (line, text)
        for line, text in docstrings(tree)
        if text.split() and text.split()[0].strip(",.:;") in OPENERS
    ]


def listing(faults: list[tuple[Path, int, str]]) -> str:
    return "\n".join(f"{file.relative_to(ROOT)}:{line}: {text}" for file, line, text in faults)


@pytest.mark.slow
def test_no_placeholder_names():
    faults = [
        (file, line, name)
        for file in FILES
        for line, name in placeholders(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not faults, f"{len(faults)} names say nothing about their values:\n{listing(faults)}"


@pytest.mark.slow
def test_docstrings_begin_with_a_verb_or_a_noun():
    faults = [
        (file, line, text.splitlines()[0])
        for file in FILES
        for line, text in open_docstrings(ast.parse(file.read_text(encoding="utf-8")))
    ]
    assert not faults, f"{len(faults)} docstrings begin with no noun or verb:\n{listing(faults)}"


@pytest.mark.parametrize(
    "code",
    [
        "found = 1",
        "found: int = 1",
        "a, (b, *kept) = x",
        "for own in x: pass",
        "[made for made in x]",
        "def f(*, given): pass",
        "def f(*told): pass",
        "lambda these: 0",
        "self._held = 1",
        "def every(): pass",
        "class wanted: pass",
        "with a as found: pass",
        "import a as found",
        "try: pass\nexcept E as found: pass",
        "if found := 1: pass",
        "match x:\n    case [*found]: pass",
    ],
)
def test_a_placeholder_is_seen_wherever_it_is_bound(code):
    assert len(placeholders(ast.parse(code))) == 1


def test_what_is_no_placeholder():
    """Words inside a name, in strings, and the names of others."""
    code = "found_blocks = x.found\nheld_out = f(given=1)\n'found'\n{'told': 1}"
    assert placeholders(ast.parse(code)) == []


def test_which_docstrings_are_looked_at():
    code = (
        '"""Whether a module."""\n'
        "class A:\n"
        '    """What a class."""\n'
        "    field: int\n"
        '    """Of a field."""\n'
        "    def method(self):\n"
        '        """As a method."""\n'
        "def _private():\n"
        '    """What nobody sees."""\n'
        "def good():\n"
        '    """Whatever, Often, Asked."""\n'
    )
    assert [line for line, _ in open_docstrings(ast.parse(code))] == [1, 3, 5, 7]


def test_the_long_files_of_tests_are_there():
    """Those that begin first are named in conftest.py, and a file may be renamed."""
    tree = ast.parse((ROOT / "tests" / "conftest.py").read_text())
    (value,) = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "LONG"
    ]
    names = {node.value for node in ast.walk(value) if isinstance(node, ast.Constant)}
    assert len(names) > 20 and names <= {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
