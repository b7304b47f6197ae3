"""FLOWGRPO_TEST_CPU: the processes of a rehearsal see the other CPU, those that tests start too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "support" / "another_cpu"
PROBE = """
import torch
from torch import cpu
fast = cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported()
print(fast, torch.backends.cpu.get_cpu_capability())
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["avx2", "bf16"])
def test_torch_answers_for_the_cpu_of_that_kind(kind):
    env = {**os.environ, "PYTHONPATH": str(FOLDER), "FLOWGRPO_TEST_CPU": kind}
    env.pop("ATEN_CPU_CAPABILITY", None)
    done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True)
    fast, capability = done.stdout.split()
    assert fast == str(kind == "bf16")
    assert kind == "bf16" or capability in ("AVX2", "DEFAULT")
