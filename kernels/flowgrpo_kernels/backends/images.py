"""Images: the packs of compiled GPU kernels in images/, how they are found, checked and read.

    manifest.json   what is shipped, and of every pack its size and digest
    sm_90a.pack     the kernels of one target: groups of binaries, each group compressed by itself

`python -m flowgrpo_kernels.aot` writes both; no compiler, no Triton and no GPU is needed to read
them. Before a pack is used, its size and digest are compared with the manifest's, and the
manifest's digest of the kernels' sources with the sources beside it: a truncated, foreign or stale
pack never runs.

The manifest:

    format      FORMAT of this file
    versions    of Triton and ptxas, by which the kernels were compiled
    sources     {"text": digest of the files, "code": digest of the kernels alone}
    layouts     parameter banks of the kernels, in the language of struct
    kernels     {key: [entry, warps, number of its layout]}; keys as `launch_key` makes them
    targets     {name: {"sha256", "bytes", "driver", "groups", "images"}}
                driver: the least CUDA version of a driver that loads them, as 12080 for 12.8
                groups: [offset, length] of each in the pack; images: in the order of the kernels,
                [number of the group, start, length in it, bytes of shared memory]
"""

from __future__ import annotations

import ast
import functools
import hashlib
import io
import json
import re
import tokenize
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import philox, reference, row_laws, transitions

FORMAT = 1
PACKAGE = Path(__file__).resolve().parents[1]
FOLDER = PACKAGE / "images"
MANIFEST = "manifest.json"
# The files that hold the kernels.
SOURCES = (
    "backends/triton.py",
    "blocks/gated_residual.py",
    "blocks/joint_heads.py",
    "blocks/norm_modulate.py",
    "blocks/rows.py",
    "grpo_loss.py",
    "log_prob.py",
    "nft_loss.py",
    "noise.py",
    "sde_step.py",
    "transition_rows.py",
)
# Those whose numbers they take.
NUMBERS = (philox, reference, row_laws, transitions)
KINDS = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float64: "fp64",
    torch.int64: "i64",
}
"""Triton's names of the dtypes that kernels read and write."""
_AGAIN = "install flowgrpo again"


class ImageError(RuntimeError):
    """Raised when the packs cannot be used; the message says why and what to do."""


class Image(NamedTuple):
    """One compiled kernel for one target.

    entry: its name in the binary. shared: bytes. layout: its parameters, in the language of struct.
    """

    binary: bytes
    entry: str
    warps: int
    shared: int
    layout: str


def launch_key(kernel, tensors: tuple[Tensor | None, ...], constants: dict[str, Any]) -> str:
    """Names the code that a launch needs: kernel, dtypes of its tensors, constants, warps."""
    kinds = ["-" if x is None else KINDS.get(x.dtype, str(x.dtype)) for x in tensors]
    chosen = [
        f"{constant}={int(value) if isinstance(value, bool) else value}"
        for constant, value in constants.items()
        if constant != "enable_fp_fusion"
    ]
    return " ".join([kernel.__name__, *kinds, *chosen])


class Manifest:
    """Content of a folder of packs. Raises ImageError when it is not of this package."""

    def __init__(self, folder: Path = FOLDER, package: Path = PACKAGE) -> None:
        self.folder = folder
        path = folder / MANIFEST
        try:
            facts = json.loads(path.read_text())
        except FileNotFoundError:
            raise ImageError(f"no kernels are shipped compiled: there is no {path}") from None
        except (OSError, ValueError) as error:
            raise ImageError(f"{path} cannot be read ({error}); {_AGAIN}") from None
        if not isinstance(facts, dict) or facts.get("format") != FORMAT:
            raise ImageError(
                f"{path} is of another version of flowgrpo: format "
                f"{facts.get('format') if isinstance(facts, dict) else None}, expected {FORMAT}; "
                f"{_AGAIN}"
            )
        sources = facts["sources"]
        # The text is compared first, which takes a millisecond; comments choose no code.
        if sources["text"] != text_digest(package) and sources["code"] != code_digest(package):
            raise ImageError(
                f"the compiled kernels in {folder} are of another version of the kernels' sources; "
                f"{_AGAIN}, or run python -m flowgrpo_kernels.aot in a source tree"
            )
        self.versions: dict[str, str] = facts["versions"]
        self.kernels: dict[str, list] = facts["kernels"]
        self.targets: dict[str, dict[str, Any]] = facts["targets"]
        self.layouts: list[str] = facts["layouts"]
        self.numbers = {key: i for i, key in enumerate(self.kernels)}

    def target_for(self, capability: tuple[int, int], driver: int) -> tuple[str, str]:
        """(name of the best target for a device, "") or ("", why there is none).

        capability: (9, 0) for an H100. driver: the CUDA version that the driver supports, 12080
        for 12.8. In this order: code for this very device, code for an older one of its
        generation, PTX, which the driver compiles when it loads it.
        """
        obstacles = []
        for name in sorted(self.targets, key=_preference(capability)):
            if not _runs(name, capability):
                continue
            if driver >= self.targets[name]["driver"]:
                return name, ""
            obstacles.append(f"{name} needs CUDA {_cuda(self.targets[name]['driver'])}")
        device = f"sm_{capability[0]}{capability[1]}"
        if obstacles:
            return "", (
                f"the driver is too old for the compiled kernels of {device}: it supports CUDA "
                f"{_cuda(driver)}, and {', '.join(obstacles)}; update the driver"
            )
        return "", f"no compiled kernels are shipped for {device}, only {', '.join(self.targets)}"

    def pack(self, target: str) -> Pack:
        """Reads and checks the pack of a target."""
        return Pack(self, target)


