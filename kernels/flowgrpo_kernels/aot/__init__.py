"""Ahead of time: the kernels' variants, and their compilation for GPUs that need not be there.

    table.py      what is shipped compiled: recorded from the public ops over their options
    pack.py       its compilation for every target, into the package's images/
    variants.py   what is looked at: the kernels with their types, constants and hints
    compile.py    how: Triton's compiler with an explicit target, and a look at what came out
    elf.py        the parameters of a kernel, read from its binary

    python -m flowgrpo_kernels.aot                  # compiles what is shipped

    for variant in all_variants():
        report = compile_variant(variant, TARGETS["sm_90"])
        assert not problems(report)

Nothing here runs a kernel. It serves the tests (no float64, no local memory, 128-bit accesses), the
table of registers and instructions in benchmarks/, and the release of compiled kernels. Compiling
needs Triton, and must not run under TRITON_INTERPRET=1, which replaces the compiler.
"""

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

# They need Triton, which the table and the variants do not.
_COMPILER = ("TARGETS", "Report", "compile_variant", "problems")


def __getattr__(name: str):
    if name in _COMPILER:
        from . import compile

        return getattr(compile, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
