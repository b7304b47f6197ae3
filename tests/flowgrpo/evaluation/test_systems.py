"""Systems in one table: means and intervals by hand, files, merging, what makes rows differ."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from flowgrpo import rewards
from flowgrpo.config import ConfigError
from flowgrpo.evaluation import systems
from flowgrpo.evaluation.picture_sets import one_index_a_text
from flowgrpo.evaluation.systems import Measurement, Score, System
from flowgrpo.records import Prompts

NAN = math.nan


def prompts(*entries: tuple[str, dict]) -> Prompts:
    return one_index_a_text(Prompts.of(*zip(*entries, strict=True)))


def measure(values, entries: Prompts, **options) -> Score:
    return systems.measure({"r": torch.tensor(values).double()}, entries, **options)["r"]


def test_a_task_is_the_mean_over_sub_tasks():
    """counting 1/2 over four pictures, position 1 over one: 3/4, where all pictures have 3/5."""
    entries = prompts(
        *[(f"a{i}", {"tag": "counting"}) for i in range(4)], ("b", {"tag": "position"})
    )
    score = measure([1.0, 0.0, 0.0, 1.0, 1.0], entries, balanced=True)
    assert score.mean == 0.75
    assert score.groups == {"counting": 0.5, "position": 1.0} and score.failed == 0
    # Of four prompts at 0 or 1 a draw of no hits has 1/16 = 6 %, so the ends are among 0 ... 4
    # hits of four, beside position's 1.
    assert score.interval == (0.5, 1.0)


def test_quality_is_the_mean_over_pictures_with_categories_beside_it():
    entries = prompts(
        *[(f"a{i}", {"category": "Colors"}) for i in range(3)],
        ("b", {"tag": "Text", "category": "other"}),
        ("c", {}),
    )
    score = measure([1.0, 2.0, 3.0, 7.0, 2.0], entries, balanced=False)
    assert score.mean == 3.0
    assert score.groups == {"Colors": 2.0, "Text": 7.0, "": 2.0}


def test_a_task_has_no_categories():
    entries = prompts(("a", {"category": "x"}), ("b", {"category": "y"}), ("c", {"category": "y"}))
    score = measure([0.0, 3.0, 6.0], entries, balanced=True)
    assert score.mean == 3.0 and score.groups == {}


def test_pictures_of_one_text_are_one_prompt():
    """Two prompts of two pictures: draws of two prompts give 0, 1/2 or 1, at 1/4, 1/2, 1/4."""
    apart = prompts(*[(text, {}) for text in ("a", "a", "b", "b")])
    assert apart.indices.tolist() == [0, 0, 1, 1]
    assert measure([0.0, 0.0, 1.0, 1.0], apart, balanced=True).interval == (0.0, 1.0)
    # Inside one prompt nothing is drawn.
    same = measure([0.0, 0.0, 1.0, 1.0], prompts(*[("a", {})] * 4), balanced=True)
    assert same.mean == 0.5 and same.interval == (0.5, 0.5)


def test_an_interval_agrees_with_theory():
    generator = np.random.default_rng(0)
    values = (generator.random(400) < 0.3).astype(float)
    entries = prompts(*[(str(i), {}) for i in range(400)])
    low, high = measure(values.tolist(), entries, balanced=False).interval
    width = 2 * 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 400)
    assert high - low == pytest.approx(width, rel=0.1) and low < values.mean() < high


def test_pictures_without_a_score_are_left_out_and_counted():
    entries = prompts(*[(str(i), {"tag": "a"}) for i in range(3)], ("3", {"tag": "b"}))
    score = measure([1.0, NAN, 0.0, NAN], entries, balanced=True)
    assert (score.mean, score.groups, score.failed) == (0.5, {"a": 0.5}, 2)
    assert score.interval == (0.0, 1.0)


def system(label: str, task: dict | None = None, quality: dict | None = None, **more) -> System:
    """A row with these means; intervals reach 0.1 to both sides."""

    def measurement(means: dict[str, float], kind: str) -> Measurement:
        scores = {
            name: Score(mean, (mean - 0.1, mean + 0.1), {"x_y": mean, "z": NAN})
            for name, mean in means.items()
        }
        return Measurement(kind, systems.fingerprint([kind]), 3, 6, scores, **more)

    return System(
        label,
        None if task is None else measurement(task, "prompts of the task"),
        None if quality is None else measurement(quality, "drawbench"),
    )


FIVE = {
    "unifiedreward": 0.6,
    "pickscore": 0.85,
    "imagereward": -0.25,
    "deqa": 0.8,
    "aesthetic": 5.5,
}


def header(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[0].strip("|").split("|")]


def test_the_table_has_the_papers_form():
    """Its columns in its order, each on the scale of its model; the models' order is another."""
    text = systems.markdown([system("SD3.5-M", {"geneval_strict": 0.5}, FIVE)])
    assert header(text) == [
        *("Model", "GenEval", "Aesthetic", "DeQA", "ImgRwd", "PickScore", "UniRwd")
    ]
    assert text.splitlines()[2] == (
        "| SD3.5-M | 0.500 (0.400 to 0.600) | 5.50 (5.40 to 5.60) | 4.00 (3.50 to 4.50) "
        "| -0.25 (-0.35 to -0.15) | 22.10 (19.50 to 24.70) | 3.00 (2.50 to 3.50) |"
    )
    assert "## GenEval by task\n\n| Model | overall | x y | z |" in text
    assert "| SD3.5-M | 0.500 | 0.500 | – |" in text
    assert "## Quality by category" in text and "| SD3.5-M | x y | 5.50 | 4.00 |" in text


