"""What the terminal shows."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from flowgrpo.config import Config, replace
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.evaluation.table import comparison
from flowgrpo.runs.display import Display, clock


def display(width: int = 100, terminal: bool = False, **fields) -> Display:
    """Names without a section are those of `run`."""
    changes = {n if "." in n else f"run.{n}": value for n, value in fields.items()}
    config = replace(Config(recipe="r"), **changes)
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, highlight=False)
    return Display(config, console)


def text(shown: Display) -> str:
    return shown.console.file.getvalue()


def report(accuracy: float, **changes) -> Evaluation:
    values = {
        "accuracy": accuracy,
        "interval": (accuracy - 0.1, accuracy + 0.1),
        "tasks": {"two_object": accuracy / 2},
        "scores": {"strict": accuracy, "partial": 0.875},
        "quality": {"palette": 0.03},
        "prompts": 2,
        "images": 4,
        "steps": 40,
        "guidance_scale": 1.0,
        "seconds": 10.0,
        "per_image": torch.zeros(4),
        "shown": torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
    }
    return Evaluation(**{**values, **changes})


METRICS = {
    "reward": 0.5,
    "accuracy": 0.25,
    "kl": 1e-3,
    "clip_fraction": 0.1,
    "max_ratio_error": 0.0,
}


def test_the_table_is_whole_on_a_narrow_terminal():
    long = {"scores": {"a.long.module:function": 0.2, "another_long_name": 0.375}}
    narrow, wide = display(width=50), display(width=200)
    for shown in (narrow, wide):
        shown.table({"base": report(0.2, **long), "iteration 170": report(0.7, **long)}, {})
    lines = [line.split() for line in text(narrow).splitlines()]
    assert ["accuracy,", "%", "20.0", "70.0", "+50.0"] in lines
    assert ["95", "%", "interval", "10.0", "to", "30.0", "60.0", "to", "80.0"] in lines
    assert lines == [line.split() for line in text(wide).splitlines()]


@pytest.mark.parametrize(("steps", "lines"), [(5, 5), (40, 40), (1000, 41), (4321, 42)])
def test_plain_progress_is_about_forty_lines(steps, lines):
    shown = display(steps=steps, eval_every=0)
    for done in range(1, steps + 1):
        shown.iteration(done, METRICS, 0.5)
    found = [line for line in text(shown).splitlines() if line.startswith("iteration ")]
    assert len(found) == lines
    assert found[0].startswith(f"iteration 1/{steps}  reward 0.500  accuracy 0.250  KL 1.00e-03")
    assert "clipped 0.10  ratio error 0.0e+00  192 images/s" in found[0]
    assert found[-1].startswith(f"iteration {steps}/{steps}") and found[-1].endswith("0:00 left")


def test_expected_time_is_told_once_and_counts_evaluations():
    shown = display(steps=100, eval_every=25)
    shown.evaluation(0, "base", report(0.5, seconds=20.0))
    for done, seconds in enumerate((30.0, 1.0, 1.0, 1.0), start=1):
        shown.iteration(done, METRICS, seconds)
    # 97 iterations of a second after a slow first one, and 4 evaluations of 20 seconds.
    assert text(shown).count("Expected time to the end: 2:57.") == 1
    assert shown.seconds_left(99) == 1 + 20
    assert shown.seconds_left(100) == 0


def test_without_progress_nothing_is_shown():
    shown = display(steps=10, progress="none")
    shown.banner({"a": "b"})
    shown.iteration(1, METRICS, 1.0)
    shown.evaluation(0, "base", report(0.5))
    shown.table({"base": report(0.5)}, {})
    assert text(shown) == ""


def test_the_bar_shows_the_figures_and_is_taken_down():
    shown = display(terminal=True, steps=10, progress="bar")
    for done in (1, 2, 3):
        shown.iteration(done, METRICS, 1.0)
        shown._live.refresh()
    assert "3/10" in text(shown) and "KL 1.00e-03" in text(shown)
    assert text(shown).count("iteration") == 0
    shown.pause()
    assert shown._live is None
    shown.pause()


@pytest.mark.parametrize(
    ("empty", "said"),
    [
        ([8] * 9 + [7] + [8] * 9, []),
        ([8] * 9 + [7] + [8] * 10, [20]),
        ([0] + [8] * 30 + [7] + [8] * 30, [11]),
    ],
)
def test_one_group_that_differs_is_enough(empty, said):
    """Of eight; groups that a reward failed for tell nothing either."""
    shown, found = display(steps=100), []
    assert shown.config.sample.prompts_per_iteration == 8
    for done, count in enumerate(empty, start=1):
        dropped = min(done % 2, count)
        groups = {"equal_groups": count - dropped, "dropped_groups": dropped}
        shown.iteration(done, {**METRICS, **groups}, 1.0)
        found += [done] * (text(shown).count("Nothing to learn from") - len(found))
    assert found == said


@pytest.mark.parametrize(("objective", "said"), [("nft", 1), ("opd", 0), ("refl", 0)])
def test_objectives_that_compare_no_rewards(objective, said):
    shown = display(steps=100, **{"optim.objective": objective})
    for done in range(1, 30):
        shown.iteration(done, {**METRICS, "equal_groups": 8}, 1.0)
    assert text(shown).count("Nothing to learn from") == said


def test_auto_is_a_bar_only_on_a_terminal():
    assert display().mode == "plain" and display(terminal=True).mode == "bar"


def test_brackets_in_names_are_shown_as_they_are():
    shown = display()
    shown.banner({"model": "a/[bold]b"})
    shown.note("[red] prompts")
    assert "a/[bold]b" in text(shown) and "[red] prompts" in text(shown)


def test_comparison_shows_change_and_marks_what_is_beyond_tolerance():
    reports = {"base": report(0.5), "after": report(0.75, quality={"palette": 0.05})}
    for allowed, red in ((0.01, True), (0.03, False)):
        console = Console(file=io.StringIO(), width=90, force_terminal=True)
        console.print(comparison(reports, {"palette": allowed}))
        shown = console.file.getvalue()
        assert ("\x1b[31m" in shown) == red
    plain = Console(file=io.StringIO(), width=90)
    plain.print(comparison(reports, {}))
    rows = [line.split() for line in _lines(plain)]
    assert ["accuracy,", "%", "50.0", "75.0", "+25.0"] in rows
    assert ["two", "object", "25.0", "37.5", "+12.5"] in rows
    assert ["partial", "0.875", "0.875", "+0.000"] in rows
    assert ["quality:", "palette", "0.030", "0.050", "+0.020"] in rows


def test_a_reward_beyond_one_keeps_its_name_and_unit():
    scores = {"shop:price": 21.5}
    one = report(21.5, scores=scores, per_image=torch.tensor([21.0, 22.0]), tasks={})
    console = Console(file=io.StringIO(), width=90)
    console.print(comparison({"base": one}, {}))
    assert ["shop:price", "21.500"] in [line.split() for line in _lines(console)]
    shown = display()
    shown.evaluation(0, "base", one)
    assert "held-out shop:price 21.500 (21.400 to 21.600)" in text(shown)


def _lines(console: Console) -> list[str]:
    return [line for line in console.file.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (3599, "59:59"), (3725, "1:02:05")]
)
def test_clock(seconds, shown):
    assert clock(seconds) == shown
