"""Compiles the Triton kernels for GPUs that need not be there, and reports what came out.

    for variant in variants():
        report = compile_variant(variant, TARGETS["sm_90"])

Nothing here runs a kernel. It serves the tests (no float64, no local memory, 128-bit accesses), the
table of registers and instructions in benchmarks/, and anyone who wants the binaries.
Must not run under TRITON_INTERPRET=1, which replaces the compiler.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import _grpo_kernels, _triton
from .log_prob import _log_prob_backward_kernel, _log_prob_kernel
from .noise import _noise_kernel
from .sde_step import _sde_step_kernel

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = ("fp32", "bf16", "fp16")
# Pointers of the velocity's dtype and of the sample's; every other pointer is float32 but two.
_VELOCITY = ("v_ptr", "u_ptr", "ref_ptr", "ref_u_ptr", "old_ptr", "dv_ptr", "du_ptr")
_SAMPLE = ("x_ptr", "prev_ptr", "out_ptr")
_INT64 = ("step_ptr", "seeds_ptr")
_PTX_LINE = r"^\s+(?:@\S+\s+)?[a-z][\w.:]+\s.*;"
_AMD_LINE = r"^\s+(?:s|v|ds|buffer|global|flat)_\w+"
_FLOATS = ("scale", "uncond_scale", "kl_weight", "low", "high", "adv_clip")


@dataclass(frozen=True)
class Variant:
    """One kernel with its compile-time constants. vectorised: it streams latents.

    types, aligned and options stand in for the naming rules of this file where they are given: the
    Triton types of all arguments that are no constants, the arguments that are multiples of 16, and
    the options of the launch.
    """

    name: str
    kernel: Any
    velocity: str
    sample: str
    constants: dict[str, Any]
    absent: tuple[str, ...] = ()
    vectorised: bool = True
    types: dict[str, str] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class Report:
    """What a compilation gave. instructions counts lines of PTX or AMD assembly."""

    variant: Variant
    target: str
    assembly: str = field(repr=False)
    ttir: str = field(repr=False)
    shared: int
    instructions: int
    registers: int | None = None
    local: int | None = None


def variants(dtypes: tuple[str, ...] = DTYPES) -> Iterator[Variant]:
    """Every kernel, for every pair of velocity and sample dtype and the switches that matter."""
    for v, s in itertools.product(dtypes, dtypes):
        for guided in (False, True):
            absent = () if guided else ("u_ptr",)
            tag = "guided" if guided else "plain"
            flags = {"ALIGN": 16, "GUIDED": guided}
            yield Variant(
                f"sde_step {tag}", _sde_step_kernel, v, s,
                {**flags, "NOISE": 1, "SINGLE": False}, (*absent, "noise_ptr"),
            )  # fmt: skip
            yield Variant(
                f"log_prob {tag}", _log_prob_kernel, v, s, {**flags, "SINGLE": False}, absent
            )
            grad = {**flags, "UNCOND_GRAD": guided}
            gone = absent if guided else (*absent, "du_ptr")
            yield Variant(f"log_prob_backward {tag}", _log_prob_backward_kernel, v, s, grad, gone)
            # Guided: with the KL, both its halves. Plain: with the KL and Guard, the widest kernel.
            loss = {"REF": True, "REF_GUIDED": guided, "OLD": not guided}
            gone = ("old_ptr",) if guided else ("u_ptr", "ref_u_ptr")
            yield Variant(
                f"grpo_loss sums {tag}", _grpo_kernels._sums_kernel, v, s, {**flags, **loss}, gone
            )
            gone = gone if guided else (*gone, "du_ptr")
            yield Variant(
                f"grpo_loss backward {tag}", _grpo_kernels._backward_kernel, v, s,
                {**grad, **loss}, gone,
            )  # fmt: skip
    for s in dtypes:
        yield Variant("initial_noise", _noise_kernel, s, s, {"ALIGN": 16})
    # Rows of up to 32 blocks: every latent of SD3.5 and FLUX at 512 pixels.
    flags = {"REF": True, "OLD": True, "WEIGHT": True, "KL_WEIGHT": True}
    for name, kernel, constants in (
        ("finish", _triton.finish_kernel, {"WIDTH": 32}),
        ("grpo_loss rows", _grpo_kernels._rows_kernel, {"WIDTH": 32, **flags}),
        ("grpo_loss totals", _grpo_kernels._totals_kernel, {"REF": True}),
    ):
        yield Variant(
            name, kernel, "fp32", "fp32", constants, vectorised=False, options=_triton.ONE_WARP
        )


def _type(name: str, variant: Variant) -> str:
    if name in variant.constants or name in variant.absent:
        return "constexpr"
    if name in _VELOCITY:
        return f"*{variant.velocity}"
    if name in _SAMPLE:
        return f"*{variant.sample}"
    if name in _INT64:
        return "*i64"
    if name.endswith("_ptr"):
        return "*fp32"
    return "fp32" if name in _FLOATS else "i32"


def compile_variant(
    variant: Variant, target: GPUTarget, types: dict[str, str] | None = None
) -> Report:
    """Compiles one variant for one target, with the options and hints of a real launch.

    types: Triton types of arguments that the naming rule above does not know.
    """
    names = variant.kernel.arg_names
    given = {**variant.types, **(types or {})}
    signature = {name: given.get(name) or _type(name, variant) for name in names}
    constants = {**variant.constants, **dict.fromkeys(variant.absent)}
    aligned = [["tt.divisibility", 16]]
    whole = variant.constants.get("ALIGN", 16) == 16
    attributes = {
        (i,): aligned
        for i, name in enumerate(names)
        if name in variant.aligned
        or (signature[name].startswith("*") and name in _triton.LATENTS)
        or (name == "elements" and whole)
    }
    source = ASTSource(variant.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=variant.options or _triton.LAUNCH)
    nvidia = target.backend == "cuda"
    assembly = compiled.asm["ptx" if nvidia else "amdgcn"]
    report = Report(
        variant,
        f"sm_{target.arch}" if nvidia else target.arch,
        assembly,
        compiled.asm["ttir"],
        compiled.metadata.shared,
        len(re.findall(_PTX_LINE if nvidia else _AMD_LINE, assembly, re.M)),
    )
    if nvidia:
        report.registers, report.local = _resources(compiled.asm["cubin"])
    elif found := re.search(r"\.vgpr_count:\s+(\d+)", assembly):
        report.registers = int(found.group(1))
        spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        report.local = int(spilled.group(1)) if spilled else None
    return report


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """(registers a thread, bytes of stack and local memory), by the cuobjdump that Triton ships."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=False
        )
    found = re.search(r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", done.stdout)
    if not found:
        return None, None
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def problems(report: Report) -> list[str]:
    """What a kernel of this package must not have; empty when all is well.

    On AMD a correctly rounded division or square root is made of fma, so fused multiply-adds are
    looked for only in the kernels that have neither.
    """
    found, text, variant = [], _without_products(report.assembly), report.variant
    if report.target.startswith("gfx"):
        checks = {"float64 arithmetic": r"\bv_\w+_f64\b"}
        if "log_prob plain" in variant.name or "grpo_loss sums" in variant.name:
            checks["fused multiply-add"] = r"\bv_(?:fma|mad|fmac|mac)\w*_f32\b"
    else:
        checks = {
            "float64 arithmetic": r"\.f64\b",
            "fused multiply-add": r"\bfma\.",
            # Without .rn ptxas may fuse them; with .ftz, or approx, the bits are not the CPU's.
            "product or sum that ptxas may fuse": r"\b(?:mul|add|sub)(?:\.ftz)?\.f32(?:x2)?\b",
            "flush to zero": r"\.ftz\b",
            "approximate division or root": r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\b",
            "local memory in the PTX": r"\b(?:ld|st)\.local\b",
        }
        if variant.vectorised:
            checks["16-bit global access"] = r"\b(?:ld|st)\.global[\w.:]*\.b16\b"
            found += _narrow_accesses(variant.name, text)
    found += [problem for problem, pattern in checks.items() if re.search(pattern, text)]
    if report.local:
        found.append(f"{report.local} bytes of stack or local memory")
    return found


def _without_products(ptx: str) -> str:
    """The PTX without the fma's that are a product: sm_80 has no other for bfloat16, and adds -0,
    which leaves what a product rounds to."""
    zeros = re.findall(r"\bmov\.b(?:32|16)\s+(%\w+), (?:-2147450880|-32768);", ptx)
    for zero in zeros:
        ptx = re.sub(rf"\bfma\.rn\.bf16(?:x2)?\s+%\w+, %\w+, %\w+, {zero};", "", ptx)
    return ptx


def _narrow_accesses(name: str, ptx: str) -> list[str]:
    """Kinds of global access of latents that are never 128 bits wide."""
    reads = name != "initial_noise"
    writes = not name.startswith(("log_prob plain", "log_prob guided", "grpo_loss sums"))
    kinds = [kind for kind, has in (("ld.global", reads), ("st.global", writes)) if has]
    return [f"no 128-bit {k}" for k in kinds if not re.search(rf"{k}[\w.:]*\.v4\.b32", ptx)]
