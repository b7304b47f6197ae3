"""The wheel: what is in it, what it requires, and that no compiler is needed to install it."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import flowgrpo_kernels
from flowgrpo import __main__ as command

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["setup.py", "pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "MANIFEST.in"]
LIBRARY = "flowgrpo_kernels/libflowgrpo_native"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "setup.py").exists(), reason="needs the source tree, not an installed copy"
    ),
]


def copy_tree(to: Path) -> Path:
    """The files that a wheel is built from, so that a build leaves nothing in the repository."""
    to.mkdir()
    for name in SOURCES:
        shutil.copy(ROOT / name, to / name)
    ignore = shutil.ignore_patterns("__pycache__", "libflowgrpo_native.*", "_native_build.json")
    for name in ("flowgrpo", "kernels"):
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    return to


def build_wheel(tree: Path, **environment: str) -> zipfile.ZipFile:
    """Build with setuptools' own backend, without isolation: no network, no compiler guessed."""
    script = "import sys, setuptools.build_meta as backend\nprint(backend.build_wheel(sys.argv[1]))"
    env = {k: v for k, v in os.environ.items() if not k.startswith("FLOWGRPO_")} | environment
    done = subprocess.run(
        [sys.executable, "-c", script, str(tree / "dist")],
        cwd=tree,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel)


def build_info(wheel: zipfile.ZipFile) -> dict:
    return json.loads(wheel.read("flowgrpo_kernels/_native_build.json"))


# The path from CMake to the wheel, which the optimizer's twenty seconds add nothing to: the library
# that the other tests load was compiled with all of it.
@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("full")
    if shutil.which("c++") is None:
        return build_wheel(copy_tree(folder / "tree"))
    quick = folder / "quick-c++"
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    return build_wheel(copy_tree(folder / "tree"), CXX=str(quick))


NEW = {
    "flowgrpo/room/__init__.py",
    "flowgrpo/room/inner/__init__.py",
    "flowgrpo/room/inner/sets/deep/rows.jsonl",
    "flowgrpo/room/page.md",
    "kernels/flowgrpo_kernels/room/__init__.py",
}
# A folder without __init__.py is no package, and nothing beside the two roots is one.
STRAY = {
    "flowgrpo/loose/module.py",
    "flowgrpo/room/picture.psd",
    "kernels/csrc/__init__.py",
    "benchmarks/__init__.py",
    "room/__init__.py",
}


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory):
    """Of the repository, and of files that it does not have."""
    tree = copy_tree(tmp_path_factory.mktemp("pure") / "tree")
    for name in NEW | STRAY:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).touch()
    return build_wheel(tree, FLOWGRPO_SKIP_NATIVE="1")


def test_top_level_names(pure_wheel):
    (top_level,) = [n for n in pure_wheel.namelist() if n.endswith("dist-info/top_level.txt")]
    assert set(pure_wheel.read(top_level).decode().split()) == {"flowgrpo", "flowgrpo_kernels"}
    roots = {name.split("/")[0] for name in pure_wheel.namelist()}
    assert {r for r in roots if not r.endswith(".dist-info")} == {"flowgrpo", "flowgrpo_kernels"}


def test_every_module_and_data_file_is_in_the_wheel(pure_wheel):
    shipped = set(pure_wheel.namelist())
    expected = {
        p.relative_to(base).as_posix()
        for base, package in ((ROOT, "flowgrpo"), (ROOT / "kernels", "flowgrpo_kernels"))
        for p in (base / package).rglob("*")
        if p.suffix in (".py", ".json", ".jsonl", ".md", ".pack", ".txt", ".safetensors", ".typed")
        and p.name != "_native_build.json"
    }
    assert expected - shipped == set()
    assert any(name.startswith("flowgrpo/nano/model/") for name in shipped)


def test_the_wheel_has_the_compiled_gpu_kernels(wheel, pure_wheel):
    """For every target, built where there is neither Triton nor a CUDA compiler; within 6 MB."""
    folder = ROOT / "kernels" / "flowgrpo_kernels" / "images"
    for built in (wheel, pure_wheel):
        for path in folder.iterdir():
            assert built.read(f"flowgrpo_kernels/images/{path.name}") == path.read_bytes()
        kernels = [i for i in built.infolist() if i.filename.startswith("flowgrpo_kernels/")]
        assert sum(info.compress_size for info in kernels) < 6e6
    assert len(list(folder.glob("*.pack"))) == 5


