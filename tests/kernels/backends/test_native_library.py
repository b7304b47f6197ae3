"""A missing, broken or stale native library is a sentence, never a crash; the fallback is loud."""

from __future__ import annotations

import _ctypes
import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from flowgrpo_kernels.backends import native, native_library
from flowgrpo_kernels.backends.native_library import BUILD_INFO, PACKAGE, NativeError, load
from support import torch_fork

USE_STEP = """
import logging, torch
logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
import flowgrpo_kernels as k
t = k.flow_sde([1.0, 0.5, 0.0])
x = torch.ones(2, 70)
out, lp = k.sde_step(x, x, t, 1, seeds=torch.arange(2))
print(lp.tolist())
"""

needs_native = pytest.mark.skipif(
    not native.available(), reason=f"no native library: {native.why_not()}"
)


@pytest.fixture
def folder(tmp_path):
    """A copy of the installed library and its build info."""
    info = json.loads((PACKAGE / BUILD_INFO).read_text())
    shutil.copy(PACKAGE / info["library"], tmp_path)
    shutil.copy(PACKAGE / BUILD_INFO, tmp_path)
    return tmp_path


def edit(folder: Path, **changes) -> dict:
    path = folder / BUILD_INFO
    info = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(info))
    return info


def bless(folder: Path, content: bytes) -> None:
    """Replaces the library and makes the build info agree with it."""
    info = edit(folder, sha256=hashlib.sha256(content).hexdigest())
    (folder / info["library"]).write_bytes(content)


@needs_native
def test_a_good_copy_loads(folder):
    library, info = load(folder)
    assert library.flowgrpo_native_abi() == native_library.ABI
    assert info["isas"] and info["compiler"]


def test_not_installed(tmp_path):
    with pytest.raises(NativeError, match="pip install"):
        load(tmp_path)


def test_not_built_repeats_the_reason(tmp_path):
    reason = "FLOWGRPO_SKIP_NATIVE was set during installation"
    (tmp_path / BUILD_INFO).write_text(json.dumps({"built": False, "reason": reason}))
    with pytest.raises(NativeError, match=reason):
        load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"built": true}'])
def test_broken_build_info(tmp_path, text):
    (tmp_path / BUILD_INFO).write_text(text)
    with pytest.raises(NativeError):
        load(tmp_path)


@needs_native
def test_missing_library(folder):
    next(folder.glob("libflowgrpo_native.*")).unlink()
    with pytest.raises(NativeError, match=r"missing.*install flowgrpo again"):
        load(folder)


@needs_native
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_corrupt_library_is_not_opened(folder, damage):
    (path,) = folder.glob("libflowgrpo_native.*")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(
        {
            "truncated": bytes(content[: len(content) // 3]),
            "flipped": bytes(content),
            "empty": b"",
            "foreign": b"#!/bin/sh\n",
        }[damage]
    )
    with pytest.raises(NativeError, match="corrupt or from another build"):
        load(folder)


@needs_native
def test_what_is_no_library_is_refused_by_the_loader(folder):
    bless(folder, b"not an ELF file")
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(folder)


@needs_native
def test_another_library_is_refused(folder):
    # A valid shared library of another project.
    bless(folder, Path(_ctypes.__file__).read_bytes())
    with pytest.raises(NativeError, match="cannot be loaded"):
        load(folder)


@needs_native
def test_stale_abi_and_version(folder, monkeypatch):
    edit(folder, version="0.0.9")
    with pytest.raises(NativeError, match=r"expected ABI .* 0\.0\.9"):
        load(folder)
    monkeypatch.setattr(native_library, "ABI", 999)
    with pytest.raises(NativeError, match="expected ABI 999"):
        load(folder)


@needs_native
def test_sources_changed_after_the_build(folder):
    package = folder / "kernels" / "flowgrpo_kernels"
    csrc = folder / "kernels" / "csrc"
    package.mkdir(parents=True)
    csrc.mkdir()
    (folder / "CMakeLists.txt").write_text("# changed")
    (csrc / "kernels.cpp").write_text("// changed")
    for file in [*folder.glob("libflowgrpo_native.*"), folder / BUILD_INFO]:
        shutil.move(file, package)
    with pytest.raises(NativeError, match="older than kernels/csrc"):
        load(package)


def run(package_parent: Path, **environment: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(package_parent)} | environment
    return torch_fork.run(USE_STEP, cwd=package_parent, env=env)


@pytest.fixture
def without_library(tmp_path):
    ignore = shutil.ignore_patterns("libflowgrpo_native.*", BUILD_INFO, "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "flowgrpo_kernels", ignore=ignore)
    return tmp_path


def test_fallback_is_loud_and_gives_the_same_log_prob(without_library):
    fallback = run(without_library, FLOWGRPO_KERNELS="auto")
    assert fallback.returncode == 0, fallback.stderr
    assert "WARNING" in fallback.stderr and "was not built" in fallback.stderr
    if native.available():
        forced = run(PACKAGE.parent, FLOWGRPO_KERNELS="native")
        assert forced.stdout == fallback.stdout and "WARNING" not in forced.stderr


def test_native_on_request_raises_when_it_is_missing(without_library):
    done = run(without_library, FLOWGRPO_KERNELS="native")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: FLOWGRPO_KERNELS=native") and "was not built" in last


@needs_native
def test_instruction_set_can_be_forced(monkeypatch):
    decide = native_library.state.__wrapped__
    best = native.library().flowgrpo_native_isa_best()
    try:
        for i, isa in enumerate(native_library.ISAS):
            monkeypatch.setenv("FLOWGRPO_NATIVE_ISA", isa)
            library, facts, why = decide()
            assert (library is not None) == (i <= best)
            assert facts["isa"] == isa if i <= best else isa in why
        monkeypatch.setenv("FLOWGRPO_NATIVE_ISA", "avx9000")
        assert decide()[2].startswith("FLOWGRPO_NATIVE_ISA must be one of")
    finally:
        native.select_isa("auto")
