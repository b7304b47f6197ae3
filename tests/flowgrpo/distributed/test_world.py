"""What processes tell each other, and how all end when one fails."""

from __future__ import annotations

import logging
import os
import signal
import time

import pytest
import torch

from flowgrpo.config import ConfigError
from flowgrpo.distributed import world
from flowgrpo.distributed.world import ALONE
from flowgrpo.rewards import RewardError
from support.ranks import Ranks

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LIMIT = 2.0
"""Seconds that ranks wait for one that does not come."""
GOOD = dict(zip(NAMES, ("0", "2", "0", "2", "127.0.0.1", "1"), strict=True))


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in (*NAMES, "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch, **changes):
    for name, value in {**GOOD, **changes}.items():
        if value is not None:
            monkeypatch.setenv(name, value)


def test_one_process_is_alone():
    assert world.join() is ALONE and world.is_first() and world.local_rank() == 0
    with ALONE.together():
        assert ALONE.gather(3) == [3] and ALONE.from_first(lambda: 4) == 4
    rows = torch.arange(3)
    assert ALONE.collect_rows(rows)[0].tolist() == ALONE.all_rows(rows)[0].tolist() == [0, 1, 2]
    ALONE.check_same("it", {"a": 1}, "no")
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": None}, "no MASTER_PORT"),
        ({"LOCAL_RANK": None, "MASTER_ADDR": None}, "no LOCAL_RANK, MASTER_ADDR"),
        ({"RANK": None}, "no RANK"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"RANK": "one"}, "RANK is 'one'"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1'"),
    ],
)
def test_an_environment_that_does_not_fit(monkeypatch, changes, words):
    launched(monkeypatch, **{"LOCAL_RANK": "1", **changes})
    with pytest.raises(ConfigError, match=words) as caught:
        world.join()
    # Other processes need not have it, so this one says it.
    assert not world.is_said_elsewhere(caught.value)


def test_fewer_gpus_than_processes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    launched(monkeypatch)
    with pytest.raises(
        ConfigError, match=r"at least 2 processes .* torch sees 1 CUDA device there"
    ):
        world.join()
    # Where the launcher does not say how many there are, only some of them know.
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    launched(monkeypatch, LOCAL_RANK="3", LOCAL_WORLD_SIZE=None)
    with pytest.raises(ConfigError, match="at least 4 processes") as caught:
        world.join()
    assert not world.is_said_elsewhere(caught.value)


