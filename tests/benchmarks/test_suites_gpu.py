"""On a GPU: what is measured there is measured right, and every suite runs with tiny models."""

from __future__ import annotations

import pytest
import torch

import bench_blocks
import bench_iteration
import bench_kernels
import bench_rollout
import bench_update
from measuring import memory, profiles, timers, waits
from reporting import records

pytestmark = pytest.mark.gpu


@pytest.fixture
def run(tmp_path):
    """Run a suite's main with tiny models on the GPU; its record."""

    def run(module, *arguments):
        out = tmp_path / "r.json"
        assert module.main(["--smoke", "--device", "cuda", "--out", str(out), *arguments]) == 0
        return records.read(out)

    return run


def test_waits_are_counted():
    x = torch.ones(4, device="cuda")
    with waits.recorded_waits() as found:
        x + 1
        x.sum().item()
        x.nonzero()
    assert len(found) >= 2
    with waits.recorded_waits() as found:
        x + 1
    assert found == [] and torch.cuda.get_sync_debug_mode() == 0


def test_kernels_launches_and_peaks_are_counted():
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    call = lambda: torch.relu(a @ a)  # noqa: E731
    call()
    found = profiles.record(call, "cuda")
    assert found.counts["matrix products"] >= 1 and found.counts["elementwise"] == 1
    assert found.launches >= found.kernels >= 2 and found.span > found.idle >= 0
    peak = memory.peak(lambda: torch.empty(1 << 28, dtype=torch.uint8, device="cuda"), "cuda")
    assert peak.allocated == 1 << 28 and peak.reserved >= 1 << 28
    del peak
    elapsed = timers.seconds(lambda: torch.cuda._sleep(20_000_000), "cuda")
    assert 0.002 < elapsed < 0.2


def test_the_record_names_the_gpu_and_its_clocks():
    record = records.record([], "cuda")
    assert record["device"].startswith(torch.cuda.get_device_name()) and " MHz" in record["device"]
    assert record["driver"][0].isdigit()


@pytest.mark.parametrize("case", ["tiny-sd3", "tiny-flux"])
def test_rollout(run, case):
    record = run(bench_rollout, "--cases", case)
    assert record["failures"] == [] and record["skipped"] == []
    rows = record["rows"]
    assert not [r for r in rows if r["metric"] == "out_of_memory"]
    cases = {r["case"] for r in rows} - {"device"}
    for name in cases:
        for provider in ("ours", "ours-loop", "eager"):
            for metric in ("images", "mfu", "launches", "kernels", "syncs", "peak_memory"):
                assert records.find(rows, case=name, provider=provider, metric=metric) is not None
        launches = [
            records.find(rows, case=name, provider=p, metric="launches")
            for p in ("ours", "ours-loop", "eager")
        ]
        # One launch for the graph; what is left are the copies around it.
        assert launches[0] < launches[1] < launches[2]


def test_update_iteration_memory_and_profile(run):
    rows = run(bench_update, "--cases", "b1 cfg")["rows"]
    for provider in ("ours", "ours-captured"):
        assert records.find(rows, provider=provider, metric="max_ratio_error") == 0.0
    assert not run(bench_iteration, "--alone", "--cases", "cfg w2 kl")["failures"]
    rows = run(bench_iteration, "--memory", "--cases", "cfg w2 kl")["rows"]
    assert records.find(rows, provider="ours", metric="peak_memory") > 0
    rows = run(bench_update, "--profile", "--cases", "b1 cfg", "--providers", "ours")["rows"]
    assert records.find(rows, metric="ours count") >= 3


def test_kernels(run):
    rows = run(bench_kernels)["rows"]
    found = {r["provider"] for r in rows}
    assert found == {"ours", "ours-loop", "reference", "eager", "ceiling"}
    assert all(r["clocks"]["sm_mhz"][1] > 0 and isinstance(r["throttled"], list) for r in rows)
    assert all(r["value"] > 0 for r in rows)


def test_blocks(run):
    rows = run(bench_blocks)["rows"]
    assert {r["provider"] for r in rows} == {"ours", "eager", "ceiling"}
    assert len(rows) == 96 and all(r["value"] > 0 for r in rows)
