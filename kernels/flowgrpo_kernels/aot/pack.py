"""Packs: the table of table.py compiled for every target, as ../backends/images.py reads them.

    write(FOLDER)                        # all targets; about a second a kernel and target
    problems = check(FOLDER)             # what is stale: the table, the sources; compiles nothing

Kernels are compiled without line information, which triples a binary. Triton's own cache holds what
was compiled before, so after a change of one kernel only that one takes time.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import lzma
import multiprocessing
import os
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from ..backends.images import (
    FOLDER,
    FORMAT,
    MANIFEST,
    ImageError,
    Manifest,
    code_digest,
    text_digest,
)
from . import elf
from .table import shipped
from .variants import Variant

ARCHITECTURES = {"sm_80": 80, "sm_90a": 90, "sm_100a": 100, "sm_120a": 120}
PTX = {"ptx_80": "sm_80"}
"""Target of PTX -> the target that it is taken from. Plain sm_80: newer devices run it, too."""
TARGETS = (*ARCHITECTURES, *PTX)
MOST_SHARED = 48 << 10
"""Bytes of shared memory that a kernel may have without asking the driver for more."""
_FORMATS = {"fp32": "f", "i32": "i"}


class Binary(NamedTuple):
    """One compiled kernel. ptx: the text that `cubin` was assembled from."""

    cubin: bytes
    ptx: bytes
    entry: str
    warps: int
    shared: int


def compiled(variant: Variant, architecture: int) -> Binary:
    """Compiles a variant as a launch on such a device would, but without line information."""
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    divisible = [["tt.divisibility", 16]]
    hints = {
        (i,): divisible
        for i, name in enumerate(variant.kernel.arg_names)
        if name in variant.aligned
    }
    source = ASTSource(variant.kernel, variant.types, variant.constants, hints)
    target = GPUTarget("cuda", architecture, 32)
    result = triton.compile(source, target=target, options=variant.options)
    facts = result.metadata
    if facts.global_scratch_size or facts.profile_scratch_size or facts.shared > MOST_SHARED:
        raise ValueError(f"{variant.name} needs memory that launches here do not bring")
    ptx = result.asm["ptx"].encode() + b"\0"
    return Binary(result.asm["cubin"], ptx, facts.name, facts.num_warps, facts.shared)


def layout(variant: Variant, binary: Binary) -> str:
    """Writes a kernel's parameter bank in the language of struct, by what the binary says of it.

    Behind the arguments Triton has two pointers to memory that no kernel here needs: they stay 0.
    """
    parameters, total = elf.parameters(binary.cubin, binary.entry)
    kinds = [kind for kind in variant.types.values() if kind != "constexpr"]
    if len(parameters) != len(kinds) + 2:
        raise ValueError(f"{variant.name} has {len(parameters)} parameters, not {len(kinds)} + 2")
    text, end = "", 0
    for i, (offset, size) in enumerate(parameters):
        text += "x" * (offset - end)
        if i < len(kinds):
            written = "Q" if kinds[i].startswith("*") else _FORMATS[kinds[i]]
            if struct.calcsize("<" + written) != size:
                raise ValueError(f"{variant.name}: parameter {i} of {kinds[i]} has {size} bytes")
            text += written
        else:
            text += "x" * size
        end = offset + size
    text += "x" * (total - end)
    if struct.calcsize("<" + text) != total:
        raise ValueError(f"{variant.name} has {total} bytes of parameters, not as laid out: {text}")
    return text


def write(
    folder: Path = FOLDER,
    architectures: dict[str, int] = ARCHITECTURES,
    keys: list[str] | None = None,
    jobs: int = 1,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Compiles and writes the packs and their manifest.

    keys: those to compile, by default the whole table. jobs: processes that compile.
    """
    table = shipped()
    table = {key: table[key] for key in (keys or table)}
    # Those of a group are compressed together, and unpacked together at their first use.
    groups: dict[str, list[str]] = {}
    for key in table:
        groups.setdefault(_group(key), []).append(key)
    order = [key for group in groups.values() for key in group]
    layouts: list[str] = []
    kernels: dict[str, list] = {}
    targets: dict[str, dict[str, Any]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, architecture in architectures.items():
        binaries: dict[str, Binary] = {}
        for key, binary in _compiled_all(order, table, architecture, jobs):
            binaries[key] = binary
            report(f"{name}: {len(binaries)} of {len(order)}")
        for key, binary in binaries.items():
            text = layout(table[key], binary)
            if text not in layouts:
                layouts.append(text)
            facts = [binary.entry, binary.warps, layouts.index(text)]
            if kernels.setdefault(key, facts) != facts:
                raise ValueError(f"{key} is not launched on {name} as on other targets")
        version = get_ptxas(architecture).version
        targets[name] = _write_pack(
            folder / f"{name}.pack", groups, {k: (b.cubin, b.shared) for k, b in binaries.items()}
        ) | {"driver": _driver(version, False)}
        for text_name in (n for n, of in PTX.items() if of == name):
            texts = {k: (b.ptx, b.shared) for k, b in binaries.items()}
            targets[text_name] = _write_pack(folder / f"{text_name}.pack", groups, texts)
            targets[text_name]["driver"] = _driver(version, True)
    versions = {"triton": triton.__version__}
    versions |= {f"ptxas {name}": get_ptxas(a).version for name, a in architectures.items()}
    write_manifest(folder, versions, layouts, kernels, targets)


def write_manifest(folder: Path, versions, layouts, kernels, targets) -> None:
    """Writes the manifest, with the digests of the sources as they are now."""
    facts = {
        "format": FORMAT,
        "versions": versions,
        "sources": {"text": text_digest(), "code": code_digest()},
        "layouts": layouts,
        "kernels": kernels,
        "targets": targets,
    }
    # A line for each kernel and pack: then a diff shows what changed.
    path = folder / MANIFEST
    beside = path.with_suffix(".new")
    beside.write_text(_lines(facts) + "\n")
    beside.replace(path)


def _lines(facts: dict[str, Any]) -> str:
    """Writes JSON with one line for each entry of the inner tables."""
    parts = []
    for name, value in facts.items():
        if isinstance(value, dict):
            inner = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            parts.append(f"{json.dumps(name)}: {{\n{inner}\n}}")
        else:
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(parts) + "\n}"


def _group(key: str) -> str:
    """Names the group of a kernel: those of one function and the same dtypes."""
    words = key.split()
    return " ".join([words[0], *sorted(set(words[1:]) & {"bf16", "fp16"})])


def _write_pack(
    path: Path, groups: dict[str, list[str]], binaries: dict[str, tuple[bytes, int]]
) -> dict[str, Any]:
    """Writes one pack and returns its facts for the manifest."""
    data, places, images = b"", [], []
    for number, keys in enumerate(groups.values()):
        raw = b""
        for key in keys:
            binary, shared = binaries[key]
            images.append([number, len(raw), len(binary), shared])
            raw += binary
        packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
        places.append([len(data), len(packed)])
        data += packed
    beside = path.with_suffix(".new")
    beside.write_bytes(data)
    beside.replace(path)
    digest = hashlib.sha256(data).hexdigest()
    return {"sha256": digest, "bytes": len(data), "groups": places, "images": images}


def _driver(version: str, text: bool) -> int:
    """The least CUDA version of a driver: of the same major for binaries, as new for PTX."""
    major, minor = map(int, version.split("."))
    return 1000 * major + (10 * minor if text else 0)


def _compiled_all(
    keys: list[str], table: dict[str, Variant], architecture: int, jobs: int
) -> Iterator[tuple[str, Binary]]:
    """Compiles in the order of the keys, in this process or in `jobs` others."""
    if jobs == 1:
        for key in keys:
            yield key, compiled(table[key], architecture)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        arguments = [(key, architecture) for key in keys]
        yield from zip(keys, pool.map(_compiled_by_key, arguments, chunksize=4), strict=True)


def _compiled_by_key(argument: tuple[str, int]) -> Binary:
    key, architecture = argument
    return compiled(_table()[key], architecture)


_recorded: dict[str, Variant] = {}


def _table() -> dict[str, Variant]:
    """Records the table once in a process."""
    if not _recorded:
        _recorded.update(shipped())
    return _recorded


def check(folder: Path = FOLDER) -> list[str]:
    """Lists what is stale or broken in a folder of packs; compiles nothing."""
    try:
        manifest = Manifest(folder)
    except ImageError as error:
        return [str(error)]
    faults = []
    for name in TARGETS:
        if name not in manifest.targets:
            faults.append(f"there is no pack for {name}")
            continue
        try:
            pack = manifest.pack(name)
            for key in manifest.kernels:
                pack.image(key)
        except (ImageError, lzma.LZMAError) as error:
            faults.append(str(error))
    recorded = shipped()
    faults += [f"not shipped: {key}" for key in recorded if key not in manifest.kernels]
    faults += [
        f"shipped, but not launched: {key}" for key in manifest.kernels if key not in recorded
    ]
    return faults


def refresh(folder: Path = FOLDER) -> None:
    """Writes the digest of the sources' text anew, where the kernels themselves are unchanged."""
    facts = json.loads((folder / MANIFEST).read_text())
    if facts["sources"]["code"] != code_digest():
        raise ImageError("the kernels have changed: compile them again")
    write_manifest(folder, facts["versions"], facts["layouts"], facts["kernels"], facts["targets"])


def progress(line: str) -> None:
    """Shows a line of progress: on a terminal in place of the last one."""
    before, after = ("\r", "  ") if sys.stderr.isatty() else ("", "\n")
    print(before + line, end=after, file=sys.stderr, flush=True)
