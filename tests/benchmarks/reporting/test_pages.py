"""Pages beside the records show what the records say; the command in a record can be repeated."""

from __future__ import annotations

import json
import re
import sys

import pytest

from reporting import records, tables


def test_the_pages_show_the_records():
    """`python benchmarks tables` after a record has changed."""
    assert tables.outdated() == [] and tables.main(["--check"]) == 0


def test_the_page_of_registers_is_that_of_its_record(tmp_path, monkeypatch, capsys):
    page = (records.RESULTS / "compile.md").read_text(encoding="utf-8")
    assert page.count("sde_step plain") == 3 and "gfx942" in page
    record = records.read(records.RESULTS / "compile.json")
    assert f"commit {record['commit']}" in page
    row = next(r for r in record["rows"] if r["metric"] == "registers")
    row["value"] = 255
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    records.write(record, tmp_path / "compile.json")
    (tmp_path / "compile.md").write_text(page)
    monkeypatch.setattr(tables, "PAGES", {"compile.md": tables.compiled_kernels})
    assert tables.main(["--check"]) == 1 and "compile.md differ" in capsys.readouterr().out
    assert tables.main([]) == 0 and tables.main(["--check"]) == 0
    assert "| 255 / 32 / 683 / 4 |" in (tmp_path / "compile.md").read_text(encoding="utf-8")


def test_no_kernel_of_the_record_has_local_memory():
    """Bytes of stack and local memory of every variant and target: what ptxas could not keep."""
    rows = records.read(records.RESULTS / "compile.json")["rows"]
    local = {row["case"]: row["value"] for row in rows if row["metric"] == "local"}
    assert len(local) == 5 * 216
    assert {case: value for case, value in local.items() if value} == {}


@pytest.mark.parametrize(
    ("script", "command"),
    [
        ("bench_kernels.py", "python benchmarks/bench_kernels.py --cases 'sd3-512 b16'"),
        ("", "python benchmarks --cases 'sd3-512 b16'"),
    ],
)
def test_the_command_of_a_record(script, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(records.BENCHMARKS / script), "--cases", "sd3-512 b16"])
    assert json.loads(json.dumps(records.record([], "cpu")))["command"] == command


@pytest.mark.parametrize(
    "name", ["README.md", "LOG.md", "results/nano/README.md", "results/nano-pixels/README.md"]
)
def test_links_resolve(name):
    page = records.BENCHMARKS / name
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert targets
    for target in targets:
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("name", ["nano", "nano-pixels"])
def test_the_log_names_the_files_of_the_runs(name):
    """Each folder is in the table, each file or its pattern in the log."""
    nano, log = records.RESULTS / name, (records.BENCHMARKS / "LOG.md").read_text("utf-8")
    table = (nano / "README.md").read_text(encoding="utf-8")
    for folder in nano.iterdir():
        if folder.is_dir():
            assert f"]({folder.name})" in table and f"`{folder.name}/" in log
            for path in folder.iterdir():
                pattern = re.sub(r"seed\d", "seed*", path.name)
                assert folder.name == "default" or path.name in log or pattern in log, path
