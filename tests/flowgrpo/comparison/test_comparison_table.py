"""Tables and comparison.json of runs whose figures are known."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
from rich.console import Console

from flowgrpo.comparison import picture, record, table
from flowgrpo.comparison.compare import show, write
from flowgrpo.comparison.folder import Attempt, Folder
from flowgrpo.comparison.report import make_report
from flowgrpo.evaluation import quality
from reporting import records
from support import comparisons

BASE = [1, 0, 0, 0, 1, 1]
ATTEMPT = Attempt("A-seed0", 0, False, "", 1, 2, "a CPU", "6.1", "abcdef", "2026", 1000)


def lines(images, seconds, **figures):
    """A run of 4 iterations: the base, and its end."""
    return [
        comparisons.evaluation(0, 0.0, BASE, quality={"palette": 0.1, "diversity": 0.25}),
        comparisons.evaluation(4, seconds, images, **figures),
    ]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A-seed0, B-seed0, A-seed1, B-seed1; the prompt set has tolerances."""
    monkeypatch.setattr(
        "flowgrpo.comparison.report.tolerances_of", lambda name: {"palette": 0.05, "absent": 1.0}
    )
    base = comparisons.recipe(tmp_path)
    return comparisons.plan(comparisons.study(), base, (0, 1), tmp_path / "out")


@pytest.fixture
def whole(runs):
    """All four runs, finished."""
    figures = {"quality": {"palette": 0.11, "diversity": 0.2}, "partial": 0.75, "kl": 0.5}
    comparisons.write_run(runs[0], lines([1, 1, 1, 1, 1, 1], 10.0, **figures))
    comparisons.write_run(runs[1], lines([1, 1, 0, 0, 1, 1], 20.0, **figures))
    figures = {"quality": {"palette": 0.21, "diversity": 0.1}, "partial": 0.25, "kl": 0.3}
    comparisons.write_run(runs[2], lines([1, 1, 1, 1, 0, 0], 8.0, **figures))
    comparisons.write_run(runs[3], lines([0, 0, 0, 0, 1, 1], 16.0, **figures))
    return runs


def report_of(runs, tmp_path, study=None):
    return make_report(study or comparisons.study(), ("A", "B"), (0, 1), runs, tmp_path / "out")


def test_the_table_at_equal_images_by_hand(whole, tmp_path):
    shown = table.cells(report_of(whole, tmp_path), "images")
    assert shown.title == "Equal images: after 32 images"
    names = [name.replace("\n", " ") for name in shown.head]
    assert names == [
        *("", "accuracy, % (95 % interval)", "seeds, lowest to highest", "against the base"),
        *("against A", "images", "seconds", "quality held", "palette", "diversity", "partial"),
        "KL to the base",
    ]
    base, a, b = shown.rows
    # The base: prompts 0.5, 0 and 1, so colors 0.25 and counting 1.
    assert base[:3] == ["base", "62.5 (50.0 to 75.0)", "-"]
    assert base[3:] == ["-", "-", "-", "-", "-", "0.1", "0.25", "0.5", "-"]
    # A: seed 0 all right (100), seed 1 colors alone (50). Each prompt of a task has one mean.
    assert a[:3] == ["A", "75.0 (75.0 to 75.0)", "50.0 to 100.0"]
    # Against the base the colors gain 0.5 and 1, counting loses 0.5.
    assert a[3].startswith("+12.5 (") and a[4] == "-"
    assert a[5:7] == ["32", "9.0"]
    # 0.11 is within 0.05 of 0.1, 0.21 is not.
    assert a[7:] == ["no: palette in 1 of 2", "0.16", "0.15", "0.5", "4.00e-01"]
    # B: seed 0 has colors 0.5 and counting 1, seed 1 has colors 0 and counting 1.
    assert b[1].startswith("62.5 (") and b[2] == "50.0 to 75.0"
    assert b[3].startswith("+0.0 (") and b[4].startswith("-12.5 (")


def test_the_table_at_equal_seconds_is_where_the_shortest_run_ends(whole, tmp_path):
    report = report_of(whole, tmp_path)
    shown = table.cells(report, "seconds")
    assert shown.title == "Equal seconds: after 8.0 s of training, where the shortest run ends"
    _, a, b = shown.rows
    # A: 8 of 10 s are 25.6 images and 4/5 of the way from 62.5 to 100, 92.5; seed 1 has 50.
    assert (a[2], a[5], a[6]) == ("50.0 to 92.5", "29", "8.0")
    # B: 8 of 20 s, 62.5 to 75: 67.5; 8 of 16 s, 62.5 to 50: 56.25.
    assert b[1].startswith("61.9 (") and b[2] == "56.2 to 67.5"
    study = comparisons.study(seconds=16.0)
    longer = report_of(whole, tmp_path, study)
    assert table.title(longer, "seconds") == "Equal seconds: after 16.0 s of training"
    # No run of A went on for 16 s.
    assert longer.readings["seconds"]["A"] is None
    assert table.cells(longer, "seconds").rows[1][1] == "not reached"


