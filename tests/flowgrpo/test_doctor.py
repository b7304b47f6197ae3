"""The doctor reports what is there, and why something is not."""

from __future__ import annotations

import io
import os

import pytest
import torch
from rich.console import Console

from flowgrpo import doctor


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


def test_doctor_names_an_absent_package(monkeypatch):
    monkeypatch.setitem(doctor.OPTIONAL, "no_such_package", "test; pip install flowgrpo[x]")
    console = Console(file=io.StringIO(), width=200)
    doctor.doctor(console)
    assert "absent: no test; pip install flowgrpo[x]" in console.file.getvalue()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_doctor_says_why_there_is_no_gpu():
    assert "runs use the CPU" in doctor.gpus()["none"]


@pytest.mark.gpu
def test_doctor_names_the_gpu():
    assert torch.cuda.get_device_name(0) in doctor.gpus()["0"]
    assert "cuda" in doctor.devices() and "bfloat16" in doctor.bfloat16("cuda")
