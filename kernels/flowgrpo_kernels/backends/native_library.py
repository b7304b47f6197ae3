"""Native library: how it is found, checked and opened, and its argument struct.

Installing builds `libflowgrpo_native` from kernels/csrc into the package folder and writes
`_native_build.json`, which says how it was built or why it was not. The library is plain C (ctypes;
neither libtorch nor libpython), so one build serves every torch and Python.

Before it is opened, the file is compared with the checksum of its build, and in a source tree its
sources with those of the build; then its ABI number, struct size and version with this file's. What
does not fit is refused with a sentence: a truncated or stale library never runs.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

ABI = 6
ISAS = ("baseline", "avx2", "avx512")
BUILD_INFO = "_native_build.json"
PACKAGE = Path(__file__).resolve().parents[1]
"""The folder that the library is installed into."""
_AGAIN = "install flowgrpo again to rebuild it"


class NativeError(RuntimeError):
    """Raised when the native library cannot be used; the message says why and what to do."""


class NativeTensor(ctypes.Structure):
    """FgTensor of kernels/csrc/abi.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


_LATENTS = (
    "velocity", "uncond_velocity", "sample", "prev_sample", "noise", "ref_velocity",
    "ref_uncond_velocity", "old_velocity", "x0", "mean", "grad_mean", "grad_x0", "grad_velocity",
    "grad_uncond_velocity",
)  # fmt: skip
_VECTORS = (
    "old_log_prob", "advantages", "row_weight", "kl_row_weight", "sigma", "optimality", "grad",
    "log_prob", "ratio", "positive_error", "negative_error", "old_deviation", "coefs", "loss",
    "policy_loss", "kl", "clip_fraction", "positive_loss", "negative_loss",
)  # fmt: skip
_SCALARS = (
    "guidance_scale", "uncond_scale", "kl_weight", "ratio_low", "ratio_high", "adv_clip", "beta",
    "floor",
)  # fmt: skip


class NativeArgs(ctypes.Structure):
    """FgArgs of kernels/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "elements", "threads")),
        ("table", ctypes.c_void_p),
        ("table_rows", ctypes.c_int64),
        ("table_columns", ctypes.c_int64),
        ("step", ctypes.c_void_p),
        ("seeds", ctypes.c_void_p),
        *((name, NativeTensor) for name in _LATENTS),
        *((name, ctypes.c_void_p) for name in _VECTORS),
        *((name, ctypes.c_float) for name in _SCALARS),
    )


_ROW_INPUTS = ("sigma", "sigma_next", "noise_level", "sigma_max", "noise_step")


class NativeRows(ctypes.Structure):
    """FgRows of kernels/csrc/abi.h, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "law", "flags", "float64")),
        *((name, ctypes.c_void_p) for name in _ROW_INPUTS),
        *((f"{name}_stride", ctypes.c_int64) for name in _ROW_INPUTS),
        ("near_one", ctypes.c_double),
        ("table", ctypes.c_void_p),
    )


def _source_digest(csrc: Path) -> str | None:
    """Computes the digest of the sources as setup.py does; None where there is no source tree."""
    cmake = csrc.parents[1] / "CMakeLists.txt"
    if not csrc.is_dir() or not cmake.is_file():
        return None
    files = [cmake, *sorted(csrc.glob("*.[ch]*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _build_info(folder: Path) -> dict[str, Any]:
    """Reads the facts of the build; NativeError when there is no library."""
    path = folder / BUILD_INFO
    try:
        info = json.loads(path.read_text())
    except FileNotFoundError:
        raise NativeError(
            "the native library was not built: the package was not installed (run pip install .)"
        ) from None
    except (OSError, ValueError) as error:
        raise NativeError(f"{path} cannot be read ({error}); {_AGAIN}") from None
    if not isinstance(info, dict):
        raise NativeError(f"{path} does not hold the facts of a build; {_AGAIN}")
    if not info.get("built"):
        raise NativeError(f"the native library was not built: {info.get('reason', 'unknown')}")
    return info


def load(folder: Path) -> tuple[ctypes.CDLL, dict[str, Any]]:
    """Opens the library in `folder` and returns it with its build info; NativeError if unusable."""
    info = _build_info(folder)
    path = folder / str(info.get("library"))
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise NativeError(f"the native library {path} is missing ({error}); {_AGAIN}") from None
    if digest != info.get("sha256"):
        raise NativeError(f"the native library {path} is corrupt or from another build; {_AGAIN}")
    sources = _source_digest(folder.parent / "csrc")
    if sources not in (None, info.get("sources")):
        raise NativeError(f"the native library {path} is older than kernels/csrc; {_AGAIN}")
    try:
        library = ctypes.CDLL(str(path))
        abi, size = library.flowgrpo_native_abi(), library.flowgrpo_native_args_size()
        library.flowgrpo_native_version.restype = ctypes.c_char_p
        version = library.flowgrpo_native_version().decode()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{path} cannot be loaded ({error}); {_AGAIN}") from None
    if (abi, size) != (ABI, ctypes.sizeof(NativeArgs)) or version != info.get("version"):
        raise NativeError(
            f"{path} has ABI {abi} ({size} bytes) and version {version}, "
            f"expected ABI {ABI} ({ctypes.sizeof(NativeArgs)} bytes) and {info.get('version')}; "
            f"{_AGAIN}"
        )
    library.flowgrpo_native_normals.argtypes = (ctypes.c_void_p, ctypes.c_uint32)
    return library, info


def select(library: ctypes.CDLL, isa: str) -> str:
    """Selects an instruction set ("" or "auto": the best of this CPU); returns the one in use."""
    best = library.flowgrpo_native_isa_best()
    if isa in ("", "auto"):
        return ISAS[library.flowgrpo_native_isa_select(best)]
    if isa not in ISAS:
        raise NativeError(f"FLOWGRPO_NATIVE_ISA must be one of {ISAS} or auto, got {isa!r}")
    if ISAS.index(isa) > best:
        raise NativeError(f"FLOWGRPO_NATIVE_ISA={isa}: this CPU goes up to {ISAS[best]}")
    return ISAS[library.flowgrpo_native_isa_select(ISAS.index(isa))]


@functools.cache
def state() -> tuple[ctypes.CDLL | None, dict[str, Any], str]:
    """Loads the library once; (library, facts of its build, why there is none)."""
    try:
        library, facts = load(PACKAGE)
        isa = os.environ.get("FLOWGRPO_NATIVE_ISA", "").strip().lower()
        return library, {**facts, "isa": select(library, isa)}, ""
    except NativeError as error:
        return None, {}, str(error)


def library() -> ctypes.CDLL:
    """Returns the loaded library, or raises NativeError."""
    loaded, _, why = state()
    if loaded is None:
        raise NativeError(why)
    return loaded
