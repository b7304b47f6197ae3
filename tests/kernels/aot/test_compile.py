"""Kernels compiled for GPUs that are not here: no float64, fma or local memory, 128-bit accesses.

The compiler runs in a process of its own, without the interpreter that the other tests use. A
compile takes about a second, so this is a selection; benchmarks/bench_compile.py checks every
variant.
"""

from __future__ import annotations

import json
import os

import pytest

from support import torch_fork

pytest.importorskip("triton")
pytestmark = pytest.mark.slow

# (target, pairs of velocity and sample dtype, kernels) to compile: every kernel once, in the pair
# that a trainer uses; a forward and a backward in every storage dtype and for the other targets.
CORE = ("sde_step plain", "grpo_loss backward guided")
JOBS = {
    "every kernel": ("sm_90", ("bf16/fp32",), None),
    "every dtype": ("sm_90", ("fp32/fp32", "fp16/fp16", "bf16/bf16"), CORE),
    "rows of 8k elements": ("sm_90", ("bf16/fp32",), (CORE[1],), 8),
    "odd rows": ("sm_90", ("bf16/fp32",), (CORE[1],), 1),
    # The widest kernel, where ptxas gives the fewest registers.
    "widest": ("sm_120", ("bf16/fp32",), ("nft_loss sums plain",)),
    **{
        target: (target, ("bf16/fp32",), CORE) for target in ("sm_80", "sm_100", "sm_120", "gfx942")
    },
}
COUNTS = {"every kernel": 28, "every dtype": 6, "widest": 1}
TOTALS = ("grpo_loss totals", "nft_loss totals", "transition_rows")
SCRIPT = """
import json, sys
from flowgrpo_kernels import aot
for job, (target, pairs, names, *align) in json.loads(sys.argv[1]).items():
    for variant in aot.op_variants(("bf16", "fp16", "fp32"), *align):
        single = not variant.vectorised or variant.name == "initial_noise"
        pair = f"{variant.velocity}/{variant.sample}"
        if (pair not in pairs and not single) or (names and variant.name not in names):
            continue
        report = aot.compile_variant(variant, aot.TARGETS[target])
        print(json.dumps({
            "job": job, "name": variant.name, "pair": pair, "problems": aot.problems(report),
            "registers": report.registers, "instructions": report.instructions,
            "wide_offsets": "arith.muli" in report.ttir and ": i64" in report.ttir,
            # Reading the machine code takes as long as a compilation.
            "machine": [report.machine, report.barriers] if job in ("widest", "gfx942") else None,
        }))
"""


@pytest.fixture(scope="module")
def reports() -> list[dict]:
    done = torch_fork.run(SCRIPT, json.dumps(JOBS), env={**os.environ, "TRITON_INTERPRET": "0"})
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_width_of_odd_rows(reports):
    """128 bits in full blocks wherever rows are that aligned; narrower, and correct, elsewhere."""
    (eight,) = [report for report in reports if report["job"] == "rows of 8k elements"]
    (odd,) = [report for report in reports if report["job"] == "odd rows"]
    narrow = "16-bit global access"
    assert eight["problems"] == [narrow]  # the last block's
    assert odd["problems"] == ["no 128-bit ld.global", "no 128-bit st.global", narrow]
    assert eight["registers"] <= 96 and odd["registers"] <= 96


@pytest.mark.parametrize("job", [job for job in JOBS if "rows" not in job])
def test_compiles_to_what_it_should(reports, job):
    chosen = [report for report in reports if report["job"] == job]
    assert len(chosen) == COUNTS.get(job, 2)
    for report in chosen:
        assert report["problems"] == [], report
        assert 0 < report["instructions"] < 1600, report
        # 128 threads of up to 96 registers leave room for 5 programs on a multiprocessor.
        assert report["registers"] is None or report["registers"] <= 96, report


def test_machine_code(reports):
    """Instructions, and the barriers around sums of a whole program; NVIDIA's tools alone say."""
    (widest,) = [report for report in reports if report["job"] == "widest"]
    machine, barriers = widest["machine"]
    assert 500 < machine < 3000 and 0 < barriers < 100
    assert [r["machine"] for r in reports if r["job"] == "gfx942"] == [[None, None]] * 2


def test_offsets_are_64_bit(reports):
    """A row's start is computed in int64, so tensors may have more than 2^31 elements."""
    streamed = [r for r in reports if r["name"] not in ("finish", *TOTALS)]
    assert streamed and all(r["wide_offsets"] for r in streamed)