def test_columns_of_several_tasks():
    rows = [
        system("a", {"geneval_strict": 0.5, "geneval": 0.7}, {"my.py:f": 1.0, "pickscore": 0.8}),
        system("b", {"pickscore": 0.8}),
        system("c", None, {"aesthetic": 5.0}),
    ]
    text = systems.markdown(rows)
    assert header(text) == [
        *("Model", "GenEval", "PickScore (task)", "Aesthetic", "PickScore", "my.py:f", "geneval")
    ]
    cells = [line.strip("|").split(" | ") for line in text.splitlines()[2:5]]
    assert [cell.split()[0] for cell in cells[1]] == ["b", "–", "20.80", "–", "–", "–", "–"]
    assert [cell.split()[0] for cell in cells[2]] == ["c", "–", "–", "5.00", "–", "–", "–"]


def test_the_terminal_shows_the_same_cells():
    rows = [system("[bold]a[/bold]", {"ocr": 0.5}, {"deqa": 0.8})]
    console = Console(record=True, width=30, file=open("/dev/null", "w"))  # noqa: SIM115
    systems.show(rows, console)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["Model", "OCR", "DeQA"]
    # A label is no markup, and nothing is cut off where the terminal is narrow.
    assert lines[1].split("  ")[0].strip() == "[bold]a[/bold]"
    assert "0.500 (0.400 to 0.600)" in lines[1] and "4.00 (3.50 to 4.50)" in lines[1]


def test_a_label_stays_in_its_cell():
    text = systems.markdown([system("a|b\nc", {"ocr": 0.5})])
    assert text.splitlines()[2].startswith("| a\\|b c | 0.500")


def test_files_hold_what_was_measured(tmp_path):
    rows = [
        system("a", {"ocr": 0.5}, FIVE, source="40 steps", skipped=("x: y",)),
        system("b", {"ocr": NAN}),
    ]
    systems.write(tmp_path, rows, {"flowgrpo": "1"})
    values = json.loads((tmp_path / "evaluation.json").read_text())
    assert values["systems"][0]["task"]["scores"]["ocr"]["mean"] == 0.5
    assert values["systems"][1]["quality"] is None and values["versions"] == {"flowgrpo": "1"}
    for path in (tmp_path, tmp_path / "evaluation.json"):
        assert repr(systems.load(path)) == repr(rows)
    assert (tmp_path / "table.md").read_text() == systems.markdown(rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "table.md"]


def edited(path: Path, change) -> Path:
    systems.write(path.parent, [system("a", {"ocr": 0.5})], {})
    values = json.loads((path.parent / "evaluation.json").read_text())
    change(values)
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format=2),
        lambda v: v.pop("systems"),
        lambda v: v.update(systems=[3]),
        lambda v: v["systems"][0].update(label=3),
        lambda v: v["systems"][0]["task"].update(scores={}),
        lambda v: v["systems"][0]["task"].update(sizes=3),
        lambda v: v["systems"][0]["task"].update(more=3),
        lambda v: v["systems"][0]["task"]["scores"]["ocr"].update(interval=[1]),
        lambda v: v["systems"][0]["task"]["scores"]["ocr"].update(mean="high"),
    ],
)
def test_files_of_something_else(tmp_path, change):
    path = edited(tmp_path / "other.json", change)
    with pytest.raises(ConfigError, match=r"other\.json holds something else \(") as error:
        systems.load(path)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ConfigError, match=r"evaluation\.json cannot be read \(No such file"):
        systems.load(tmp_path)
    (tmp_path / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="JSONDecodeError"):
        systems.load(tmp_path)


