"""Writes flowgrpo_kernels as a kernel repository of Hugging Face's Hub.

    python kernels/hub/build.py OUT                       # then: get_local_kernel(Path("OUT"))
    python kernels/hub/build.py OUT --backends cuda

OUT becomes what `kernels` loads and what kernel-builder builds:

    build/torch-cpu/ torch-cuda/ torch-rocm/     the package, one copy for each backend
        _ops.py           with a namespace of its own, so that this copy, another version of it and
                          the installed package can be in one process
        metadata.json     the copy's identity and the digest of every file
        flowgrpo_kernels/ what older versions of `kernels` import
    torch-ext/flowgrpo_kernels/                  the package without _ops.py, which kernel-builder
                                                 writes itself
    build.toml flake.nix                         of this folder

The CPU library goes along where the package beside this file has one. It is for this system and
processor; elsewhere it is refused when it is loaded, and CPU tensors run on the PyTorch reference
after a warning. aot/ stays here: it makes the images.

Standard library only, but for tomli on Python 3.10. Torch is not imported.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "flowgrpo_kernels"
NAMESPACE = '_OPS_NAME = "flowgrpo"'
"""The line of the package's _ops.py that a copy has otherwise."""
OLD_LAYOUT = '''\
"""What is beside this folder, for versions of `kernels` that look for it here."""

import importlib.util
import sys
from pathlib import Path

_name = {identity!r}
if _name not in sys.modules:
    _spec = importlib.util.spec_from_file_location(_name, Path(__file__).parents[1] / "__init__.py")
    sys.modules[_name] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules[_name])
globals().update({{k: v for k, v in vars(sys.modules[_name]).items() if not k.startswith("__")}})


def __getattr__(name):
    return getattr(sys.modules[_name], name)
'''


def read_settings() -> dict[str, Any]:
    """Read build.toml."""
    return tomllib.loads((HERE / "build.toml").read_text())


def package_files(extensions: list[str]) -> dict[str, bytes]:
    """Collect the package's files with these endings: path in it -> content."""
    files = {}
    for path in sorted(PACKAGE.rglob("*")):
        name = path.relative_to(PACKAGE)
        if path.is_file() and path.suffix[1:] in extensions and name.parts[0] != "aot":
            files[name.as_posix()] = path.read_bytes()
    return files


def unique_id(files: dict[str, bytes]) -> str:
    """Name this content: ten hexadecimal digits, others for any other content."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:10]


def variant_files(files: dict[str, bytes], module: str, identity: str) -> dict[str, bytes]:
    """Make the files of one variant, whose ops are in torch.ops.<identity>."""
    ops = files["_ops.py"].decode()
    if ops.count(NAMESPACE) != 1:
        raise RuntimeError(f"{PACKAGE / '_ops.py'} must have the line {NAMESPACE} once")
    ops = ops.replace(NAMESPACE, f'_OPS_NAME = "{identity}"')
    old = OLD_LAYOUT.format(identity=identity)
    return {**files, "_ops.py": ops.encode(), f"{module}/__init__.py": old.encode()}


def make_metadata(
    general: dict[str, Any], backend: str, identity: str, files: dict[str, bytes]
) -> dict[str, Any]:
    """Make the content of metadata.json."""
    digests = {
        name: base64.b64encode(hashlib.sha256(content).digest()).decode()
        for name, content in sorted(files.items())
    }
    return {
        "name": general["name"],
        "id": identity,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files below a new folder."""
    if folder.exists():
        shutil.rmtree(folder)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def build(out: Path, backends: list[str] | None = None) -> list[Path]:
    """Write the repository into `out` and return the folders of its variants.

    backends: some of build.toml's; None: all.
    """
    settings = read_settings()
    general = settings["general"]
    module = general["name"].replace("-", "_")
    unknown = set(backends or ()) - set(general["backends"])
    if unknown:
        raise ValueError(
            f"backends must be some of {', '.join(general['backends'])}, got "
            f"{', '.join(sorted(unknown))}"
        )
    files = package_files(settings["torch-noarch"]["pyext"])
    unique = unique_id(files)
    variants = []
    for backend in backends or general["backends"]:
        identity = f"_{module}_{backend}_{unique}"
        variant = variant_files(files, module, identity)
        metadata = make_metadata(general, backend, identity, variant)
        variant["metadata.json"] = (json.dumps(metadata, indent=2) + "\n").encode()
        variants.append(out / "build" / f"torch-{backend}")
        write_files(variants[-1], variant)
    project = {name: content for name, content in files.items() if name != "_ops.py"}
    write_files(out / "torch-ext" / module, project)
    for name in ("build.toml", "flake.nix"):
        shutil.copy(HERE / name, out / name)
    return variants


def main(arguments: list[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python kernels/hub/build.py", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the kernel repository")
    parser.add_argument("--backends", nargs="+", metavar="NAME", help="default: all of build.toml")
    options = parser.parse_args(arguments)
    try:
        variants = build(options.out, options.backends)
    except ValueError as error:
        parser.error(str(error))
    for variant in variants:
        count, size = 0, 0
        for path in variant.rglob("*"):
            if path.is_file():
                count, size = count + 1, size + path.stat().st_size
        library = any(variant.glob("libflowgrpo_native.*"))
        print(
            f"{variant}: {count} files, {size / 1e6:.1f} MB, "
            f"{'with' if library else 'without'} the CPU library"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
