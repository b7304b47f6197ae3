"""The copy for Hugging Face's Hub: its files, and its use by the real `kernels` library."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from support import hf_kernels, hub_copy, processes

FOLDER = Path(__file__).resolve().parents[2] / "kernels" / "hub"

pytestmark = pytest.mark.skipif(
    not FOLDER.exists(), reason="needs the source tree, not an installed copy"
)


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("hub_build", FOLDER / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def repository(tool, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "flowgrpo-kernels"
    tool.build(folder, ["cpu", "cuda"])
    return folder


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in files
        if "__pycache__" not in path.parts
    }


def test_a_variant_is_the_package_but_for_its_namespace(tool, repository):
    variants = {name: content(repository / "build" / f"torch-{name}") for name in ("cpu", "cuda")}
    ids = set()
    for backend, files in variants.items():
        metadata = json.loads(files.pop("metadata.json"))
        digests = {
            name: base64.b64encode(hashlib.sha256(data).digest()).decode()
            for name, data in files.items()
        }
        assert metadata["digest"] == {"algorithm": "sha256", "files": digests}
        assert metadata["backend"] == {"type": backend}
        identity = metadata["id"]
        assert identity.isidentifier() and f"_{backend}_" in identity
        assert f'_OPS_NAME = "{identity}"'.encode() in files.pop("_ops.py")
        assert identity.encode() in files.pop("flowgrpo_kernels/__init__.py")
        ids.add(identity)
        assert {"__init__.py", "layers/sd3.py", "images/manifest.json", "compat/miles.py"} < set(
            files
        )
        assert not any(name.startswith("aot/") for name in files)
        for name, data in files.items():
            assert (tool.PACKAGE / name).read_bytes() == data
    assert len(ids) == 2
    sources = {p.relative_to(tool.PACKAGE).as_posix() for p in tool.PACKAGE.rglob("*.py")}
    assert {n for n in sources if not n.startswith("aot/")} <= set(variants["cpu"]) | {"_ops.py"}
    # kernel-builder writes _ops.py there itself.
    project = content(repository / "torch-ext" / "flowgrpo_kernels")
    assert project == variants["cpu"]
    assert {"build.toml", "flake.nix"} < {path.name for path in repository.iterdir()}


def test_another_content_has_another_namespace(tool):
    files = {"a.py": b"1", "b.py": b"2"}
    ids = {tool.unique_id(f) for f in (files, {**files, "a.py": b"0"}, {"a.py": b"1b.py2"})}
    assert len(ids) == 3 and tool.unique_id(dict(files)) in ids
    with pytest.raises(RuntimeError, match=r"_ops.py must have the line _OPS_NAME = .* once"):
        tool.variant_files({"_ops.py": b"no namespace"}, "flowgrpo_kernels", "_x")


def test_an_unknown_backend(tool, tmp_path, capsys):
    with pytest.raises(SystemExit):
        tool.main([str(tmp_path / "out"), "--backends", "cpu", "metal"])
    assert "backends must be some of cpu, cuda, rocm, got metal" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_real_library_loads_it_beside_the_package(repository, tmp_path):
    """A step and a loss by both copies, and kernelize on three transformers: support/hub_copy."""
    folder = ""
    spec = importlib.util.find_spec("kernels")
    # A folder named kernels, as this repository has one, is no package.
    if spec is None or spec.origin is None:
        hf_kernels.install(tmp_path / "kernels")
        folder = str(tmp_path / "kernels")
    processes.Fork(tmp_path / "log", hub_copy.run, folder, str(repository)).wait()
