"""The bar of an evaluation on a pseudo-terminal."""

from __future__ import annotations

import os
import re
import threading

import pytest
from rich.console import Console

from flowgrpo import train
from flowgrpo.cli import evaluate
from flowgrpo.cli import options as cli_options
from flowgrpo.runs import display
from support import processes


class Pseudo:
    """A pseudo-terminal of 100 columns with what has been written to it."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.file = os.fdopen(slave, "w")
        environment = {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "30"}
        self.console = Console(file=self.file, highlight=False, _environ=environment)
        self._bytes: list[bytes] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while piece := os.read(self._master, 4096):
                self._bytes.append(piece)
        # Linux: the other side was closed.
        except OSError:
            pass

    def text(self) -> str:
        """All that was written, with its control sequences; the terminal is gone then."""
        self.file.close()
        self._reader.join(20)
        os.close(self._master)
        return b"".join(self._bytes).decode()


def visible(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\r\n]", "", text).strip()


def test_on_a_terminal_a_bar_that_is_taken_down():
    terminal = Pseudo()
    mode = display.mode_of("auto", terminal.console)
    assert mode == "bar"
    with display.EvaluationProgress(
        terminal.console, mode, "base, CFG 4.5", 12, ["a", "b[red]"]
    ) as watch:
        for stage, images in (("sampling", 4), ("sampling", 12), ("scoring", 12)):
            watch(stage, images)
            watch._progress.refresh()
    text = terminal.text()
    assert re.search(r"base, CFG 4\.5 .*4/12 images  0:00 left", text)
    assert "base, CFG 4.5: scoring by a, b[red]" in text
    # The cursor is there again, the line is erased, and nothing was written since.
    assert "\x1b[?25h" in text and visible(text[text.rindex("\x1b[2K") :]) == ""


@pytest.mark.slow
def test_training_shows_the_bars_in_turn(tmp_path, monkeypatch):
    terminal = Pseudo()
    monkeypatch.setattr(display, "Terminal", lambda **options: terminal.console)
    changes = {"run.steps": 4, "run.eval_every": 2, "run.eval_guidance": 2.0}
    train.run(processes.make(tmp_path, **changes))
    text = terminal.text()
    order = ["0/6 images", "iteration 0  base: held", "base, CFG 2 ", "iteration 0  base, CFG 2:"]
    order += [
        "2/4",
        "iteration 2: scoring by support.processes:red",
        "iteration 2  trained: held",
    ]
    order += [
        "4/4",
        "iteration 4: scoring by support.processes:red",
        "iteration 4  trained: held",
    ]
    place = 0
    for words in order:
        assert words in text[place:], words
        place = text.index(words, place)
    assert "Written to" in visible(text[text.rindex("\x1b[?25h") :])


@pytest.mark.slow
def test_the_command_shows_it_and_stays_silent_where_the_run_did(tmp_path):
    config = processes.make(
        tmp_path, **{"run.steps": 1, "run.eval_every": 0, "run.progress": "auto"}
    )
    train.run(config)
    options = cli_options.EvaluateOptions(
        target=str(config.out_dir), out=str(tmp_path / "e"), device="cpu"
    )
    for progress, shown in (("auto", True), ("none", False)):
        path = config.out_dir / "config.json"
        text = path.read_text()
        path.write_text(re.sub(r'"progress": "\w+"', f'"progress": "{progress}"', text))
        assert f'"progress": "{progress}"' in path.read_text()
        terminal = Pseudo()
        evaluate.evaluate_run(options, terminal.console)
        text = terminal.text()
        for words in (
            "0/6 images",
            "base: scoring by support.processes:red",
            "iteration 1: scoring by",
        ):
            assert (words in text) == shown
        assert ("\x1b[2K" in text) == shown
        assert "Evaluating base: 6 images in 3 steps." in text
