"""Cores and memory: of the machine, and of a container on it."""

from __future__ import annotations

import os
import subprocess

import pytest

from flowgrpo.comparison import machine


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """Write limits of a container: name -> text."""
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    return lambda **files: [
        (tmp_path / name.replace("_", ".", 1)).write_text(text) for name, text in files.items()
    ]


def test_a_container_s_quota_limits_the_cores(cgroup, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert machine.cores() == 16
    for text, count in (("max 100000", 16), ("250000 100000", 2), ("50000 100000", 1), ("?", 16)):
        cgroup(cpu_max=text)
        assert machine.cores() == count


@pytest.mark.skipif(not os.path.exists("/proc/meminfo"), reason="Linux's")
def test_a_container_s_limit_limits_the_memory(cgroup):
    free = machine.free_memory()
    assert free > 1 << 20
    cgroup(memory_max="max")
    assert machine.free_memory() == pytest.approx(free, rel=0.5)
    cgroup(memory_max="1000", memory_current="700", memory_stat="anon 500\ninactive_file 100\n")
    # Of 700 bytes 100 are files that can be read again.
    assert machine.free_memory() == 400
    cgroup(memory_current="2000")
    assert machine.free_memory() == 0


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="Linux's")
def test_the_memory_of_a_process():
    now, most = machine.process_memory(os.getpid())
    assert 10 << 20 < now <= most
    assert machine.process_memory(2**22 + 1) == (0, 0)


def test_gpus_by_the_names_that_the_user_gave(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert machine.gpus() == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, GPU-abc")
    assert machine.gpus() == ["3", "GPU-abc"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpus() == []


def test_names_of_cpu_and_gpu(monkeypatch):
    name, _ = machine.name_of(None)
    assert name.endswith(f"{machine.cores()} cores") and len(name) > len(", 2 cores")
    answer = subprocess.CompletedProcess([], 0, "NVIDIA H200, 580.65\n", "")
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: answer)
    assert machine.name_of("0") == ("NVIDIA H200", "580.65")

    def missing(*arguments, **options):
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", missing)
    assert machine.name_of("0") == ("GPU", "unknown")
    monkeypatch.setenv("FLOWGRPO_COMMIT", "abc")
    assert machine.commit() == "abc"
