"""The compiled backend launches what Triton would: the same binary, grid, block and parameters.

Over a stub of the driver, which notes what reaches it; see support/kernels/launch_pairs.py.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from flowgrpo_kernels.backends.images import Manifest
from measuring import stub_driver
from support import torch_fork

stub_triton = pytest.importorskip("measuring.stub_triton", exc_type=ImportError)
TESTS = Path(__file__).resolve().parents[2]
MISSING = stub_driver.missing() or stub_triton.missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=MISSING),
]
# Cases of launch_cases.py that are not shipped, and why.
UNSERVED = {
    "sde_step past 2^31": "a size or a stride needs more than 32 bits",
}


@pytest.fixture(scope="module")
def lines() -> dict[str, dict]:
    code = "import sys; from support.kernels.launch_pairs import main; main(sys.argv[1])"
    path = os.pathsep.join([str(TESTS.parent / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path}
    done = torch_fork.run(code, str(stub_driver.build()), cwd=TESTS, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return {line["case"]: line for line in map(json.loads, done.stdout.splitlines())}


def test_every_shipped_kernel_is_launched_as_triton_does(lines):
    """Name, binary, grid, block, shared memory, stream and every byte of the parameters."""
    launches = [launch for line in lines.values() for launch in line["launches"]]
    assert {launch["key"] for launch in launches} == set(Manifest().kernels)
    assert [launch for launch in launches if launch["differ"] or not launch["shipped"]] == []
    assert len(launches) > 1000 and all(launch["bytes"] > 16 for launch in launches)


def test_what_is_not_shipped_says_so(lines):
    unserved = {case: line["unserved"] for case, line in lines.items() if line["unserved"]}
    assert set(unserved) == set(UNSERVED), unserved
    for case, why in UNSERVED.items():
        assert unserved[case].startswith(why), unserved[case]


def test_rows_change_the_grid_alone(lines):
    """Four programs a block of 4096 elements; a launch of 210,000 programs is one, too."""
    for rows in (1, 2, 3, 16, 17, 40, 130):
        grids = [launch["grid"] for launch in lines[f"sde_step, {rows} rows"]["launches"]]
        assert grids == [[16 * rows, 1, 1], [rows, 1, 1]]
    assert lines["sde_step 70000 blocks"]["launches"][0]["grid"] == [210_000, 1, 1]
