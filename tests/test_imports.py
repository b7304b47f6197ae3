"""Imports: `kernels/` shadows nobody, dependencies are declared, stages import downwards only."""

from __future__ import annotations

import ast
import graphlib
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

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "kernels" / "flowgrpo_kernels"
TRAINER = ROOT / "flowgrpo"

# One training step in the order of the data: a stage may use what comes before it, never after it.
STAGES = (
    "prompts",
    "policies",
    "sampling",
    "rewards",
    "advantages",
    "objectives",
    "update",
    "train",
    "cli",
)

# What `import transformers, diffusers` reach only when a model is imported.
PROBE = """
import sys
import transformers, diffusers
from transformers import CLIPTextModelWithProjection
from diffusers import StableDiffusion3Pipeline
from transformers.utils import is_kernels_available
spec = __import__("importlib.util").util.find_spec("kernels")
print(is_kernels_available(), spec.origin if spec else None)
"""


# Importing both libraries takes seconds, and only a fresh process shows what shadows what.
def probe(*extra_path: Path) -> tuple[str, str]:
    """Import the two libraries with the repository root first on sys.path, as pytest has it."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *map(str, extra_path)]),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    available, origin = done.stdout.split()[-2:]
    return available, origin


def install_hf_kernels(target: Path) -> None:
    """Hugging Face's package, installed for real beside the environment."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary", ":all:", "--target", str(target), "kernels"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    if done.returncode:
        pytest.skip(f"Hugging Face's kernels could not be installed: {done.stderr.strip()[-300:]}")


def test_kernels_folder_is_not_a_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
def test_transformers_and_diffusers_without_hf_kernels():
    available, origin = probe()
    if origin != "None":
        pytest.skip(f"Hugging Face's kernels is installed here ({origin})")
    assert available == "False"


@pytest.mark.slow
def test_transformers_and_diffusers_with_hf_kernels(tmp_path):
    install_hf_kernels(tmp_path)
    _, origin = probe(tmp_path)
    assert Path(origin).is_relative_to(tmp_path)


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


def import_graph() -> dict[str, set[str]]:
    """Module or folder of the trainer -> those it imports, also inside functions."""
    modules = {p.stem for p in TRAINER.glob("*.py")} | {
        p.parent.name for p in TRAINER.glob("*/*.py")
    }
    graph: dict[str, set[str]] = {name: set() for name in modules - {"__init__"}}
    for file in TRAINER.rglob("*.py"):
        here = file.relative_to(TRAINER).parts[0].removesuffix(".py")
        for name in imports_of(file, ROOT):
            parts = [*name.split("."), ""]
            if parts[0] == "flowgrpo" and parts[1] in graph and here in graph and parts[1] != here:
                graph[here].add(parts[1])
    return graph


def test_trainer_imports_have_no_cycle():
    list(graphlib.TopologicalSorter(import_graph()).static_order())


def test_stages_import_downwards_only():
    graph = import_graph()
    assert set(STAGES) <= set(graph)
    for i, stage in enumerate(STAGES):
        assert not graph[stage] & set(STAGES[i + 1 :]), f"{stage} imports a later stage"
    # What several stages share stands on its own.
    assert not graph["records"] & set(STAGES)
    assert not graph["config"] & set(STAGES)


def test_light_imports():
    """The package itself, and the command line's help, must not wait for torch."""
    heavy = "{'torch', 'diffusers', 'transformers'}"
    code = f"import sys, flowgrpo; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def third_party(root: Path, base: Path) -> set[str]:
    """Distributions that the files below ``root`` import, by their names on PyPI."""
    renamed = {"PIL": "pillow", "pynvml": "nvidia-ml-py", "huggingface_hub": "huggingface-hub"}
    ours = {"flowgrpo", "flowgrpo_kernels", "__future__"}
    tops = {n.split(".")[0] for file in root.rglob("*.py") for n in imports_of(file, base)}
    return {renamed.get(top, top) for top in tops - ours - sys.stdlib_module_names}


def declared(*extras: str) -> set[str]:
    """Distributions in pyproject.toml's dependencies and in these extras of it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *(project["optional-dependencies"][e] for e in extras)]
    names = {canonicalize_name(Requirement(text).name) for texts in lists for text in texts}
    return names - {"flowgrpo"}


def test_third_party_imports_are_declared():
    """The kernels import torch and at most Triton, the trainer what its extras declare."""
    assert declared() == {"torch"}
    assert third_party(KERNELS, ROOT / "kernels") == declared("triton")
    imported = third_party(TRAINER, ROOT)
    # paddleocr is the other engine of the OCR reward, for users who have it.
    optional = declared("rewards", "serve", "data", "wandb") | {"paddleocr"}
    assert imported <= declared("train") | optional
    # accelerate and tensorboard are imported by diffusers and torch when the trainer asks for it.
    assert declared("train") - imported == {"accelerate", "tensorboard"}