def test_tasks_of_srun_that_no_launcher_started(monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    assert world.join() is ALONE
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(ConfigError, match=r"srun started 8 tasks .* torchrun"):
        world.join()


def test_errors_travel_in_their_class_if_it_is_ours():
    packed = world._packed(RewardError("it broke"))
    error = world._unpacked(3, packed)
    assert type(error) is RewardError and str(error) == "rank 3: it broke"
    assert world.is_told(error)
    error = world._unpacked(0, world._packed(KeyError("x")))
    assert type(error) is world.PeerError and str(error) == "rank 0: KeyError: 'x'"

    class Local(ConfigError):
        pass

    assert type(world._unpacked(0, world._packed(Local("y")))) is world.PeerError


# Bodies of processes.


def talk(rank_timeout):
    """Everything that goes well, on ranks with different numbers of rows."""
    here = world.join(rank_timeout)
    assert world.join() is here and here.joined
    assert here.gather(here.rank * 2) == [0, 2, 4]
    assert here.from_first(lambda: f"from {here.rank}") == "from 0"
    assert here.any(here.rank == 2) and not here.any(False)
    rows = torch.full((here.rank, 2), float(here.rank))
    for parts in (here.collect_rows(rows), here.all_rows(rows)):
        if parts is not None:
            assert [len(part) for part in parts] == [0, 1, 2]
            assert torch.cat(parts).tolist() == [[1.0] * 2, [2.0] * 2, [2.0] * 2]
    assert (here.collect_rows(rows) is None) == (here.rank > 0)
    here.check_same("it", {"a": 1, "b": (2, 3)}, "no")


def fail(here):
    """Each kind of failure once; afterwards all ranks are still together."""
    # An error of this package, of rank 1 alone.
    with pytest.raises(RewardError) as caught, here.together():
        if here.rank == 1:
            raise RewardError("the server is gone")
    assert str(caught.value) == ("" if here.rank == 1 else "rank 1: ") + "the server is gone"
    assert world.is_said_elsewhere(caught.value) == (here.rank != 0)
    # Any other.
    kind = KeyError if here.rank == 2 else world.PeerError
    with pytest.raises(kind, match="x") as caught, here.together():
        if here.rank == 2:
            raise KeyError("x")
    # Of two ranks; each has its own.
    with pytest.raises(ConfigError) as caught, here.together():
        if here.rank != 1:
            raise ConfigError(f"of {here.rank}")
    assert str(caught.value) == ("rank 0: of 0" if here.rank == 1 else f"of {here.rank}")
    # Inside of an inner block, and where the others wait for something else.
    for place in ("inner", "gather", "from_first"):
        with pytest.raises(ConfigError, match="early"), here.together():
            if here.rank == 0:
                raise ConfigError("early")
            if place == "inner":
                with here.together():
                    pass
            elif place == "gather":
                here.gather(1)
            else:
                here.from_first(lambda: 1)
    with pytest.raises(ConfigError, match="no call"):
        here.from_first(lambda: refuse(here))
    with pytest.raises(ConfigError) as caught:
        here.check_same("the thing", {"a": 1, "b": min(here.rank, 1)}, "mend it")
    words = "the thing is not the same in all 3 processes: b is 0 in rank 0 and 1 in rank 1"
    assert str(caught.value).startswith(words) and str(caught.value).endswith("; mend it.")
    with pytest.raises(ConfigError, match="c is None in rank 0 and 1 in rank 2"):
        here.check_same("the thing", {"a": 1, **({"c": 1} if here.rank == 2 else {})}, "mend it")
    assert here.gather(here.rank) == [0, 1, 2]


def refuse(here):
    assert here.rank == 0
    raise ConfigError("no call")


def warn(here):
    """Warnings: rank 0 has them all, the others their own, which are named."""
    log = logging.getLogger("flowgrpo")
    # Those that pytest has installed take the records elsewhere.
    log.addHandler(logging.StreamHandler())
    log.propagate = False
    log.warning("of all")
    log.warning("of %s alone", "one", extra=world.SPECIFIC)


def everything(rank_timeout):
    talk(rank_timeout)
    fail(world.join())
    warn(world.join())


def vanish(how, rank_timeout):
    """Rank 1 goes, or does not come; the others say so."""
    here = world.join(rank_timeout)
    here.gather(0)
    start = time.monotonic()
    if here.rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "interrupted":
            with here.together():
                raise KeyboardInterrupt
        # By then the others have said so.
        time.sleep(2 * rank_timeout)
        os._exit(3)
    with pytest.raises(world.PeerError) as caught:
        here.gather(1)
    print(f"{time.monotonic() - start:.1f}: {caught.value}")
    # Nobody is told of it again.
    with pytest.raises(world.PeerError) as again, here.together():
        raise caught.value
    assert again.value is caught.value


def rendezvous(rank_timeout):
    start = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        world.join(rank_timeout)
    print(f"{time.monotonic() - start:.1f}: {caught.value}")


@pytest.mark.slow
def test_three_ranks_talk_and_fail_together(tmp_path):
    with Ranks(tmp_path, 3, everything, 60.0) as ranks:
        outputs = ranks.wait()
    assert outputs[0].splitlines() == ["of all", "of one alone"]
    assert outputs[1:] == [f"rank {rank}: of one alone\n" for rank in (1, 2)]


@pytest.mark.slow
def test_a_rank_that_goes_or_does_not_come_is_named(tmp_path):
    hows = ("killed", "interrupted", "late")
    everyone = {how: Ranks(tmp_path / how, 3, vanish, how, LIMIT) for how in hows}
    missing = {
        rank: Ranks(tmp_path / f"only-{rank}", 2, rendezvous, LIMIT, start=[rank])
        for rank in (0, 1)
    }
    for how, ranks in everyone.items():
        with ranks:
            codes, outputs = ranks.codes(30), ranks.outputs()
        assert codes[0] == codes[2] == 0, outputs
        assert codes[1] == {"killed": -9, "interrupted": 1, "late": 3}[how], outputs
        for output in outputs[::2]:
            # torch's store may have had a word of its own before.
            seconds, _, words = output.splitlines()[-1].partition(": ")
            assert (
                "rank" in words
                and "1" in words
                and f"{LIMIT:g} seconds of run.rank_timeout" in words
            )
            # As many for the store, and for the end.
            assert float(seconds) < 3 * LIMIT
    for rank, ranks in missing.items():
        with ranks:
            codes, outputs = ranks.codes(30), ranks.outputs()
        assert codes == [0], outputs
        seconds, _, words = outputs[0].splitlines()[-1].partition(": ")
        assert "the 2 processes of WORLD_SIZE did not find each other at 127.0.0.1:" in words
        assert f"rank {rank} waited" in words and float(seconds) < 3 * LIMIT
