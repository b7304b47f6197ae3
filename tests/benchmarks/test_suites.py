"""The suites of whole models: smoke runs leave valid records; memory, failures and time run out.

Whole records of rollout, update, iteration and memory are in the rehearsal of test_run_all.py."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import pytest
import torch

import bench_rollout
import bench_update
from measuring import memory, profiles, suites
from providers import flow_grpo
from providers.flow_grpo import FlowGrpoBaseline
from reporting import records

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

ROW = {"suite", "case", "provider", "metric", "value", "unit"}
ON_A_GPU = {"clocks", "throttled"}
pytestmark = pytest.mark.slow


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a suite's main on the CPU; (exit code, record)."""
    # On a CPU all tensors of the process are counted; frozen, what earlier tests have left takes no
    # time in each count.
    gc.collect()
    gc.freeze()

    def run(module, *arguments):
        command = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "r.json"), *arguments]
        monkeypatch.setattr(sys, "argv", [module.__file__, *command])
        code = module.main(command)
        return code, records.read(tmp_path / "r.json")

    return run


def test_profile(run, tmp_path):
    chosen = ("--cases", "b1 cfg", "--providers", "ours", "--set", "optim.steps_per_forward", "1")
    code, record = run(bench_update, "--profile", *chosen)
    assert code == 0 and (tmp_path / "r.txt").read_text().count("matrix products") == 1
    rows = {r["metric"]: r["value"] for r in record["rows"] if r["suite"] == "profile"}
    assert rows["matrix products"] > 0 and rows["ours count"] >= 2
    assert rows["span"] == pytest.approx(sum(rows[g] for g in profiles.GROUPS), rel=1e-3)


def test_what_does_not_fit_or_fails_is_recorded_and_the_rest_goes_on(run, monkeypatch):
    whole = FlowGrpoBaseline.rollout

    def rollout(self, noise=None):
        if self.case.guided:
            raise torch.OutOfMemoryError("too small")
        if self.model.family == "flux":
            raise ArithmeticError("broken")
        return whole(self, noise)

    monkeypatch.setattr(FlowGrpoBaseline, "rollout", rollout)
    code, record = run(bench_rollout, "--providers", "eager")
    assert code == 1 and record["skipped"] == []
    assert record["failures"] == ["tiny-flux t2 b2 no-cfg eager rollout: ArithmeticError: broken"]
    rows = record["rows"]
    full = [r["case"] for r in rows if r["metric"] == "out_of_memory"]
    assert full == ["tiny-sd3 t3 b1 cfg"]
    timed = [r["case"] for r in rows if (r["provider"], r["metric"]) == ("eager", "images")]
    assert timed == ["tiny-sd3 t3 b2 no-cfg"]


def test_no_case_begins_after_the_budget(run):
    code, record = run(bench_update, "--budget", "0")
    assert code == 0 and len(record["skipped"]) == 3
    assert {r["provider"] for r in record["rows"]} == {"ceiling"}


def test_bad_options(run):
    with pytest.raises(SystemExit, match=r"--providers knows ours, .*, not theirs"):
        run(bench_update, "--providers", "theirs")
    with pytest.raises(SystemExit, match="leave no case"):
        run(bench_update, "--cases", "sd9")


def test_values_of_set():
    texts = {"a": "true", "b": "2", "c": "0.5", "d": "off", "e": "None"}
    assert suites.typed(texts) == {"a": True, "b": 2, "c": 0.5, "d": "off", "e": None}


def test_a_profile_groups_kernels_and_finds_the_gaps():
    spans = [
        profiles.Span("nvjet_tst_128x256_64x4", 0, 10),
        profiles.Span("flash_fwd_kernel_gemm", 8, 4),
        profiles.Span("sde_step_kernel", 20, 5),
        profiles.Span("vectorized_elementwise_kernel", 30, 1),
        profiles.Span("Memcpy DtoD (Device -> Device)", 31, 1),
        profiles.Span("sm90_xmma_fprop_implicit_gemm", 40, 10),
    ]
    found = profiles.summarise(spans, 7, {"sde_step_kernel"})
    assert found.groups == {
        "matrix products": 10, "attention": 4, "convolution": 10, "ours": 5, "copies": 1,
        "elementwise": 1,
    }  # fmt: skip
    assert (found.kernels, found.launches, found.span) == (6, 7, 50)
    assert found.idle == 8 + 5 + 8
    text = profiles.table("t", found, 2)
    assert "launches 3.5" in text and "42.0%" in text
    assert "sde_step_kernel" in profiles.our_kernels()


def test_memory_of_tensors_is_counted():
    def call():
        a = torch.empty(1 << 20, dtype=torch.uint8)
        del a
        b = torch.empty(1 << 19, dtype=torch.uint8)
        c = torch.empty(1 << 18, dtype=torch.uint8)
        return b, c

    assert memory.tensor_peak(call, "cpu") == 1 << 20
    assert memory.peak(call, "cpu").result[0].numel() == 1 << 19
    before = memory.resident("cpu")
    kept = torch.empty(4, 1 << 18, dtype=torch.uint8)
    rows = list(kept)
    assert memory.resident("cpu") - before == 1 << 20 and len(rows) == 4
    # What nobody can reach is not held, also before Python has noticed.
    loop = [kept]
    loop.append(loop)
    del kept, rows, loop
    assert memory.resident("cpu") == before
    inner = torch.OutOfMemoryError("full")
    outer = ValueError("no capture")
    outer.__cause__ = inner
    assert memory.out_of_memory(outer) and not memory.out_of_memory(ValueError())
    with flow_grpo.deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("path", sorted((BENCHMARKS / "results").glob("*.json")))
def test_recorded_files_have_rows_with_units(path):
    record = json.loads(path.read_text())
    if "rows" not in record:
        pytest.skip("a table of its own")
    assert all(set(row) - ON_A_GPU == ROW and row["unit"] for row in record["rows"])
