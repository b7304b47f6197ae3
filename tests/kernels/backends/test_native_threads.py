"""The choice of an instruction set by several threads at once, under ThreadSanitizer."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[3] / "kernels" / "csrc"
# Ops that do nothing, called by one thread while another one changes what they are chosen by.
PROGRAM = """
#include <thread>
#include "abi.h"
static int32_t op(const FgArgs*) { return 0; }
static int32_t normals(const FgArgs*, uint32_t) { return 0; }
#define TABLE(isa) namespace isa { extern const Kernels kernels; \\
  const Kernels kernels = {op, op, op, op, op, op, op, op, op, op, op, normals}; }
TABLE(isa_baseline)
TABLE(isa_avx2)
TABLE(isa_avx512)
int main() {
  std::thread caller([] { for (int i = 0; i < 1000; ++i) flowgrpo_native_log_prob(nullptr); });
  for (int i = 0; i < 1000; ++i) flowgrpo_native_isa_select(i % 3);
  caller.join();
  return flowgrpo_native_isa_select(0);
}
"""
FLAGS = ["-std=gnu++17", "-g", "-O1", "-fsanitize=thread", "-pthread"]
DEFINED = ['-DFLOWGRPO_VERSION="0"', "-DFLOWGRPO_OPENMP_FOUND=0", "-DFLOWGRPO_X86=1"]


def build(folder: Path, *sources: Path) -> Path | None:
    """Compiles a program with ThreadSanitizer; None where that is not to be had."""
    program = folder / "program"
    command = ["g++", *FLAGS, *DEFINED, "-I", CSRC, *sources, "-o", program]
    done = subprocess.run(command, capture_output=True, text=True)
    return program if done.returncode == 0 else None


def run(program: Path) -> subprocess.CompletedProcess:
    return subprocess.run([program], capture_output=True, text=True, timeout=60)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason="needs g++ on x86",
)
def test_threads_may_choose_at_once(tmp_path):
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}")
    probe = build(tmp_path, empty)
    if probe is None or run(probe).returncode:
        pytest.skip("g++ has no ThreadSanitizer that runs here")
    source = tmp_path / "threads.cpp"
    source.write_text(PROGRAM)
    program = build(tmp_path, source, CSRC / "dispatch.cpp")
    assert program is not None
    done = run(program)
    assert done.returncode == 0 and "data race" not in done.stderr, done.stderr
