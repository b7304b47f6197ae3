"""The blocks' kernels compiled for GPUs that are not here: wide accesses, no spills, no recompiles.

In a process without the interpreter, as in test_compile.py. A compile takes about a second, so
this is a selection; benchmarks/bench_compile.py checks every variant.
"""

from __future__ import annotations

import json
import os

import pytest

from support import torch_fork

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

CORE = ("norm_modulate backward sd3.5-m", "joint_heads backward flux.1-dev")
# (target, dtypes, kernels) to compile: every kernel once, two in float32 and for other targets.
JOBS = {
    "every kernel": ("sm_90", ("bf16",), None),
    "float32": ("sm_90", ("fp32",), CORE),
    **{t: (t, ("bf16",), CORE) for t in ("sm_80", "sm_100", "sm_120", "gfx942")},
    # Its bfloat16 products are fma's with -0 there.
    "products": ("sm_80", ("bf16",), ("gated_residual backward sd3.5-m",)),
}
COUNTS = {"every kernel": 12, "products": 1}
SCRIPT = """
import json, sys
from flowgrpo_kernels import aot
from flowgrpo_kernels.blocks.norm_modulate import norm_modulate_kernel
from flowgrpo_kernels.blocks.rows import options

def show(job, variant, target):
    report = aot.compile_variant(variant, aot.TARGETS[target])
    print(json.dumps({
        "job": job, "name": variant.name, "problems": aot.problems(report),
        "registers": report.registers, "shared": report.shared, "ttir": report.ttir,
    }))

for job, (target, dtypes, names) in json.loads(sys.argv[1]).items():
    for variant in aot.block_variants(dtypes):
        if names is None or variant.name in names:
            show(job, variant, target)
absent = ("scale2_ptr", "shift2_ptr", "y2_ptr")
for width, step in ((2432, 16), (1536, 8), (8192, 16)):
    row = aot.block_variant("row", norm_modulate_kernel, "bf16", options(width, step), absent)
    show(f"{width} {step}", row, "sm_90")
print(json.dumps({"specialised": [
    p.name for p in norm_modulate_kernel.params
    if not (p.is_constexpr or p.do_not_specialize or p.name.endswith("_ptr"))
]}))
"""


@pytest.fixture(scope="module")
def lines() -> list[dict]:
    done = torch_fork.run(SCRIPT, json.dumps(JOBS), env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("job", JOBS)
def test_compiles_to_what_it_should(lines, job):
    """No float64, fma, 16-bit access or local memory; 128-bit accesses; registers for 10 warps."""
    chosen = [line for line in lines if line.get("job") == job]
    assert len(chosen) == COUNTS.get(job, 2)
    for line in chosen:
        assert line["problems"] == [], line
        assert line["registers"] is None or line["registers"] <= 96, line
        # A head lies inside a warp: no word of shared memory, so no barrier.
        assert line["shared"] == 0 or not line["name"].startswith("joint_heads"), line
        assert ": i64" in line["ttir"]


def test_widths_and_strides(lines):
    """A tail keeps wide accesses, the widest row spills nothing, strides of 8 are enough."""
    rows = {line["job"]: line for line in lines if line.get("name") == "row"}
    assert len(rows) == 3 and all(line["problems"] == [] for line in rows.values())
    assert rows["8192 16"]["registers"] <= 168


def test_sizes_choose_no_code(lines):
    """B, N and strides are plain arguments: nothing is compiled again for their values."""
    assert lines[-1]["specialised"] == []
