"""The command curate: its table, exit codes, help and progress."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from flowgrpo.cli import curate as command
from flowgrpo.cli.curate import CurationProgress
from flowgrpo.cli.main import main
from flowgrpo.curation import report
from flowgrpo.curation.dataset import CuratedSet, load_pairs
from support.grey_pictures import captioned, grey, write_rewards


@pytest.fixture
def name(tmp_path):
    return write_rewards(tmp_path)["brightness"]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "histograms", lambda *_: b"histograms")
    pairs = {f"{i}.png": (20 * i, f"prompt {i // 2}") for i in range(10)}
    return captioned(tmp_path / "photos", pairs)


def test_a_set_with_pairs(photos, tmp_path, name, capsys):
    out = tmp_path / "out"
    words = f"curate {photos} --out {out} --resolution 4 --shares 1 0 0 --pairs --rewards {name} 1"
    assert main([*words.split(), "--min", name, "40", "--max", name, "160"]) == 0
    output = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert lines == [
        "images read 10",
        f"dropped: {name} below 40 2",
        f"dropped: {name} above 160 1",
        "images in the set 7",
        "train 7",
        "validation 0",
        "test 0",
        "pairs of training images 3",
        f"Written to {out}: dataset.json, report.html, histograms.png.",
    ]
    assert len(CuratedSet.load(out)) == 7 and len(load_pairs(out)) == 3
    options = json.loads((out / "dataset.json").read_text())["options"]
    assert options["min"] == {name: 40.0} and options["size"] == [4, 4]
    # Once more: the same table, and nothing to do.
    grey(photos / "new.png", 3)
    assert main([*words.split(), "--min", name, "40", "--max", name, "160"]) == 0
    assert capsys.readouterr().out == output


def test_no_pairs_are_said(photos, tmp_path, name, capsys):
    words = f"curate {photos} --out {tmp_path}/out --resolution 4 --shares 1 0 0"
    gap = ["--pairs", "--pair-gap", "30", "--rewards", name, "1"]
    assert main([*words.split(), *gap]) == 0
    assert "No training prompt has two images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "no source was given"),
        ("{photos} --shares 0.9 0.2 0.1", "which sums to 1.2"),
        ("{photos} --min brightness 3", "--min has 'brightness', which does not score"),
        ("{photos} --rewards aesthetics 1", "did you mean 'aesthetic'?"),
        ("{photos} --min {name}", "the thresholds are"),
        ("{photos} --rewards {name} 1 --min {name} x", "NAME NUMBER, repeated, is expected"),
        ("{photos} --rewards {name} 1 --min {name} 1 {name} 2", "is given twice"),
        ("{photos}/absent", "is neither a folder nor a shard"),
        ("{photos} --rewards {name} 1 --min {name} 500", "none of 10 images is left"),
        ("{photos} --resolution 9", "none of 10 images is left"),
        ("{photos} --reward-options {name}.size 3 --rewards {name} 1", "takes no options"),
    ],
)
def test_mistakes_are_one_sentence(photos, tmp_path, name, capsys, words, message):
    defaults = ["--out", str(tmp_path / "out"), "--resolution", "8"]
    argv = words.format(photos=photos, name=name).split()
    if "--resolution" in argv:
        defaults = defaults[:2]
    assert main(["curate", *argv, *defaults]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["curate", "--help"])
    output = capsys.readouterr().out
    assert "--min NAME NUMBER" in output and "--skip-unreadable" in output
    main(["--help"])
    assert "flowgrpo curate SOURCE ..." in capsys.readouterr().out


def test_plain_progress(monkeypatch):
    """A line when `QUIET` seconds have passed; the speed is that of this process."""
    now = [100.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=80)
    with CurationProgress(console, "plain", None) as progress:
        for seconds, read in ((0, 1000), (10, 1016), (40, 1100), (50, 1110)):
            now[0] = 100.0 + seconds
            progress(read, read // 2)
    assert console.file.getvalue() == "1100 images read, 550 stay  2.5 images/s\n"


def test_the_bar_is_taken_down():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with CurationProgress(console, "bar", 40) as progress:
        progress(0, 0)
        progress(20, 10)
        progress._progress.refresh()
    assert "20 images read, 10 stay" in console.file.getvalue()
