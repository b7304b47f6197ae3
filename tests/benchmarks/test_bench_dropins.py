"""The suite of the drop-ins, with small latents: every trainer, and its eager sequence agrees."""

from __future__ import annotations

import pytest

import bench_dropins
from reporting import records


@pytest.mark.slow
def test_smoke(tmp_path):
    out = tmp_path / "dropins.json"
    assert bench_dropins.main(["--smoke", "--out", str(out)]) == 0
    record = records.read(out)
    assert record["failures"] == record["skipped"] == []
    cases = {row["case"] for row in record["rows"]}
    names = [case.name for case in bench_dropins.cases(2)]
    assert cases == {f"{name} {kind}" for name in names for kind in ("replay", "backward", "host")}
    assert {row["provider"] for row in record["rows"]} == {"ours", "bare", "eager", "pass"}
    assert all(row["value"] > 0 and row["unit"] == "us" for row in record["rows"])


def test_a_wrong_sequence_is_noticed():
    case = bench_dropins.cases(2)[0]
    wrong = case._replace(eager=lambda b: (None, case.eager(b)[1] * 1.001))
    with pytest.raises(AssertionError):
        bench_dropins.check(wrong, bench_dropins.Buffers.make((2, 3, 5), 0))
