"""Processes that torchrun starts again: their store has names of its own."""

from __future__ import annotations

from datetime import timedelta

import pytest
from torch import distributed

from flowgrpo.distributed import world

TORCHRUN = {
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "GROUP_WORLD_SIZE": "1",
    "MASTER_ADDR": "127.0.0.1",
}


def test_what_an_earlier_start_left_is_not_seen(monkeypatch):
    server = distributed.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=5))
    server.set("address", "of a process that is gone")
    for name, value in {**TORCHRUN, "MASTER_PORT": str(server.port)}.items():
        monkeypatch.setenv(name, value)
    store = world._store_of_restart(1, 5.0)
    assert not store.check(["address"])
    store.set("address", "new")
    assert server.get("address") == b"of a process that is gone"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "2")
    assert not world._store_of_restart(1, 5.0).check(["address"])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCHELASTIC_RESTART_COUNT", "0"),
        ("TORCHELASTIC_USE_AGENT_STORE", "False"),
        # Machines may count their restarts differently.
        ("GROUP_WORLD_SIZE", "2"),
    ],
)
def test_elsewhere_torch_makes_the_store(monkeypatch, name, value):
    for key, default in TORCHRUN.items():
        monkeypatch.setenv(key, default)
    monkeypatch.setenv(name, value)
    assert world._store_of_restart(1, 5.0) is None