def test_rows_of_one_label_are_put_together():
    task, quality = system("a", {"ocr": 0.5}), system("a", None, FIVE)
    merged = systems.merge([task, system("b", {"ocr": 0.6}), quality, task])
    assert [row.label for row in merged] == ["a", "b"]
    assert merged[0].task == task.task and merged[0].quality == quality.quality
    other = system("a", {"ocr": 0.4})
    with pytest.raises(ConfigError, match="two rows are called 'a' and differ in their task"):
        systems.merge([task, other])
    renamed = systems.relabel([task, other], ["a", "c"])
    assert [row.label for row in systems.merge(renamed)] == ["a", "c"]
    with pytest.raises(ConfigError, match=r"--label has 1 names for 2 rows \(a, a\)"):
        systems.relabel([task, other], ["x"])


def test_notes_say_what_makes_rows_differ():
    first, second = system("a", {"ocr": 0.5}, FIVE), system("b", {"ocr": 0.5}, FIVE)
    assert systems.notes([first, second]) == []

    def but(**changes) -> System:
        return replace(second, task=replace(second.task, **changes))

    def note(*rows: System) -> str:
        [line] = systems.notes(rows)
        return line

    text = note(first, but(fingerprint="x", prompt_set="p.txt", prompts=7))
    assert text == (
        "The rows differ in the task's prompts: a has 3 of prompts of the task, b has 7 of p.txt."
    )
    # Another task has other prompts.
    pickscore = {"pickscore": second.task.scores["ocr"]}
    assert systems.notes([first, but(fingerprint="x", scores=pickscore)]) == []
    models = [{"ocr": {"engine": name}} for name in ("rapidocr", "paddleocr")]
    first_read = replace(first, task=replace(first.task, settings=models[0]))
    assert note(first_read, but(settings=models[1])) == (
        "The rows differ in ocr.engine: a: rapidocr, b: paddleocr."
    )
    assert note(but(skipped=("x: y",) * 2)) == (
        "b: 2 of 8 pictures of the task's prompts are left out, as they are missing or cannot be "
        "read."
    )
    assert note(but(sizes={"8x8": 4, "8x16": 2})) == (
        "b: pictures of the task's prompts differ in size (4 of 8x8, 2 of 8x16)."
    )
    small = replace(first, task=replace(first.task, sizes={"8x8": 6}))
    assert note(small, but(sizes={"16x8": 6})) == (
        "The rows differ in the size of the pictures of the task's prompts: a has 8x8, b has 16x8."
    )
    assert systems.notes([small, but(sizes={"8x8": 3})]) == []
    failed = {"ocr": replace(second.task.scores["ocr"], failed=1)}
    assert note(but(scores=failed)) == (
        "b: ocr gave no score to 1 of 6 pictures of the task's prompts, which are left out of its "
        "mean."
    )


def test_quality_rewards_by_preset_and_name():
    five = ("aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward")
    assert systems.quality_rewards(["paper"]) == five == systems.PRESETS["paper"]
    assert systems.quality_rewards(["my.py:f", "pickscore", "paper"]) == (
        *("my.py:f", "pickscore", "aesthetic", "deqa", "imagereward", "unifiedreward"),
    )
    assert systems.quality_rewards([]) == ()
    for name, words in (("papr", "did you mean 'paper'"), ("pickscor", "did you mean 'pickscore'")):
        with pytest.raises(ConfigError, match=f"--quality is '{name}', but paper or a.*{words}"):
            systems.quality_rewards([name])


def test_settings_are_what_decides_a_score():
    options = {"deqa": {"url": "http://x", "token": "secret", "model": "m"}}
    scorer = rewards.Scorer({"deqa": 1.0, "support.processes:red": 1.0}, options=options)
    assert systems.settings_of(scorer) == {"deqa": {"model": "m"}, "support.processes:red": {}}


def test_the_fingerprint_is_of_the_different_texts():
    one = systems.fingerprint(["a", "b", "a"])
    assert one == systems.fingerprint(["b", "a"]) != systems.fingerprint(["a"])
    assert re.fullmatch(r"[0-9a-f]{16}", one)
