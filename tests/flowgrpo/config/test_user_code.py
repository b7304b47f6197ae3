"""Functions of the user's own by module or file: what they shadow, and what an error asks for."""

from __future__ import annotations

import sys

import pytest

from flowgrpo.config import user_code


@pytest.fixture(autouse=True)
def modules(monkeypatch):
    """sys.modules and sys.path as they were, after the test."""
    before = set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_file_stands_for_no_module_of_its_name(tmp_path, monkeypatch):
    """sndhdr, say, has not been imported, and later `import` of it means Python's own."""
    name = next(n for n in ("this", "antigravity", "wave", "zipapp") if n not in sys.modules)
    (tmp_path / f"{name}.py").write_text("def score(): return 'the file'\n")
    assert user_code.import_function(f"{tmp_path}/{name}.py:score")() == "the file"
    assert name not in sys.modules
    # Once more is the same object.
    first = user_code.import_function(f"{tmp_path}/{name}.py:score")
    assert user_code.import_function(f"{tmp_path}/./{name}.py:score") is first


def test_a_file_whose_name_is_no_identifier(tmp_path):
    (tmp_path / "my rewards-2.py").write_text("def score(): return 1\n")
    target = f"{tmp_path}/my rewards-2.py:score"
    assert user_code.import_function(target)() == 1
    assert user_code.source_of(target) == (tmp_path / "my rewards-2.py").resolve()


def test_source_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "users_module_of_code.py").write_text("def score(): return 1\n")
    user_code.import_function("users_module_of_code:score")
    expected = (tmp_path / "users_module_of_code.py").resolve()
    assert user_code.source_of("users_module_of_code:score") == expected
    assert user_code.source_of("no_such_module:score") is None


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    """W&B leaves a folder wandb/ in the working directory, and many a project has datasets/."""
    (tmp_path / "users_folder_of_runs").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not user_code.is_installed("users_folder_of_runs")
    __import__("users_folder_of_runs")
    assert not user_code.is_installed("users_folder_of_runs")
    assert user_code.is_installed("json") and user_code.is_installed("sys")
    assert not user_code.is_installed("no_such_package_at_all")
    monkeypatch.setitem(sys.modules, "no_such_package_at_all", None)
    assert not user_code.is_installed("no_such_package_at_all")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("from .neighbour import x", "import its neighbours by their names"),
        ("import no_such_package_at_all", "install what it needs"),
        ("1 / 0", "correct the file"),
    ],
)
def test_what_to_do_about_an_error(tmp_path, text, words):
    (tmp_path / "users_bad_code.py").write_text(text)
    with pytest.raises(Exception) as error:
        user_code.import_function(f"{tmp_path}/users_bad_code.py:score")
    assert words in user_code.advice(error.value)
