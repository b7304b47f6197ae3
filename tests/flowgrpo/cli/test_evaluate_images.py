"""`flowgrpo evaluate --images` and `--table`: from files on disk to the table, by the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from experiments.ocr_renders import render
from flowgrpo.cli import evaluate, main
from flowgrpo.cli.options import gather
from flowgrpo.evaluation import systems
from flowgrpo.rewards import models
from flowgrpo.rewards.images import to_pil
from flowgrpo.runs import display
from support import image_folders

REWARDS = '''
def right(images, prompts, metadata):
    """1 where the red is as much as the metadata say."""
    pairs = zip(images[:, 0, 0, 0].tolist(), metadata, strict=True)
    return [float(red == entry["red"]) for red, entry in pairs]


def red(images, prompts, metadata):
    return images[:, 0].double().mean((1, 2)) / 255


def dark(images, prompts, metadata):
    return [float("nan") if red > 200 else 1.0 for red in images[:, 0, 0, 0].tolist()]
'''


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two systems' pictures in GenEval's layout, drawn by hand, and rewards of the user's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").write_text(REWARDS)
    counting, colors = {"tag": "counting", "red": 10}, {"tag": "colors", "red": 20}
    image_folders.geneval(
        tmp_path / "good",
        [("one", counting, [10, 10]), ("two", counting, [10, 0]), ("three", colors, [20, 20])],
    )
    image_folders.geneval(
        tmp_path / "poor",
        [("one", counting, [0, 0]), ("two", counting, [10, 0]), ("three", colors, [0, 0])],
    )
    return tmp_path


def run(*words: str | Path) -> int:
    return main.main(["evaluate", *map(str, words)])


def refused(capsys, *words: str | Path) -> str:
    assert run(*words) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and shown.count("\n") == 1
    return shown


def scores(path: Path, kind: str = "task") -> dict[str, dict]:
    """Label -> reward -> mean, interval and groups."""
    values = json.loads((path / "evaluation.json").read_text())
    return {row["label"]: row[kind] and row[kind]["scores"] for row in values["systems"]}


def test_pictures_of_two_systems(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_base", None)
    line = ["--images", "good", "--images", "poor", "--label", "GPT-4o", "Janus-Pro-7B"]
    assert run(*line, "--rewards", "r.py:right", "--quality", "r.py:red", "--out", "out") == 0
    good, poor = scores(folder / "out").values()
    # counting: 3 of 4, colors: 2 of 2.
    assert good["r.py:right"]["groups"] == {"counting": 0.75, "colors": 1.0}
    assert good["r.py:right"]["mean"] == (0.75 + 1) / 2
    # Of two prompts at 1 and 1/2 all draws lie from 1/2 to 1.
    assert good["r.py:right"]["interval"] == [0.75, 1.0]
    assert poor["r.py:right"]["mean"] == 0.125
    reds = scores(folder / "out", "quality")
    assert reds["GPT-4o"]["r.py:red"]["mean"] == pytest.approx(70 / 6 / 255, rel=1e-12)
    assert reds["Janus-Pro-7B"]["r.py:red"]["mean"] == pytest.approx(10 / 6 / 255, rel=1e-12)
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split() == ["Model", "r.py:right", "r.py:red"]
    assert lines[1].startswith(" GPT-4o ") and "0.875 (0.750 to 1.000)" in lines[1]
    assert lines[2].startswith(" Janus-Pro-7B ") and "0.125 (0.000 to 0.250)" in lines[2]
    assert "Written to out: table.md, evaluation.json." in shown
    table = (folder / "out" / "table.md").read_text()
    assert table.startswith("| Model | r.py:right | r.py:red |")
    assert "| GPT-4o | 0.875 | 0.750 | 1.000 |" in table
    assert sorted(path.name for path in (folder / "out").iterdir()) == [
        *("evaluation.json", "table.md")
    ]


def test_the_quality_prompts_have_pictures_of_their_own(folder, capsys):
    lines = [{"prompt": "x", "image": "a.png"}, {"prompt": "y", "image": "b.webp"}]
    image_folders.picture(folder / "draw" / "a.png", 51)
    image_folders.picture(folder / "draw" / "b.webp", 102, (16, 24))
    (folder / "draw" / "x.jsonl").write_text("\n".join(map(json.dumps, lines)))
    words = ["--images", "good", "--quality-images", "draw/x.jsonl", "--rewards", "r.py:right"]
    assert run(*words, "--quality", "r.py:red", "--out", "out") == 0
    assert scores(folder / "out")["good"]["r.py:right"]["mean"] == 0.875
    assert scores(folder / "out", "quality")["good"]["r.py:red"]["mean"] == pytest.approx(0.3)
    note = "good: pictures of the quality prompts differ in size (1 of 8x8, 1 of 24x16)."
    assert note in capsys.readouterr().out
    assert note in (folder / "out" / "table.md").read_text()


def test_a_table_of_several_evaluations(folder, capsys):
    for name in ("good", "poor"):
        assert run("--images", name, "--rewards", "r.py:right", "--out", f"out-{name}") == 0
    assert run("--images", "good", "--quality", "r.py:red", "--out", "quality") == 0
    capsys.readouterr()
    assert run("--table", "out-good", "out-poor/evaluation.json", "--table", "quality") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["Model", "r.py:right", "r.py:red"]
    assert len(lines) == 3 and lines[1].startswith(" good ") and "–" not in lines[1]
    assert lines[2].startswith(" poor ") and lines[2].split()[-1] == "–"
    words = ["--table", "out-good", "out-poor", "--label", "A", "B", "--out", "all"]
    assert run(*words) == 0
    assert [row.label for row in systems.load(folder / "all")] == ["A", "B"]
    assert (folder / "all" / "table.md").is_file()


def test_pictures_that_cannot_be_read(folder, capsys):
    broken = folder / "good" / "00001" / "samples" / "0001.png"
    broken.write_text("I'm sorry, I can't draw that.")
    line = ["--images", "good", "--rewards", "r.py:right", "--out", "out"]
    told = refused(capsys, *line)
    assert "1 of 6 pictures in good cannot be read (00001/samples/0001.png: it is no pict" in told
    assert "--skip-unreadable" in told and not (folder / "out" / "evaluation.json").exists()
    assert run(*line, "--skip-unreadable") == 0
    shown = capsys.readouterr().out
    assert "good: left out 1 of 6 pictures (00001/samples/0001.png: it is no picture" in shown
    # counting: 3 of 3 that are left.
    assert scores(folder / "out")["good"]["r.py:right"]["mean"] == 1.0
    assert "good: 1 of 6 pictures of the task's prompts are left out" in shown
    [row] = systems.load(folder / "out")
    assert row.task.images == 5 and row.task.skipped[0].startswith("00001/samples/0001.png: it is")
    assert (row.task.source, row.task.sizes) == ("GenEval's layout", {"8x8": 5})


def test_a_picture_without_a_score_is_counted(folder, capsys):
    image_folders.picture(folder / "good" / "00000" / "samples" / "0000.png", 255)
    line = ["--images", "good", "--rewards", "r.py:dark", "--out", "out"]
    assert run(*line) == 0
    assert scores(folder / "out")["good"]["r.py:dark"]["failed"] == 1
    assert "r.py:dark gave no score to 1 of 6 pictures" in capsys.readouterr().out


def test_weights_that_cannot_be_loaded_are_named_before_a_picture_is_read(
    folder, capsys, monkeypatch
):
    monkeypatch.setattr("flowgrpo.evaluation.picture_sets.read", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    line = ["--images", "good", "--quality", "r.py:red", "pickscore", "--out", "out"]
    told = refused(capsys, *line, "--reward-options", "pickscore.model", "./absent")
    assert told.startswith("error: reward 'pickscore' cannot be loaded: the model ./absent cannot")
    assert not (folder / "out").exists()


def test_the_judges_of_the_paper_need_an_endpoint(folder, capsys, monkeypatch):
    """They are missed before the weights of the other three are loaded."""
    monkeypatch.setattr(models, "pretrained", None)
    told = refused(capsys, "--images", "good", "--quality", "paper")
    assert "the address of reward 'deqa' is ''" in told and "FLOWGRPO_REWARD_DEQA_URL" in told


def test_the_progress_of_long_work(folder, capsys, monkeypatch):
    """Outside a terminal a line at once here, every half minute otherwise."""
    monkeypatch.setattr(display, "QUIET", 0.0)
    line = ["--images", "good", "--rewards", "r.py:right", "--batch-size", "2", "--out", "out"]
    assert run(*line) == 0
    shown = capsys.readouterr().out
    assert "good: reading pictures  4/6 images  " in shown
    assert "good: scoring by r.py:right  4/6 images  " in shown


@pytest.mark.slow
def test_posters_are_read_by_the_real_ocr(tmp_path, capsys):
    """RapidOCR's own weights on renders of another system, as PNG, JPEG and WebP of two sizes."""
    pytest.importorskip("rapidocr")
    distance = pytest.importorskip("rapidfuzz.distance").Levenshtein.distance
    words, lines = ["OPEN", "Good Morning", "EXIT", "Voyage"], []
    for number, (text, kind) in enumerate(zip(words, ("png", "jpg", "webp", "png"), strict=True)):
        # The last poster shows another word than the prompt asks for.
        image = render("Monday" if number == 3 else text, "DejaVuSans-Bold", 64, ("white", "black"))
        name = f"{number}.{kind}"
        picture = to_pil(image if number else image[:, 64:-64])
        picture.save(tmp_path / name)
        lines.append({"prompt": f'a poster that says "{text}"', "file_name": name})
    (tmp_path / "posters.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = tmp_path / "out"
    assert run("--images", tmp_path / "posters.jsonl", "--rewards", "ocr", "--out", out) == 0
    score = scores(out)["posters"]["ocr"]
    wrong = max(0.0, 1 - distance("monday", "voyage") / 6)
    assert score["mean"] == pytest.approx((3 + wrong) / 4) and score["failed"] == 0
    assert capsys.readouterr().out.splitlines()[0].split() == ["Model", "OCR"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "no run, recipe or model was named, but one is required"),
        ("x --images good", "a target 'x' was given with --images, which loads no model"),
        ("--images good --steps 4", "--steps 4 was given with --images"),
        ("--images good --quality-prompts p.txt", "--quality-prompts 'p.txt' was given with"),
        ("--images good", "neither --rewards nor --quality was given"),
        ("--images good --label a b", "--label has 2 values for 1 of --images"),
        ("--images good poor --label a a", "two rows would be called 'a'"),
        ("--images good ./good", "two rows would be called 'good'"),
        ("--images good --quality papr", "--quality is 'papr', but paper or a reward"),
        ("--images good --rewards geneval_strct", "did you mean 'geneval_strict'"),
        ("--images good --rewards r.py:right --reward-options x.y 1", "'x.y'"),
        ("--images good --rewards r.py:right --batch-size 0", "--batch-size is 0"),
        ("--images good --rewards r.py:right --quality-images poor", "without --quality"),
        ("--quality-images good --quality paper", "without --images"),
        ("--images good --quality r.py:red --quality-images poor", "no reward scores the pictures"),
        ("--images good --rewards r.py:right --quality r.py:red --quality-images good poor",
         "--quality-images has 2 values for 1 of --images"),
        ("--images r.py --rewards r.py:right", "ends in .py, but a folder, or a file in .jsonl"),
        ("--images good --rewards ocr", "has no text in double quotes"),
        ("--images good --rewards geneval_strict", "no include"),
        ("--images good --rewards r.py:right --out r.py/x", "cannot be written"),
        ("--table good", "evaluation.json cannot be read (No such file"),
        ("--table good --rewards r.py:right", "--rewards ('r.py:right',) was given with --table"),
        ("nano --label a", "--label was given with the target 'nano'"),
        ("nano --skip-unreadable", "--skip-unreadable was given with the target 'nano'"),
        ("nano --quality-prompts p.txt", "--quality-prompts is 'p.txt' without --quality"),
    ],
)  # fmt: skip
def test_mistakes(folder, words, told, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "load_base", None)
    assert told in refused(capsys, *words.split())


def test_repeated_options_are_one():
    names = ("--images", "--label")
    for line in (
        "--images a --label x --images b --label=y --out o",
        "--images=a --images b --label x y --out o",
        "--images a b --label x --out o --label y",
    ):
        words = gather(line.split(), *names)
        text = " ".join(words)
        assert "--images a b" in text and "--label x y" in text and "--out o" in text
        assert words.count("--images") == words.count("--label") == 1
    # Another option's values and the target are left where they are.
    for line in ("run --rewards a b --prompts 3", "--images=a run", "--steps 3"):
        assert gather(line.split(), *names) == line.replace("=", " ").split()
