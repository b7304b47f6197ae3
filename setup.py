"""Packages, package data and the native CPU library.

Metadata and dependencies are in pyproject.toml. What cannot be said there is here:

* Two packages come out of one tree, in one distribution: one version, one wheel, and the kernels'
  build has CMakeLists.txt within its reach wherever pip copies the tree. ``pip install .`` brings
  torch alone, which the kernels need; the trainer's requirements are the extra ``train``.
* ``flowgrpo_kernels`` lives in ``kernels/``, which must stay a plain folder without
  ``__init__.py``: Hugging Face publishes a package named ``kernels`` that transformers and
  diffusers import. Hence two named roots that are walked, never ``find_packages()`` over the tree.
* CMake compiles ``kernels/csrc`` into one plain shared library that is loaded with ctypes. It links
  neither libtorch nor libpython, so a wheel is tagged ``py3-none-<platform>`` and serves every
  Python and every torch.
* The GPU kernels are in ``kernels/flowgrpo_kernels/images``, compiled already: an install needs
  neither Triton nor a CUDA compiler for them.
* A missing compiler never fails an install. ``_native_build.json``, written into the package, says
  what was built or why nothing was, and ``flowgrpo_kernels.backend_info()`` repeats it.

Environment: ``FLOWGRPO_SKIP_NATIVE=1`` builds no native library, ``FLOWGRPO_REQUIRE_NATIVE=1``
turns a failed build into a failed install, ``CXX`` and ``CMAKE_ARGS`` are passed on to CMake.
This file imports neither torch nor anything else beyond setuptools, and probes no device.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BUILD_INFO = "_native_build.json"

PACKAGE_DIR = {
    "flowgrpo": "flowgrpo",
    "flowgrpo_kernels": "kernels/flowgrpo_kernels",
}
DATA_SUFFIXES = (".json", ".jsonl", ".md", ".pack", ".safetensors", ".txt", ".typed")


def packages(name: str, folder: Path) -> dict[str, Path]:
    """Package name -> folder, for ``folder`` and the folders with ``__init__.py`` below it."""
    tree = {name: folder}
    for init in sorted(folder.glob("*/__init__.py")):
        tree |= packages(f"{name}.{init.parent.name}", init.parent)
    return tree


def data_files(folder: Path, packages: set[Path]) -> list[str]:
    """Data files of the package in ``folder``, relative to it; nested packages have their own."""
    files = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path not in packages:
            files += [f"{path.name}/{file}" for file in data_files(path, packages)]
        elif path.suffix in DATA_SUFFIXES and path.name != BUILD_INFO:
            files.append(path.name)
    return files


PACKAGES = {
    package: path
    for name, folder in PACKAGE_DIR.items()
    for package, path in packages(name, ROOT / folder).items()
}
PACKAGE_DATA = {
    package: data_files(path, set(PACKAGES.values())) for package, path in PACKAGES.items()
}


def enabled(name: str) -> bool:
    return os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off")


def compiler() -> str | None:
    """The C++ compiler that CMake would find first, or None."""
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    for name in [*named, "c++", "g++", "clang++", "cl"]:
        if path := shutil.which(name):
            return path
    return None


def why_not_native() -> str:
    """A reason not to try the native build, or an empty string."""
    if enabled("FLOWGRPO_SKIP_NATIVE"):
        return "FLOWGRPO_SKIP_NATIVE was set during installation"
    if compiler() is None:
        return "no C++ compiler was found during installation (install g++ or clang++, reinstall)"
    return ""


def build_requirements() -> list[str]:
    # The cmake wheel is 30 MB, so it is asked for only where it is needed: a compiler is present
    # and CMake is not. Listed in pyproject.toml it would be downloaded for every install, and the
    # install would fail where no such wheel exists.
    return [] if why_not_native() or shutil.which("cmake") else ["cmake>=3.18"]


def run(command: list[str]) -> str:
    """Run a command; its output, or RuntimeError with the end of its output."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-30:])
        raise RuntimeError(f"{shlex.join(command)} failed:\n{tail}")
    return done.stdout


def source_digest() -> str:
    """sha256 of what the library is compiled from; native_library.py compares it, run in a tree."""
    files = [ROOT / "CMakeLists.txt", *sorted((ROOT / "kernels" / "csrc").glob("*.[ch]*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def build_native(target: Path) -> dict[str, str]:
    """Compile kernels/csrc and install the library into ``target``; facts for the build info."""
    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("CMake was not found (install cmake and reinstall)")
    with tempfile.TemporaryDirectory(prefix="flowgrpo-native-") as build:
        configure = [cmake, "-S", str(ROOT), "-B", build, "-DCMAKE_BUILD_TYPE=Release"]
        run(configure + shlex.split(os.environ.get("CMAKE_ARGS", "")))
        run([cmake, "--build", build, "--config", "Release", "--parallel"])
        run([cmake, "--install", build, "--config", "Release", "--prefix", str(target)])
        facts = json.loads(Path(build, "native_build.json").read_text())
    (library,) = target.glob("libflowgrpo_native.*")
    facts["library"] = library.name
    facts["sha256"] = hashlib.sha256(library.read_bytes()).hexdigest()
    facts["sources"] = source_digest()
    return facts


class BuildPy(build_py):
    """Copies the Python files, then adds the native library and the build info beside them."""

    def run(self) -> None:
        if not self.editable_mode:
            # What an earlier build left behind would go into the wheel.
            for package in PACKAGE_DIR:
                shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        if self.editable_mode:
            target = ROOT / PACKAGE_DIR["flowgrpo_kernels"]
        else:
            target = Path(self.build_lib, "flowgrpo_kernels").resolve()
        reason, facts = why_not_native(), {}
        for stale in target.glob("libflowgrpo_native.*"):
            stale.unlink()
        if not reason:
            try:
                facts = build_native(target)
            except (OSError, RuntimeError, ValueError) as error:
                if enabled("FLOWGRPO_REQUIRE_NATIVE"):
                    raise
                reason = f"the native build failed: {error}"
        if reason:
            if enabled("FLOWGRPO_REQUIRE_NATIVE"):
                raise RuntimeError(reason)
            self.warn(f"flowgrpo_kernels is installed without its native CPU library: {reason}")
        info = {"built": not reason, "reason": reason, **facts}
        target.mkdir(parents=True, exist_ok=True)
        (target / BUILD_INFO).write_text(json.dumps(info, indent=2) + "\n")


class NativeDistribution(Distribution):
    """Platform-specific exactly when the native library will be tried."""

    def has_ext_modules(self) -> bool:
        return not why_not_native()


class BdistWheel(bdist_wheel):
    """Tags the wheel py3-none-<platform>: the library is tied to no Python and no torch."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=list(PACKAGES),
    package_dir=PACKAGE_DIR,
    package_data=PACKAGE_DATA,
    include_package_data=False,
    distclass=NativeDistribution,
    cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel},
    setup_requires=build_requirements(),
    zip_safe=False,
)