def test_a_new_folder_needs_no_line_in_setup(pure_wheel):
    names = set(pure_wheel.namelist())
    assert {name.removeprefix("kernels/") for name in NEW} <= names
    assert not {name.removeprefix("kernels/") for name in STRAY} & names


def installed(wheel: zipfile.ZipFile, folder: Path) -> importlib.metadata.Distribution:
    """Unpack a wheel into a folder, as ``pip install --target`` does."""
    wheel.extractall(folder)
    (info,) = folder.glob("flowgrpo-*.dist-info")
    return importlib.metadata.Distribution.at(info)


def test_metadata(pure_wheel, tmp_path):
    flowgrpo = installed(pure_wheel, tmp_path)
    assert flowgrpo.metadata.get_all("Provides-Extra") == [
        "train",
        "triton",
        "rewards",
        "serve",
        "data",
        "wandb",
        "flash",
        "xformers",
        "hub",
        "quantize",
        "test",
        "bench",
    ]
    requirements = [Requirement(text) for text in flowgrpo.requires]
    core = [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    assert core == ["torch"]
    (script,) = flowgrpo.entry_points
    assert (script.group, script.name) == ("console_scripts", "flowgrpo")
    assert any(n.endswith("licenses/LICENSE") for n in pure_wheel.namelist())


def torch_alone(folder: Path) -> Path:
    """A folder with links to torch and to what it requires, and to nothing else."""
    folder.mkdir()
    names = ["torch"]
    for name in names:
        distribution = importlib.metadata.distribution(name)
        for entry in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / entry).exists():
                (folder / entry).symlink_to(distribution.locate_file(entry))
        for requirement in map(Requirement, distribution.requires or []):
            # A requirement of torch's that is not installed is not imported either.
            if (
                requirement.name not in names
                and (requirement.marker is None or requirement.marker.evaluate({"extra": ""}))
                and any(importlib.metadata.distributions(name=requirement.name))
            ):
                names.append(requirement.name)
    return folder


KERNELS_ALONE = """
import importlib.util, sys

sys.path[:0] = sys.argv[1].split(":")
import flowgrpo
import torch
from flowgrpo_kernels import flow_sde, grpo_loss, initial_noise, sde_step

for name in ("diffusers", "transformers", "peft", "numpy", "scipy", "PIL", "tyro", "rich"):
    assert importlib.util.find_spec(name) is None, name

transitions = flow_sde(torch.tensor([1.0, 0.6, 0.3, 0.0]), noise_level=0.7)
seeds = torch.arange(3)
x = initial_noise(seeds, (4, 6, 6))
velocity = torch.full_like(x, 0.25).requires_grad_()
x_next, log_prob = sde_step(velocity.detach(), x, transitions, 0, seeds=seeds)
steps, advantages = torch.zeros(3, dtype=torch.int64), torch.tensor([1.0, -1.0, 0.5])
out = grpo_loss(velocity, x, x_next, log_prob, advantages, transitions, steps, clip_range=1e-4)
out.loss.backward()
assert out.loss.item() == -advantages.mean().item()
assert velocity.grad.isfinite().all() and velocity.grad.abs().sum() > 0

try:
    from flowgrpo import train
except ModuleNotFoundError as error:
    assert error.name.split(".")[0] not in ("flowgrpo", "flowgrpo_kernels")
else:
    raise AssertionError("the trainer was imported")
"""

COMMAND_ALONE = """
import importlib.metadata, sys

sys.path[:0] = sys.argv[1].split(":")
(script,) = importlib.metadata.distribution("flowgrpo").entry_points
sys.argv[1:] = ["train"]
sys.exit(script.load()())
"""


@pytest.fixture(scope="module")
def without_the_trainer(wheel, tmp_path_factory):
    """Run code with Python, torch and the wheel alone: isolated, and without site-packages."""
    folder = tmp_path_factory.mktemp("torch-alone")
    path = f"{folder / 'wheel'}:{torch_alone(folder / 'torch')}"
    installed(wheel, folder / "wheel")

    def run(code: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-I", "-S", "-c", code, path], capture_output=True, text=True
        )

    return run


