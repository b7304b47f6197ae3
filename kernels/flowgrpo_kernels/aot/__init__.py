"""Ahead of time: the kernels' variants, and their compilation for GPUs that need not be there.

    variants.py   what is compiled: the kernels with their types, constants and hints
    compile.py    how: Triton's compiler with an explicit target, and a look at what came out

    for variant in all_variants():
        report = compile_variant(variant, TARGETS["sm_90"])
        assert not problems(report)

Nothing here runs a kernel. It serves the tests (no float64, no local memory, 128-bit accesses), the
table of registers and instructions in benchmarks/, and anyone who wants the binaries. It needs
Triton, and must not run under TRITON_INTERPRET=1, which replaces the compiler.
"""

from .compile import TARGETS, Report, compile_variant, problems
from .variants import (
    DTYPES,
    Variant,
    all_variants,
    block_variant,
    block_variants,
    op_variant,
    op_variants,
)

__all__ = [
    "DTYPES",
    "TARGETS",
    "Report",
    "Variant",
    "all_variants",
    "block_variant",
    "block_variants",
    "compile_variant",
    "op_variant",
    "op_variants",
    "problems",
]
