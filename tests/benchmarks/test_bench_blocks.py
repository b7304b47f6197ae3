"""Suite blocks: its baseline computes what the fused ops compute; a smoke run writes a record."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("diffusers")
ROW = {"suite", "case", "provider", "metric", "value", "unit"}


@pytest.fixture(scope="module")
def suite():
    import bench_blocks

    return bench_blocks


def test_the_baseline_computes_what_we_compute(suite):
    for case in suite.cases(smoke=True, pattern="both"):
        b = suite.Buffers(case, "cpu", torch.float32, seed=1)
        found = []
        for function in (suite.ours, suite.eager):
            outputs = function(case, b)
            found.append([*outputs, *torch.autograd.grad(outputs, b.leaves, b.cotangents)])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)
        leaves = sum(leaf.numel() for leaf in b.leaves)
        tokens = case.batch * sum(case.model.tokens) * case.model.width
        # Forward reads the leaves and writes the outputs, each once.
        moved = leaves + sum(output.numel() for output in suite.ours(case, b))
        assert suite.ACCESSES[case.op][0] * tokens == moved


@pytest.mark.slow
def test_smoke_run_writes_a_record(suite, tmp_path):
    out = tmp_path / "blocks.json"
    assert suite.main(["--smoke", "--out", str(out), "--device", "cpu"]) == 0
    record = json.loads(out.read_text())
    assert all(set(row) == ROW and row["suite"] == "blocks" for row in record["rows"])
    assert {row["provider"] for row in record["rows"]} == {"ours", "eager", "ceiling"}
    # 5 ops of one model and 3 of the other, both passes; two metrics of three providers.
    assert len({row["case"] for row in record["rows"]}) == 16
    assert len(record["rows"]) == 96 and all(row["value"] > 0 for row in record["rows"])
