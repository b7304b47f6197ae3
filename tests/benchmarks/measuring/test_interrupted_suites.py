"""What a benchmark that fails, runs out of time or is stopped leaves: all it has measured."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from measuring import suites
from measuring.waits import recorded_waits
from reporting import records

CASES = [SimpleNamespace(name=name) for name in ("one", "two", "three", "four")]


def found(path):
    record = records.read(path)
    return [r["case"] for r in record["rows"] if r["case"] != "device"], record


def test_each_case_by_itself(tmp_path, capsys):
    out = tmp_path / "r.json"

    def rows_of(case):
        if case.name == "two":
            raise ValueError("no such kernel\nand more")
        if case.name == "four":
            raise KeyboardInterrupt
        return [records.row("kernels", case.name, "ours", "time", 1.0, "us")]

    with pytest.raises(KeyboardInterrupt):
        records.record_cases(CASES, rows_of, out, "cpu", 60.0, threads=3)
    names, record = found(out)
    assert names == ["one", "three"] and record["threads"] == 3
    assert record["failures"] == ["two: ValueError: no such kernel"] and record["skipped"] == []
    assert records.record_cases(CASES[:1], rows_of, out, "cpu", 60.0) == 0
    assert records.record_cases(CASES, rows_of, out, "cpu", -1.0) == 0
    assert found(out)[1]["skipped"] == ["one", "two", "three", "four"]
    assert "not begun: one, two" in capsys.readouterr().out


def test_a_case_of_a_suite(tmp_path):
    """Also a provider's half case is kept, when the other half fails or is interrupted."""
    out = tmp_path / "r.json"
    command = ["--smoke", "--device", "cpu", "--out", str(out)]
    run = suites.SuiteRun("update", suites.parser("", "ours").parse_args(command))
    run.pool._baselines = {"eager nano": object()}

    def one(case):
        run.row(case.name, "ours", "micro_step", 1.0, "ms")
        if case.name == "one":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if case.name == "two":
            raise RuntimeError("cuBLAS")
        if case.name == "four":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.each(CASES, one, lambda case: case.name)
    names, record = found(out)
    assert names == ["one", "one", "two", "three", "four"] and run.pool._baselines == {}
    full = {"case": "one", "metric": "out_of_memory"}
    assert records.find(record["rows"], **full) == 1
    assert record["failures"] == ["two all case: RuntimeError: cuBLAS"]


def test_a_comparison_that_is_stopped_keeps_its_speeds(tmp_path):
    """One provider after the other: what was measured beside eager is compared with it."""
    command = ["--smoke", "--device", "cpu", "--out", str(tmp_path / "r.json"), "--alone"]
    args = suites.parser("", "ours,eager,ours-fused").parse_args(command)
    run = suites.SuiteRun("update", args)

    def measured(run, case, names, text):
        if names == ["ours-fused"]:
            raise KeyboardInterrupt
        return {names[0]: [1.0 if names == ["ours"] else 3.0]}

    with pytest.raises(KeyboardInterrupt):
        run.compare(CASES[0], "one", measured)
    assert records.find(run.rows, provider="ours", metric="speedup_vs_eager") == 3.0


def test_the_warning_of_the_mode_itself_is_no_wait(monkeypatch):
    """torch says once in a process that the mode which finds synchronisations is a prototype."""

    def set_mode(mode):
        if mode == "warn":
            warnings.warn(
                "Synchronization debug mode is a prototype feature and does not yet detect all "
                "synchronizing operations",
                stacklevel=1,
            )

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with recorded_waits() as waits:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
    assert waits == ["called a synchronizing CUDA operation"] * 2