def fail(runs, tmp_path, *failed):
    """Note a process of each run; those in `failed` ended with an error."""
    study = comparisons.study()
    configs = comparisons.configs(study, comparisons.recipe(tmp_path))
    with Folder.open(tmp_path / "out", study, configs) as folder:
        for run in runs:
            bad = run.name in failed
            changes = {"exit": 1, "error": "error: out of memory"} if bad else {}
            folder.note(dataclasses.replace(ATTEMPT, run=run.name, **changes))


def test_a_failed_run_is_named_and_is_no_number(runs, tmp_path):
    fail(runs, tmp_path, "B-seed0", "B-seed1", "A-seed1")
    comparisons.write_run(runs[0], lines([1] * 6, 10.0))
    report = report_of(runs, tmp_path)
    _, a, b = table.cells(report, "images").rows
    assert a[1:3] == ["100.0 (100.0 to 100.0)", "100.0 to 100.0 (1 of 2 seeds)"]
    assert b[0] == "B" and b[1] == "failed" and set(b[2:]) == {""}
    text = table.markdown(report)
    assert "B-seed0 failed: error: out of memory" in text and "1 of 4 runs finished" in text
    written = record.record(report, "flowgrpo compare")
    assert not written["complete"]
    assert written["runs"]["runs/B-seed0"]["error"] == "error: out of memory"
    assert {row["provider"] for row in written["rows"]} == {"base", "A"}
    assert "runs/B-seed0" not in written["curves"]


def test_runs_that_did_not_finish_are_not_called_failed(runs, tmp_path):
    comparisons.write_run(runs[0], lines([1] * 6, 10.0))
    comparisons.write_run(runs[1], lines([1] * 6, 10.0), interrupted=True)
    report = report_of(runs, tmp_path)
    assert table.cells(report, "images").rows[2][1] == "2 of 2 runs not finished"
    assert table.failures(report) == []


def test_nothing_finished_is_an_empty_table(runs, tmp_path):
    report = report_of(runs, tmp_path)
    shown = table.cells(report, "images")
    assert shown.title == "Equal images: after 32 images"
    assert [row[1] for row in shown.rows] == ["2 of 2 runs not finished"] * 2
    assert table.cells(report, "seconds").title == "Equal seconds: no run is finished"
    write(report, tmp_path / "out", "flowgrpo compare x")
    assert not (tmp_path / "out" / "comparison.png").exists()
    assert json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"] == []


def test_what_stands_below_the_tables(whole, tmp_path):
    fail(whole, tmp_path)
    report = report_of(whole, tmp_path)
    assert table.lines_below(report) == [
        # With seed 1 both are right in one task and wrong in the other.
        "Order at equal images: A > B; 1 of 2 seeds put them in it alone.",
        "Order at equal seconds: A > B; 1 of 2 seeds put them in it alone.",
    ]
    summary = json.loads((whole[0].folder / "summary.json").read_text())
    summary["device"] = "cpu (2 threads)"
    (whole[0].folder / "summary.json").write_text(json.dumps(summary))
    [note] = report_of(whole, tmp_path).notes()
    assert note == (
        "Seconds are of unequal conditions and do not compare: cpu (2 threads) of a CPU, up to 2 "
        "runs at once; cpu (1 threads) of a CPU, up to 2 runs at once."
    )


def test_runs_of_several_commits_are_noted(whole, tmp_path):
    fail(whole[:3], tmp_path)
    study = comparisons.study()
    configs = comparisons.configs(study, comparisons.recipe(tmp_path))
    with Folder.open(tmp_path / "out", study, configs) as folder:
        folder.note(dataclasses.replace(ATTEMPT, run=whole[3].name, commit="fedcba+"))
    [note] = report_of(whole, tmp_path).notes()
    assert note == "The runs ended under several commits: abcdef, fedcba+."


def test_the_benchmarks_tools_read_the_record(whole, tmp_path):
    path = record.write(report_of(whole, tmp_path), "flowgrpo compare", tmp_path / "c.json")
    rows = records.read(path)["rows"]
    assert records.find(rows, case="images", provider="A", metric="accuracy") == 0.75
    assert records.find(rows, case="images", provider="B", metric="seconds") == 18.0


