"""What a reward's code sets for the whole process is put back, and said once."""

from __future__ import annotations

import os
import sys
import threading

import numpy as np
import pytest
import torch

from flowgrpo.config import isolation
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer, load

PROMPTS = Prompts.of(["a", "b"])
IMAGES = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
VANDAL = """
import os, numpy, torch
def change(*_):
    os.chdir(os.path.dirname(__file__))
    torch.set_grad_enabled(False)
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.benchmark = True
    torch.use_deterministic_algorithms(True)
    numpy.seterr(all="raise")
    return [0.0] * 4
"""


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(isolation, "_reported", set())
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [n for n in sys.modules if n.startswith("users_vandal")]:
        del sys.modules[name]


def settings() -> dict:
    return {name: read() for name, (read, _) in isolation.SETTINGS.items()}


@pytest.mark.parametrize("at", ["import", "call"])
def test_settings_of_the_process_are_put_back(tmp_path, caplog, at):
    before = settings()
    (tmp_path / "users_vandal.py").write_text(VANDAL + ("change()\n" if at == "import" else ""))
    name = f"{tmp_path}/users_vandal.py:change"
    load(name)
    scorer = Scorer({name: 1.0})
    for _ in range(2):
        assert scorer(IMAGES, PROMPTS, 2).total.tolist() == [0.0] * 4
    assert settings() == before
    # A tensor without a word on its device and dtype is as ever, and no mode is left in the way.
    value = torch.ones(2, requires_grad=True).sum()
    assert (value.device.type, value.dtype, value.requires_grad) == ("cpu", torch.float32, True)
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == len(before), "once for each setting"
    assert f"changed the working directory from {os.getcwd()} to {tmp_path}" in " ".join(messages)


def test_a_reward_that_changes_nothing_is_quiet(tmp_path, caplog):
    (tmp_path / "users_vandal_not.py").write_text("def score(i, p, m): return [0.0] * len(i)\n")
    Scorer({f"{tmp_path}/users_vandal_not.py:score": 1.0})(IMAGES, PROMPTS, 2)
    assert not caplog.records


def test_settings_are_put_back_after_an_error():
    with pytest.raises(ZeroDivisionError), isolation.isolated("r"):
        np.seterr(divide="raise")
        torch.set_grad_enabled(False)
        raise ZeroDivisionError
    assert torch.is_grad_enabled() and np.geterr()["divide"] == "warn"


def test_an_interrupt_of_a_rewards_own_in_a_thread_is_its_error(monkeypatch):
    """Ctrl-C reaches the main thread; there it aborts as ever."""
    module = type(sys)("users_interrupt")

    def interrupt(images, prompts, metadata):
        raise KeyboardInterrupt

    module.score = interrupt
    monkeypatch.setitem(sys.modules, "users_interrupt", module)
    scorer, errors = Scorer({"users_interrupt:score": 1.0}), []

    def work():
        try:
            scorer(IMAGES, PROMPTS, 2)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(errors[0], RewardError) and "KeyboardInterrupt" in str(errors[0])
    with pytest.raises(KeyboardInterrupt):
        scorer(IMAGES, PROMPTS, 2)