class Pack:
    """The kernels of one target."""

    def __init__(self, manifest: Manifest, target: str) -> None:
        self.manifest, self.facts = manifest, manifest.targets[target]
        self.path = manifest.folder / f"{target}.pack"
        try:
            self.data = self.path.read_bytes()
        except OSError as error:
            raise ImageError(
                f"the compiled kernels {self.path} are missing ({error}); {_AGAIN}"
            ) from None
        size = self.facts["bytes"]
        if len(self.data) < size:
            raise ImageError(
                f"the compiled kernels {self.path} are truncated: {len(self.data)} bytes of "
                f"{size}; {_AGAIN}"
            )
        if hashlib.sha256(self.data).hexdigest() != self.facts["sha256"]:
            raise ImageError(
                f"the compiled kernels {self.path} are corrupt or of another version: their digest "
                f"is not the manifest's; {_AGAIN}"
            )
        self._group = functools.lru_cache(maxsize=4)(self._open_group)

    def __contains__(self, key: str) -> bool:
        return key in self.manifest.numbers

    def image(self, key: str) -> Image:
        """Reads a kernel; KeyError when it is not shipped."""
        entry, warps, layout = self.manifest.kernels[key]
        group, start, length, shared = self.facts["images"][self.manifest.numbers[key]]
        binary = self._group(group).read(start, length)
        return Image(binary, entry, warps, shared, self.manifest.layouts[layout])

    def _open_group(self, number: int) -> _Group:
        offset, length = self.facts["groups"][number]
        return _Group(self.path, self.data[offset : offset + length])


class _Group:
    """Binaries that are compressed together, unpacked as far as the last one that was asked for."""

    def __init__(self, path: Path, packed: bytes) -> None:
        try:
            import lzma
        except ImportError as error:
            raise ImageError(
                f"the compiled kernels cannot be unpacked: this Python has no lzma ({error})"
            ) from None
        self.path, self._packed, self._raw = path, packed, b""
        self._decoder, self._error = lzma.LZMADecompressor(), lzma.LZMAError

    def read(self, start: int, length: int) -> bytes:
        """Returns a piece of the unpacked bytes."""
        missing = start + length - len(self._raw)
        if missing > 0 and not self._decoder.eof:
            try:
                self._raw += self._decoder.decompress(self._packed, max_length=missing)
            except self._error as error:
                raise ImageError(f"{self.path} cannot be unpacked ({error}); {_AGAIN}") from None
            # The decoder keeps what it has not used.
            self._packed = b""
        piece = self._raw[start : start + length]
        if len(piece) < length:
            raise ImageError(f"{self.path} has less in it than its manifest says; {_AGAIN}")
        return piece


def _target(name: str) -> tuple[str, tuple[int, int], bool]:
    """(kind, capability, whether for that one alone) of a target's name: sm_80, sm_90a, ptx_80."""
    kind, major, minor, alone = re.fullmatch(r"(sm|ptx)_(\d+)(\d)(a?)", name).groups()
    return kind, (int(major), int(minor)), bool(alone)


def _runs(name: str, capability: tuple[int, int]) -> bool:
    """Tells whether a device of this capability runs the code of a target."""
    kind, (major, minor), alone = _target(name)
    if alone:
        return (major, minor) == capability
    return (major, minor) <= capability and (kind == "ptx" or major == capability[0])


def _preference(capability: tuple[int, int]):
    """Makes the key by which targets are sorted, best first."""

    def key(name: str) -> tuple:
        kind, of, _ = _target(name)
        return kind == "ptx", of != capability, (-of[0], -of[1])

    return key


def _cuda(version: int) -> str:
    """Writes a CUDA version as people do: 12080 is 12.8."""
    return f"{version // 1000}.{version % 1000 // 10}"


def _numbers() -> list[tuple]:
    """Lists the constants of NUMBERS: what is in capitals, and columns by their names."""
    return [
        (name, value)
        for module in NUMBERS
        for name, value in sorted(vars(module).items())
        if name.isupper() and isinstance(value, (int, float, tuple))
    ]


def text_digest(package: Path = PACKAGE) -> str:
    """Computes the digest of the kernels' files, and of the numbers that they take from others."""
    digest = hashlib.sha256(repr(_numbers()).encode())
    for name in SOURCES:
        digest.update((package / name).read_bytes())
    return digest.hexdigest()


def code_digest(package: Path = PACKAGE) -> str:
    """Computes the digest of the kernels alone: no comments, docstrings, launchers or ops.

    Takes the tokens of all functions under @jit, and of the constants that they read.
    """
    digest = hashlib.sha256(repr(_numbers()).encode())
    for name in SOURCES:
        source = (package / name).read_text()
        lines = source.splitlines(keepends=True)
        for node in ast.parse(source).body:
            if _is_kernel(node) or _is_constant(node):
                first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
                text = "".join(lines[first - 1 : node.end_lineno])
                digest.update("\0".join(_tokens(text)).encode())
    return digest.hexdigest()


def _is_kernel(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and any(
        isinstance(d, ast.Name) and d.id == "jit" for d in node.decorator_list
    )


def _is_constant(node: ast.AST) -> bool:
    return isinstance(node, ast.Assign) and any(
        isinstance(n, ast.Name) and n.id == "constant" for n in ast.walk(node.value)
    )


def _tokens(text: str) -> list[str]:
    """Lists the tokens of a function but for its comments, docstring and layout."""
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    tokens, previous = [], None
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        # A string that begins a line is a docstring.
        doc = token.type == tokenize.STRING and previous in (tokenize.INDENT, tokenize.NEWLINE)
        previous = token.type
        if token.type not in layout and not doc:
            tokens.append(token.string)
    return tokens
