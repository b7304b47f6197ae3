"""The doctor reports what is there, and why something is not."""

from __future__ import annotations

import contextlib
import io
import os
import socket

import pytest
import torch
from rich.console import Console

from flowgrpo.cli import doctor
from support.servers import FaultyServer


@pytest.mark.slow
def test_doctor_prints_what_it_found():
    console = Console(file=io.StringIO(), width=200)
    found = doctor.doctor(console)
    shown = console.file.getvalue()
    assert found["versions"]["torch"] == torch.__version__ and torch.__version__ in shown
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert 1 <= found["cpu"]["cores"] <= (os.cpu_count() or 1)
    assert "reference" in shown and "policy.dtype auto takes" in found["bfloat16"]["cpu"]
    for section, values in found.items():
        assert section in shown
        for name, value in values.items():
            assert name in shown and str(value).splitlines()[0][:60] in shown


@pytest.mark.slow
def test_doctor_names_an_absent_package(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_package", "test; pip install flowgrpo[x]")
    console = Console(file=io.StringIO(), width=200)
    doctor.doctor(console)
    assert "absent: no test; pip install flowgrpo[x]" in console.file.getvalue()


def test_doctor_says_which_rewards_can_run(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    found = doctor.reward_states()
    assert found["nano_strict"] == found["jpeg_compressibility"] == "can run"
    assert found["pickscore"].startswith("can run after a download of yuvalkirstain/PickScore_v1,")
    assert "FLOWGRPO_REWARD_HTTP_URL" in found["http"]
    (tmp_path / "models--RE-N-Y--ImageReward" / "snapshots" / "1").mkdir(parents=True)
    (tmp_path / "tokens").mkdir()
    monkeypatch.setenv("FLOWGRPO_REWARD_IMAGEREWARD_TOKENIZER", str(tmp_path / "tokens"))
    assert doctor.reward_states()["imagereward"] == "can run"
    monkeypatch.setitem(doctor.LIBRARIES, "ocr", ("no_such_library",))
    assert doctor.reward_states()["ocr"].startswith("off: no no_such_library; pip install")


def test_doctor_asks_the_server_of_a_remote_reward(monkeypatch):
    pytest.importorskip("httpx")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("FLOWGRPO_REWARD_HTTP_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr("flowgrpo.rewards.remote.http.score._reward", None)
    assert "no server of reward 'http' can be reached" in doctor.reward_states()["http"]
    with contextlib.closing(FaultyServer("geneval")) as server:
        absent = f"http://127.0.0.1:{port}"
        monkeypatch.setenv("FLOWGRPO_REWARD_HTTP_URL", f"{absent},{server.url}")
        monkeypatch.setattr("flowgrpo.rewards.remote.http.score._reward", None)
        state = doctor.reward_states()["http"]
        serves = (
            f"can run: 1 of 2 serve: {server.url}/score (geneval); {absent}/score gave no answer"
        )
        assert state.startswith(serves)


@pytest.mark.slow
def test_doctor_holds_recipes_against_the_gpu():
    small, large = doctor.recipe_states(16.0), doctor.recipe_states(141.0)
    more = "more than there is"
    assert more in small["flux_pickscore"] and not any(more in text for text in large.values())
    assert large["GPU"] == "141 GiB" and len(large) > 10
    assert large["sd35m_geneval_1gpu"].endswith("12 images a forward")
    assert "GiB, 1 image a forward" in small["flux_pickscore"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_why_there_is_no_gpu():
    assert "runs use the CPU" in doctor.gpus()["none"]


@pytest.mark.gpu
def test_doctor_names_the_gpu():
    assert torch.cuda.get_device_name(0) in doctor.gpus()["0"]
    assert "cuda" in doctor.devices() and "bfloat16" in doctor.bfloat16("cuda")
