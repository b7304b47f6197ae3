"""Imports: `kernels/` shadows nobody, dependencies are declared, stages import downwards only.

The rules on arrows hold for all imports: at the top of a file, inside functions, and under
TYPE_CHECKING. An import through a package's `__init__` counts as one of the file that defines the
name, and what Python itself imports on the way (the `__init__` of the packages above) does not.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import importlib
import importlib.util
import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it
    import tomli as tomllib

from support import hf_kernels, torch_fork

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "flowgrpo_kernels"
TRAINER = ROOT / "flowgrpo"

# One training step in the order of the data: a stage may use what comes before it, never after it.
STAGES = (
    "prompts",
    "policies",
    "sampling",
    "rewards",
    "objectives",
    "update",
    "train",
    "cli",
)
# Tools of all stages, which know none of them.
TOOLS = ("records", "seeds", "files", "config", "distributed")
# Rooms beside the stages -> the stages that may use them. Evaluation is sampling and rewards once
# more; runs/ saves, shows and evaluates for update and train.
BESIDE = {
    "curation": {"objectives", "cli"},
    "evaluation": {"cli"},
    "runs": {"update", "train", "cli"},
    "comparison": {"cli"},
    "recipes": {"cli"},
}
ENTRIES = 24
"""Files and folders on the first level of flowgrpo/, at most: what one look takes in."""

# What `import transformers, diffusers` reach only when a model is imported.
PROBE = """
import sys
import transformers, diffusers
from transformers import CLIPTextModelWithProjection
from diffusers import StableDiffusion3Pipeline
print(__import__("importlib.util").util.find_spec("kernels").origin)
"""


# Importing both libraries takes seconds, and only a fresh process shows what shadows what.
def probe(*extra_path: Path) -> str:
    """Import the two libraries with the repository root first on sys.path, as pytest has it; where
    their `kernels` comes from."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, extra_path)]),
        "HF_HUB_OFFLINE": "1",
    }
    done = torch_fork.run(PROBE, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()[-1]


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_transformers_and_diffusers_without_hf_kernels(monkeypatch):
    """Both look for it with the root first on the path, as they do when the tests begin."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    from diffusers.utils import import_utils
    from transformers.utils import is_kernels_available

    spec = importlib.util.find_spec("kernels")
    if spec.origin is not None:
        pytest.skip(f"Hugging Face's kernels is installed here ({spec.origin})")
    is_kernels_available.cache_clear()
    assert not is_kernels_available() and not import_utils._is_package_available("kernels")[0]


@pytest.mark.slow
def test_transformers_and_diffusers_with_hf_kernels(tmp_path):
    hf_kernels.install(tmp_path)
    assert Path(probe(tmp_path)).is_relative_to(tmp_path)


def imports_of(file: Path, root: Path) -> set[str]:
    """Absolute names of all a file imports, also inside functions; not under TYPE_CHECKING."""
    package = list(file.relative_to(root).parent.parts)
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{stem}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text()))
    return found


def test_kernels_never_import_the_trainer():
    for file in KERNELS.rglob("*.py"):
        for name in imports_of(file, ROOT / "kernels"):
            assert name.split(".")[0] != "flowgrpo", f"{file} imports {name}"


def modules(root: Path, package: str) -> dict[str, Path]:
    """Dotted name -> file of the modules of a package below `root`."""
    names = {}
    for file in (root / package).rglob("*.py"):
        parts = file.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return names


@functools.cache
def imported(module: str, file: Path) -> list[tuple[str, str, str]]:
    """(module, name in it or "", name here) of each import in a file, wherever it stands."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    imports = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imports += [(alias.name, "", alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")
            base = above[: len(above) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            imports += [(source, alias.name, alias.asname or alias.name) for alias in node.names]
    return imports


@functools.cache
def defined(file: Path) -> set[str]:
    """Names of the classes and functions of a file."""
    body = ast.parse(file.read_text(encoding="utf-8")).body
    return {node.name for node in body if hasattr(node, "name")}


def defines(file: Path, name: str) -> bool:
    """Whether a class or function of that name is defined in a file."""
    return name in defined(file)


def definer(names: dict[str, Path], source: str, name: str) -> str | None:
    """The module that `from source import name` leads to; None for one of another package."""
    if f"{source}.{name}" in names:
        return f"{source}.{name}"
    if source in names and names[source].name == "__init__.py":
        for below, original, here in imported(source, names[source]):
            if here == name and (module := definer(names, below, original)):
                return module
        if defines(names[source], "__getattr__"):
            # The package imports the name when it is first asked for.
            inside = [m for m in names if m.rpartition(".")[0] == source]
            if homes := [m for m in inside if defines(names[m], name)]:
                [home] = homes
                return home
    return source if source in names else None


@functools.cache
def file_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports."""
    names = modules(root, package)
    graph = {}
    for module, file in names.items():
        targets = {definer(names, source, name) for source, name, _ in imported(module, file)}
        graph[module] = targets - {None, module, package}
    return graph


def room_graph(root: Path, package: str) -> dict[str, set[str]]:
    """Room (file or folder on the first level of a package) -> the rooms that it imports."""
    rooms: dict[str, set[str]] = {}
    for module, targets in file_graph(root, package).items():
        if module != package:
            room = module.split(".")[1]
            rooms.setdefault(room, set()).update(t.split(".")[1] for t in targets)
    return {room: targets - {room} for room, targets in rooms.items()}


ROOTS = pytest.mark.parametrize(
    ("root", "package"),
    [(ROOT, "flowgrpo"), (ROOT / "kernels", "flowgrpo_kernels")],
    ids=["trainer", "kernels"],
)


@ROOTS
@pytest.mark.parametrize("graph", [file_graph, room_graph])
def test_imports_have_no_circle(graph, root, package):
    """Neither between rooms nor between files; `CycleError` names the files of one."""
    arrows = graph(root, package)
    assert len(arrows) > 10 and sum(map(len, arrows.values())) > 20
    list(graphlib.TopologicalSorter(arrows).static_order())


def test_stages_import_downwards_only():
    graph = room_graph(ROOT, "flowgrpo")
    assert set(STAGES) | set(TOOLS) | set(BESIDE) <= set(graph)
    for i, stage in enumerate(STAGES):
        assert not graph[stage] & set(STAGES[i + 1 :]), f"{stage} imports a later stage"
        for room, users in BESIDE.items():
            assert stage in users or room not in graph[stage], f"{stage} imports {room}"


def test_tools_of_all_stages_import_none():
    graph = room_graph(ROOT, "flowgrpo")
    for tool in TOOLS:
        rooms = graph[tool] - set(TOOLS)
        assert not rooms, f"{tool} imports {rooms}"


def test_recipes_are_configurations_only():
    """A recipe is looked up without a model, a reward or torch."""
    assert room_graph(ROOT, "flowgrpo")["recipes"] == {"config", "plan"}


def test_first_level_is_one_look():
    entries = [p for p in TRAINER.iterdir() if p.name != "__pycache__"]
    assert len(entries) <= ENTRIES, sorted(p.name for p in entries)


def test_how_imports_are_counted(tmp_path):
    """Through an `__init__` to the definer, under TYPE_CHECKING, inside functions, relative."""
    files = {
        "__init__": "",
        "room/__init__": "from p.room.base import Base as Base\nfrom p.room import other as other",
        "room/base": "import torch",
        "room/other": "from . import base",
        "lazy/__init__": "def __getattr__(name):\n    ...",
        "lazy/late": "class Late:\n    pass",
        "user": "from p.room import Base\nfrom p.lazy import Late\nfrom p import room",
        "typed": "if TYPE_CHECKING:\n    from p.user import f",
        "inside": "def f():\n    import p.room.other",
    }
    root = tmp_path
    for name, text in files.items():
        file = root / "p" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert file_graph(root, "p") == {
        "p": set(),
        "p.room": {"p.room.base", "p.room.other"},
        "p.room.base": set(),
        "p.room.other": {"p.room.base"},
        "p.lazy": set(),
        "p.lazy.late": set(),
        "p.user": {"p.room.base", "p.lazy.late", "p.room"},
        "p.typed": {"p.user"},
        "p.inside": {"p.room.other"},
    }
    assert room_graph(root, "p") == {
        "room": set(),
        "lazy": set(),
        "user": {"room", "lazy"},
        "typed": {"user"},
        "inside": {"room"},
    }


OLD = (
    *("boards", "budget", "capture", "checkpoints", "commands", "deterministic", "display"),
    *("doctor", "evaluate", "losses", "model_card", "pictures", "prefix", "reports", "rollout"),
    *("scoring", "sections", "validation", "weights", "policies.constants", "policies.embeddings"),
    *("policies.fused", "policies.loading", "rewards.geneval_rules", "rewards.http"),
    *("rewards.judges", "rewards.serve"),
)


@pytest.mark.parametrize("name", OLD)
def test_old_paths_are_gone(name):
    with pytest.raises(ModuleNotFoundError, match=f"flowgrpo.{name}"):
        importlib.import_module(f"flowgrpo.{name}")


def test_documented_paths():
    from flowgrpo import nano, train
    from flowgrpo.config import Config, ConfigError
    from flowgrpo.policies import Conditioning, Policy
    from flowgrpo.recipes import RECIPES, recipe
    from flowgrpo.rewards import RewardError
    from flowgrpo.rewards.options import configurable

    assert list(inspect.signature(train.run).parameters) == ["config", "pipeline", "encode"]
    assert isinstance(nano.recipe(steps=1), Config) and recipe("nano").recipe in RECIPES
    assert issubclass(ConfigError, ValueError) and issubclass(RewardError, Exception)
    assert callable(configurable) and Policy.encode and Conditioning.then


HEAVY = {"torch", "diffusers", "transformers", "flowgrpo_kernels", "numpy", "matplotlib"}
LIGHT = {
    "package": "import flowgrpo",
    "recipes": "from flowgrpo.recipes import recipe; recipe('sd35m_ocr', memory=80.0)",
    "help": "from flowgrpo.cli.main import main; main(['--help'])",
    "train --help": "from flowgrpo.cli.main import main; main(['train', '--help'])",
    "compare --help": "from flowgrpo.cli.main import main; main(['compare', 'methods', '--help'])",
    "options": "from flowgrpo.cli.train import parse_train; parse_train(['--optim.lr', '1'])",
}


@pytest.mark.parametrize("code", LIGHT.values(), ids=LIGHT)
def test_light_imports(code):
    """Help, options and recipes must not wait for torch, which takes seconds."""
    script = f"""
import sys
try:
    {code}
except SystemExit as stop:
    assert not stop.code
heavy = {HEAVY} & set(sys.modules)
assert not heavy, heavy
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout or "help" not in code


def third_party(root: Path, base: Path) -> set[str]:
    """Distributions that the files below ``root`` import, by their names on PyPI."""
    renamed = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "huggingface_hub": "huggingface-hub"}
    renamed["yaml"] = "pyyaml"
    ours = {"flowgrpo", "flowgrpo_kernels", "__future__"}
    tops = {n.split(".")[0] for file in root.rglob("*.py") for n in imports_of(file, base)}
    return {renamed.get(top, top) for top in tops - ours - sys.stdlib_module_names}


def declared(*extras: str) -> set[str]:
    """Distributions in pyproject.toml's dependencies and in these extras of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    names = {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}
    return names - {"flowgrpo"}


@pytest.mark.slow
def test_third_party_imports_are_declared():
    """The kernels import torch and at most Triton, the trainer what its extras declare."""
    assert declared() == {"torch"}
    assert third_party(KERNELS, ROOT / "kernels") == declared("triton")
    imported = third_party(TRAINER, ROOT)
    # paddleocr is the other engine of the OCR reward, for users who have it.
    optional = declared("rewards", "serve", "data", "wandb", "quantize") | {"paddleocr"}
    assert imported <= declared("train") | optional
    # accelerate and tensorboard are imported by diffusers and torch when the trainer asks for it.
    assert declared("train") - imported == {"accelerate", "tensorboard"}
