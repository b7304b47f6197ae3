"""Compilation of a variant by Triton for an explicit target, and checks of what came out."""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .variants import Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_PTX_LINE = r"^\s+(?:@\S+\s+)?[a-z][\w.:]+\s.*;"
# An address, perhaps a predicate, the instruction.
_SASS_LINE = r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)"
_AMD_LINE = r"^\s+(?:s|v|ds|buffer|global|flat)_\w+"


@dataclass
class Report:
    """Result of a compilation.

    shared, local: bytes. registers: a thread's. instructions: lines of PTX or AMD assembly.
    """

    variant: Variant
    target: str
    assembly: str = field(repr=False)
    ttir: str = field(repr=False)
    shared: int
    instructions: int
    registers: int | None = None
    local: int | None = None
    binary: bytes = field(default=b"", repr=False)
    """NVIDIA's."""

    @property
    def machine(self) -> int | None:
        """Instructions that NVIDIA's assembler made, but the padding behind the last one."""
        return len(self._machine_code) if self._machine_code else None

    @property
    def barriers(self) -> int | None:
        """Those of them that wait for other warps."""
        code = self._machine_code
        return sum(text.startswith("BAR") for text in code) if code else None

    @functools.cached_property
    def _machine_code(self) -> list[str]:
        # It takes as long as the compilation, so only where it is asked for.
        dump = _cuobjdump(self.binary, "--dump-sass") if self.binary else ""
        return [text for text in re.findall(_SASS_LINE, dump) if text != "NOP"]


def compile_variant(variant: Variant, target: GPUTarget) -> Report:
    """Compiles one variant for one target, with the options and hints of a real launch."""
    divisible = [["tt.divisibility", 16]]
    hints = {
        (i,): divisible
        for i, name in enumerate(variant.kernel.arg_names)
        if name in variant.aligned
    }
    source = ASTSource(variant.kernel, variant.types, variant.constants, hints)
    compiled = triton.compile(source, target=target, options=variant.options)
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
        report.binary = compiled.asm["cubin"]
        usage = re.search(
            r"REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)",
            _cuobjdump(report.binary, "--dump-resource-usage"),
        )
        if usage:
            registers, stack, local = map(int, usage.groups())
            report.registers, report.local = registers, stack + local
    elif registers := re.search(r"\.vgpr_count:\s+(\d+)", assembly):
        report.registers = int(registers.group(1))
        spilled = re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)
        report.local = int(spilled.group(1)) if spilled else None
    return report


def _cuobjdump(cubin: bytes, option: str) -> str:
    """Reads a binary with Triton's own cuobjdump."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, option, file.name], capture_output=True, text=True, check=False
        )
    return done.stdout


def problems(report: Report) -> list[str]:
    """Lists what a kernel of this package must not have; empty when all is well.

    On AMD a correctly rounded division or square root is made of fma, so fused multiply-adds are
    looked for only in the kernels that have neither.
    """
    faults: list[str] = []
    text, variant = _without_products(report.assembly), report.variant
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
        if variant.name == "transition_rows":
            # Of a few numbers a row; float64 is its contract, and has a division of its own.
            del checks["float64 arithmetic"]
        if variant.vectorised:
            checks["16-bit global access"] = r"\b(?:ld|st)\.global[\w.:]*\.b16\b"
            faults += _narrow_accesses(variant.name, text)
    faults += [fault for fault, pattern in checks.items() if re.search(pattern, text)]
    if report.local:
        faults.append(f"{report.local} bytes of stack or local memory")
    return faults


def _without_products(ptx: str) -> str:
    """Removes the fma's that are a product from the PTX."""
    # sm_80 has no other product of bfloat16; it adds -0, which leaves what a product rounds to.
    zeros = re.findall(r"\bmov\.b(?:32|16)\s+(%\w+), (?:-2147450880|-32768);", ptx)
    for zero in zeros:
        ptx = re.sub(rf"\bfma\.rn\.bf16(?:x2)?\s+%\w+, %\w+, %\w+, {zero};", "", ptx)
    return ptx


def _narrow_accesses(name: str, ptx: str) -> list[str]:
    """Lists the kinds of global access of latents that are never 128 bits wide."""
    reads = name != "initial_noise"
    writes = not name.startswith(
        ("log_prob plain", "log_prob guided", "grpo_loss sums", "nft_loss sums"),
    )
    kinds = [kind for kind, has in (("ld.global", reads), ("st.global", writes)) if has]
    return [f"no 128-bit {k}" for k in kinds if not re.search(rf"{k}[\w.:]*\.v4\.b32", ptx)]