def test_the_kernels_need_torch_alone(without_the_trainer):
    done = without_the_trainer(KERNELS_ALONE)
    assert done.returncode == 0, done.stderr


def test_the_command_without_the_trainer_is_one_sentence(without_the_trainer):
    done = without_the_trainer(COMMAND_ALONE)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("flowgrpo: ") and line.endswith("pip install 'flowgrpo[train]'")
    for name in ("numpy", "scipy", "diffusers", "transformers", "tyro", "pillow"):
        assert re.search(rf"\b{name}\b", line)
    assert "torch" not in line


@pytest.mark.parametrize("missing", ["flowgrpo.cli.main", "no_such_module"])
def test_another_missing_module_is_a_traceback(missing, monkeypatch):
    """With the trainer's requirements, or if the module is one of ours, nothing is explained."""
    if missing == "flowgrpo.cli.main":
        monkeypatch.setattr(command, "missing_requirements", lambda: ["numpy"])
        monkeypatch.setitem(sys.modules, missing, None)
        monkeypatch.delattr("flowgrpo.cli.main", raising=False)
    else:
        monkeypatch.setattr(command, "missing_requirements", list)
        monkeypatch.setattr("flowgrpo.cli.main.main", lambda argv: __import__(missing))
    with pytest.raises(ModuleNotFoundError) as caught:
        command.main([])
    assert caught.value.name == missing


def assert_plain(library: bytes) -> None:
    """It needs neither torch nor Python nor the C++ library."""
    assert library.startswith((b"\x7fELF", b"\xcf\xfa\xed\xfe"))
    for foreign in (b"libtorch", b"libc10", b"libpython", b"PyInit_", b"libstdc++"):
        assert foreign not in library


def test_the_installed_library_is_plain():
    """As it was compiled for this machine, with full optimization."""
    found = list(Path(flowgrpo_kernels.__file__).parent.glob("libflowgrpo_native.*"))
    if not found:
        pytest.skip("installed without the native library")
    for library in found:
        assert_plain(library.read_bytes())


def test_wheel_with_native_library(wheel):
    info = build_info(wheel)
    if shutil.which("c++") is None or shutil.which("cmake") is None:
        pytest.skip(f"no compiler or no CMake here: {info['reason']}")
    assert info["built"], info["reason"]
    assert re.search(r"-py3-none-(?!any)\w+\.whl$", wheel.filename)
    (library,) = [n for n in wheel.namelist() if n.startswith(LIBRARY)]
    assert_plain(wheel.read(library))
    assert not any(n.endswith((".cpp", ".h")) for n in wheel.namelist())


def test_skip_native_is_a_pure_wheel_that_says_so(pure_wheel):
    assert pure_wheel.filename.endswith("-py3-none-any.whl")
    assert not any(n.startswith(LIBRARY) for n in pure_wheel.namelist())
    info = build_info(pure_wheel)
    assert info["built"] is False and "FLOWGRPO_SKIP_NATIVE" in info["reason"]


def test_no_compiler_still_installs(tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    wheel = build_wheel(copy_tree(tmp_path / "tree"), PATH=str(empty), CXX="")
    assert wheel.filename.endswith("-py3-none-any.whl")
    assert "no C++ compiler" in build_info(wheel)["reason"]


def test_broken_compiler_installs_unless_native_is_required(tmp_path):
    if shutil.which("cmake") is None:
        pytest.skip("no CMake here, so the compiler would never be reached")
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho this compiler is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    wheel = build_wheel(copy_tree(tmp_path / "tree"), CXX=str(broken))
    reason = build_info(wheel)["reason"]
    assert "native build failed" in reason and "broken" in reason
    with pytest.raises(AssertionError, match="failed"):
        build_wheel(copy_tree(tmp_path / "strict"), CXX=str(broken), FLOWGRPO_REQUIRE_NATIVE="1")


def test_setup_imports_only_setuptools_and_the_standard_library():
    tree = ast.parse((ROOT / "setup.py").read_text())
    modules = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [a.name for a in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert modules - sys.stdlib_module_names == {"setuptools"}


def test_ci_runs_exactly_the_test_command_of_the_readme():
    command = "pip install -c constraints.txt '.[test]' && python -m pytest"
    script = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    assert script[-1] == command
    assert sum("pip install" in line or "pytest" in line for line in script) == 1
    assert command in (ROOT / "README.md").read_text()
