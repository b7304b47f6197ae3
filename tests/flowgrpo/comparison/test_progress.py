"""What the terminal shows of the runs while they train."""

from __future__ import annotations

import io
import json
import types

import pytest
from rich.console import Console

from flowgrpo.comparison import progress as showing
from flowgrpo.comparison.folder import Attempt, Folder
from flowgrpo.comparison.progress import Display
from flowgrpo.comparison.running import Progress
from support import comparisons

ATTEMPT = Attempt("A-seed0", 3, False, "error: no luck", 1, 2, "cpu", "6", "abc", "now", 5)


@pytest.fixture
def shown(tmp_path):
    """f(terminal) -> a display of four runs, the first of which is finished."""
    study, base = comparisons.study(), comparisons.recipe(tmp_path)
    runs = comparisons.plan(study, base, (0, 1), tmp_path / "out")
    comparisons.write_run(runs[0], [comparisons.evaluation(0, 0.0, [1] * 6)])
    with Folder.open(tmp_path / "out", study, comparisons.configs(study, base)) as folder:

        def make(terminal: bool) -> Display:
            console = Console(file=io.StringIO(), width=120, force_terminal=terminal)
            display = Display(console, runs, folder)
            display.runner = types.SimpleNamespace(active=[])
            return display

        yield make


def process_of(run, *lines):
    """A process whose metrics.jsonl has these lines."""
    run.folder.mkdir(exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run.folder / "metrics.jsonl").write_text(text)
    return types.SimpleNamespace(run=run, progress=Progress(run))


def train(iteration):
    seconds = {"rollout": 1.0, "reward": 0.25, "update": 0.25}
    return {"iteration": iteration, "kind": "train", "seconds": seconds}


def text_of(display) -> str:
    return display.console.file.getvalue()


def test_lines_where_there_is_no_terminal(shown, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(showing.time, "monotonic", lambda: clock[0])
    display = shown(terminal=False)
    runs = display.runs
    with display:
        process = process_of(runs[1], comparisons.evaluation(0, 0.0, [1, 0]), train(1))
        display.runner.active = [process]
        display.change("begun", process, None)
        assert "B-seed0 begins, goes on after 1 iterations: " in text_of(display)
        process_of(runs[1], comparisons.evaluation(0, 0.0, [1, 0]), train(1), train(2), EVALUATED)
        process.progress.update()
        clock[0] += 60
        display.tick()
        display.tick()
        # A quarter of a run in a minute, and 2.5 are left.
        line = (
            "B-seed0  iteration 2  held-out 0.750  16 images  3.0 s of training  about 10:00 left"
        )
        assert text_of(display).count(line) == 1
        display.runner.active = []
        display.change("failed", process, ATTEMPT)
        display.change("finished", process_of(runs[2], train(4)), None)
        display.change("stopped", process_of(runs[3]), None)
    text = text_of(display)
    assert "B-seed0 failed with exit code 3: error: no luck (" in text and "others go on" in text
    assert "A-seed1 finished (2/4): 0 images" in text and "B-seed1 stopped after 0" in text


EVALUATED = comparisons.evaluation(2, 3.0, [1, 1, 1, 0])


def test_a_bar_and_a_line_for_each_run_on_a_terminal(shown):
    display = shown(terminal=True)
    process = process_of(display.runs[1], train(1), train(2), EVALUATED)
    process.progress.update()
    with display:
        display.runner.active = [process]
        display.tick()
        console = Console(file=io.StringIO(), width=120)
        console.print(display._render())
        display.failed = 1
        console.print(display._render())
    text = console.file.getvalue()
    assert "1/4 finished  1 active" in text and "1 active  1 failed" in text
    words = text.splitlines()[1].split()
    assert words[:4] == ["B-seed0", "50", "%", "iteration"]
    assert words[4:] == ["2", "16", "images", "3", "s", "held-out", "0.750"]
