"""The blocks' kernels as variants for ../aot.py, at the sizes of SD3.5-medium and FLUX.1-dev.

for variant in variants():
    report = flowgrpo_kernels.aot.compile_variant(variant, flowgrpo_kernels.aot.TARGETS["sm_90"])
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from ..aot import DTYPES, Variant
from . import _heads, _rows
from .gated_residual import _gated_residual_backward_kernel, _gated_residual_kernel
from .norm_modulate import _norm_modulate_backward_kernel, _norm_modulate_kernel

_FLOAT32 = ("mean_ptr", "rstd_ptr", "cos_ptr", "sin_ptr")
# (width, heads of it, whether there is a second output or branch, rotary)
_MODELS = {"sd3.5-m": (1536, 24, True, False), "flux.1-dev": (3072, 24, False, True)}
# (kernel, what it lacks without a second output or branch)
_ROWS = {
    "norm_modulate": (_norm_modulate_kernel, ("scale2_ptr", "shift2_ptr", "y2_ptr")),
    "norm_modulate backward": (_norm_modulate_backward_kernel, ("dy2_ptr", "scale2_ptr")),
    "gated_residual": (_gated_residual_kernel, ("gate2_ptr", "y2_ptr")),
    "gated_residual backward": (_gated_residual_backward_kernel, ("gate2_ptr", "dy2_ptr")),
}
_HEADS = {
    "joint_heads": _heads.joint_heads_kernel,
    "joint_heads backward": _heads.joint_heads_backward_kernel,
}


def variants(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Variant]:
    """Every kernel for each dtype and model, with all that the model needs."""
    for dtype, (model, sizes) in itertools.product(dtypes, _MODELS.items()):
        width, heads, second, rotary = sizes
        for name, (kernel, optional) in _ROWS.items():
            absent = () if second else optional
            yield variant(f"{name} {model}", kernel, dtype, _rows.options(width), absent)
        options = _heads.options(heads, width // heads, [])
        for name, kernel in _HEADS.items():
            absent = () if rotary else ("cos_ptr", "sin_ptr")
            yield variant(f"{name} {model}", kernel, dtype, options, absent)


def variant(
    name: str, kernel, dtype: str, options: dict[str, Any], absent: tuple[str, ...] = ()
) -> Variant:
    """One variant; options as `_rows.options` and `_heads.options` give them."""
    constants = {key: value for key, value in options.items() if key.isupper()}
    launch = {key: value for key, value in options.items() if not key.isupper()}
    types = {}
    for argument in kernel.arg_names:
        if argument in constants or argument in absent:
            types[argument] = "constexpr"
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in _FLOAT32 else f"*{dtype}"
        else:
            types[argument] = "fp32" if argument == "eps" else "i32"
    aligned = tuple(n for n, kind in types.items() if kind.startswith("*"))
    return Variant(
        name, kernel, dtype, dtype, constants, absent, types=types, aligned=aligned, options=launch
    )