def test_equal_arms_are_in_no_order(runs, tmp_path):
    for run in runs[::2]:
        comparisons.write_run(run, lines([1] * 6, 10.0))
    comparisons.write_run(runs[1], lines([1] * 6, 10.0))
    report = report_of(runs, tmp_path)
    assert table.order_line(report, "images") == (
        "Order at equal images: A = B; 1 of 1 seed puts them in it alone."
    )


def test_runs_that_begin_from_another_base_are_noted(runs, tmp_path):
    for run in runs[:3]:
        comparisons.write_run(run, lines([1] * 6, 10.0))
    other = lines([1] * 6, 10.0)
    other[0]["images"] = [0] * 6
    comparisons.write_run(runs[3], other)
    assert "do not agree on the scores of the model" in " ".join(report_of(runs, tmp_path).notes())


def test_the_record_has_each_figure_with_its_runs(whole, tmp_path):
    fail(whole, tmp_path)
    report = report_of(whole, tmp_path)
    written = record.record(report, "flowgrpo compare ranks")
    assert written["complete"] and written["seeds"] == [0, 1]
    assert {"device", "versions", "commit", "command", "date", "rows"} <= set(written)

    def find(**fields):
        rows = written["rows"]
        return [row for row in rows if all(row.get(k) == v for k, v in fields.items())]

    [pooled] = find(case="images", provider="A", metric="accuracy", seed=None)
    assert pooled["value"] == 0.75 and pooled["interval"] == [0.75, 0.75]
    assert pooled["runs"] == ["runs/A-seed0", "runs/A-seed1"]
    [single] = find(case="images", provider="A", metric="accuracy", seed=1)
    assert single["value"] == 0.5 and single["runs"] == ["runs/A-seed1"]
    [kl] = find(case="images", provider="A", metric="kl")
    assert kl["value"] == pytest.approx(0.4)
    [guard] = find(case="images", provider="A", metric="quality_held")
    assert guard["value"] == 0.0 and guard["outside"] == {"palette": 1}
    [start] = find(provider="base", metric="accuracy")
    assert start["value"] == 0.625 and start["case"] == "start"
    assert written["budgets"]["seconds"] == {"value": 8.0, "set_by_study": False}
    assert written["order"]["seconds"] == {"arms": ["A", "B"], "agreeing_seeds": 1, "of": 2}
    run = written["runs"]["runs/A-seed0"]
    assert run["machine"] == "a CPU" and run["commit"] == "abcdef" and run["threads"] == 1
    assert run["config"]["policy"]["lora_rank"] == whole[0].config.policy.lora_rank
    curve = written["curves"]["runs/A-seed0"]
    assert [(point["images"], point["accuracy"]) for point in curve] == [(0, 0.625), (32, 1.0)]
    # It is JSON as it stands, without NaN.
    assert json.loads(json.dumps(written, allow_nan=False))


@pytest.mark.slow
def test_what_is_written_and_shown(whole, tmp_path):
    report, out = report_of(whole, tmp_path), tmp_path / "out"
    console = Console(file=io.StringIO(), width=60)
    write(report, out, "flowgrpo compare ranks")
    show(report, out, console)
    shown = console.file.getvalue()
    assert "Equal images" in shown and "75.0 (75.0 to 75.0)" in shown
    text = (out / "table.md").read_text()
    assert "| A | 75.0 (75.0 to 75.0) | 50.0 to 100.0 |" in text
    header = text.splitlines()[text.splitlines().index("## Equal images: after 32 images") + 2]
    assert header.count("|") == 13 and "accuracy, % (95 % interval)" in header
    assert json.loads((out / "comparison.json").read_text())["study"] == "ranks"
    assert (out / "comparison.png").stat().st_size > 5000


def test_a_score_that_is_no_accuracy_has_its_own_name(runs, tmp_path):
    comparisons.write_run(runs[0], lines([0.25] * 6, 10.0))
    report = report_of(runs, tmp_path)
    shown = table.cells(report, "images")
    assert report.label == "strict"
    assert shown.head[1] == "strict\n(95 % interval)"
    assert shown.rows[1][1] == "0.250 (0.250 to 0.250)"


def test_tolerances_are_the_prompt_set_s():
    assert quality.tolerances_of("no such set") == {}
    assert set(picture.PANELS) == set(picture.X_LABELS) | {"images", "seconds"}
