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
    looked for only in the kernels that have neither. transition_rows computes in float64, a few
    numbers a row, and must; no other kernel may.
    """
    faults: list[str] = []
    text, variant = _without_products(report.assembly), report.variant
    amd = report.target.startswith("gfx")
    in_float64 = variant.name == "transition_rows"
    if bool(re.search(r"\bv_\w+_f64\b" if amd else r"\.f64\b", text)) != in_float64:
        faults.append("no float64 arithmetic" if in_float64 else "float64 arithmetic")
    checks: dict[str, str] = {}
    if amd:
        if "log_prob plain" in variant.name or "grpo_loss sums" in variant.name:
            checks["fused multiply-add"] = r"\bv_(?:fma|mad|fmac|mac)\w*_f32\b"
    else:
        checks = {
            "fused multiply-add": r"\bfma\.",
            # Without .rn ptxas may fuse them; with .ftz, or approx, the bits are not the CPU's.
            "product or sum that ptxas may fuse": r"\b(?:mul|add|sub)(?:\.ftz)?\.f32(?:x2)?\b",
            "flush to zero": r"\.ftz\b",
            "approximate division or root": r"\b(?:div|sqrt|rcp|rsqrt)\.(?:approx|full)\b",
            "local memory in the PTX": r"\b(?:ld|st)\.local\b",
        }
        if variant.vectorised:
            checks["16-bit global access"] = r"\b(?:ld|st)\.global[\w.:]*\.b16\b"
            faults += _narrow_accesses(variant, text)
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


def _narrow_accesses(variant: Variant, ptx: str) -> list[str]:
    """Lists the kinds of global access of latents that are never as wide as they can be.

    128 bits. Where a kernel also writes mean or x0, in float32, a thread has the four elements of
    such a store, and of 16-bit latents alone it loads 64 bits: eight would be as many bytes in
    fewer loads, and each store behind barriers.
    """
    name = variant.name
    reads = name != "initial_noise"
    writes = not name.startswith(
        ("log_prob plain", "log_prob guided", "grpo_loss sums", "nft_loss sums"),
    )
    moments = variant.constants.get("MEAN") or variant.constants.get("X0")
    loads = 64 if moments and "fp32" not in (variant.velocity, variant.sample) else 128
    widths = ({"ld.global": loads} if reads else {}) | ({"st.global": 128} if writes else {})
    return [
        f"no {width}-bit {kind}"
        for kind, width in widths.items()
        if not re.search(rf"{kind}[\w.:]*\.v{width // 32}\.b32", ptx)
    ]
