"""The processes of a run: who they are, what they tell each other, how they end together.

A launcher (torchrun, accelerate, SLURM with torchrun) starts the same command in each process and
sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT. Rank 0 writes files and the
terminal; every other rank computes its share and is silent. Without a launcher there is one process
and nothing here does anything.

Objects (scores, flags, figures) go over gloo; tensors on a GPU over nccl. No collective of a GPU is
begun before all ranks have said over gloo that they have come so far (`World.together`): a rank
that failed says why there, and the others raise its error instead of waiting for it.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from flowgrpo.config import ConfigError

T = TypeVar("T")
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables that a launcher sets."""
TIMEOUT = 1800.0
"""Seconds that a process waits for the others, where no configuration says it."""


class PeerError(RuntimeError):
    """Another process of the run failed, or cannot be reached."""


@dataclass
class Spent:
    """What a process has spent on the others so far."""

    seconds: float = 0.0
    """In collectives, waiting for the others among it."""
    bytes: float = 0.0
    """Sent, of tensors and pickled objects."""


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """Number of this process on its machine, and of its GPU."""
    timeout: float = TIMEOUT
    """Seconds that it waits for the others."""
    joined: bool = False
    """There is a process group; without one this process is alone."""
    spent: Spent = field(default_factory=Spent, compare=False)

    @property
    def first(self) -> bool:
        """True in the process that writes files and the terminal."""
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Collect a picklable value of each rank, in the order of ranks, on all of them.

        Raises:
            PeerError: another process is gone, or has not come within `timeout`.
        """
        if not self.joined:
            return [value]
        values: list[Any] = [None] * self.size
        with self.exchanging(len(pickle.dumps(value)) * (self.size - 1)):
            dist.all_gather_object(values, value)
        return values

    def from_first(self, call: Callable[[], T]) -> T:
        """Call `call` on rank 0 and return its result on all ranks.

        Raises:
            Exception: what the call raised, on all ranks.
        """
        if not self.joined:
            return call()
        result: list[Any] = [None]
        with self.together():
            if self.first:
                result = [call()]
        sent = len(pickle.dumps(result)) * (self.size - 1) if self.first else 0
        with self.exchanging(sent):
            dist.broadcast_object_list(result, src=0)
        return result[0]

    def any(self, flag: bool) -> bool:
        """Tell if the flag is set on any rank."""
        return any(self.gather(flag))

    @contextmanager
    def together(self, lockstep: bool = False) -> Iterator[None]:
        """Wait at the end of the block for all ranks; if the block fails on one, it fails on all.

        lockstep: the block has collectives of its own, as forwards of a sharded model are. A rank
        that fails inside raises at once, since the others, which wait there, hear nothing; they
        raise a PeerError once it has ended.

        Raises:
            Exception: what the block raised here. On the other ranks the first rank's error, named
                with its rank: in its own class for those of this package, else a PeerError.
        """
        if not self.joined:
            yield
            return
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = self._unreachable(caught) if lockstep and _is_of_others(caught) else caught
        if isinstance(error, PeerError) or (error is not None and lockstep):
            # The others are known to be gone, or cannot listen.
            raise error
        try:
            faults = self.gather(None if error is None else _packed(error))
        except PeerError:
            if error is not None:
                raise error from None
            raise
        failed = [rank for rank, fault in enumerate(faults) if fault is not None]
        if not failed:
            return
        if error is None:
            raise _unpacked(failed[0], faults[failed[0]])
        error.__dict__["told_by"] = failed[0]
        raise error

    def check_same(self, what: str, values: Mapping[str, Any], advice: str) -> None:
        """Raise ConfigError on all ranks unless these values are equal on all of them.

        Args:
            what: names them in the message, as "the configuration".
            advice: what to do about it.
        """
        everywhere = self.gather(dict(values))
        reference = everywhere[0]
        for rank, other in enumerate(everywhere):
            for name in (*reference, *(name for name in other if name not in reference)):
                if reference.get(name) != other.get(name):
                    raise ConfigError(
                        f"{what} is not the same in all {self.size} processes: {name} is "
                        f"{_short(reference.get(name))} in rank 0 and {_short(other.get(name))} in "
                        f"rank {rank}, but all are to compute one run; {advice}."
                    )

    def collect_rows(self, rows: Tensor) -> list[Tensor] | None:
        """Collect tensors [n, ...] of all ranks, which may differ in n, on the CPU of rank 0; None
        on the others."""
        if not self.joined:
            return [rows.cpu()]
        rows = rows.cpu().contiguous()
        counts = self.gather(len(rows))
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        into = [torch.empty_like(padded) for _ in counts] if self.first else None
        with self.exchanging(0 if self.first else padded.nbytes):
            dist.gather(padded, into, dst=0)
        return [r[:n] for r, n in zip(into, counts, strict=True)] if self.first else None

    def all_rows(self, rows: Tensor) -> list[Tensor]:
        """Collect tensors [n, ...] of all ranks, which may differ in n, on all of them."""
        if not self.joined:
            return [rows]
        counts = self.gather(len(rows))
        padded = rows.new_zeros((max(counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        into = padded.new_empty((self.size, *padded.shape))
        with self.exchanging(padded.nbytes * (self.size - 1)):
            all_gather(into.flatten(0, 1), padded)
        return [r[:n] for r, n in zip(into, counts, strict=True)]

    @contextmanager
    def exchanging(self, sent: float) -> Iterator[None]:
        """Run a collective in which this process sends so many bytes, and count it.

        Raises:
            PeerError: it fails, as it does when a process is gone.
        """
        started = time.perf_counter()
        try:
            yield
            self.spent.seconds += time.perf_counter() - started
            self.spent.bytes += sent
        except (RuntimeError, dist.DistError) as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: BaseException) -> PeerError:
        """Make the error for a collective that failed by `error`."""
        return PeerError(
            f"another of the {self.size} processes has ended without a word, or did not come "
            f"within the {self.timeout:g} seconds of run.rank_timeout (rank {self.rank} "
            f"waited: {_first_line(error)}); what the launcher reports of the processes says "
            "which. A run goes on with --run.resume."
        )


# torch 2.13 has renamed it.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

ALONE = World()
"""One process, without a process group."""

_joined: list[World] = []


def launched() -> bool:
    """Tell if a launcher has started this process as one of a group."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def local_rank() -> int:
    """Number of this process on its machine; 0 without a launcher."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def is_first() -> bool:
    """Tell if this process writes files and the terminal: rank 0, or the only one."""
    return not launched() or os.environ["RANK"] == "0"


def join(timeout: float = TIMEOUT) -> World:
    """Join the process group that the environment describes; `ALONE` without a launcher.

    A second call returns the same world.

    Args:
        timeout: seconds that a process waits for the others.

    Raises:
        ConfigError: the environment is not complete, this machine has fewer GPUs than processes, or
            the others have not come within `timeout`.
    """
    if _joined:
        return _joined[0]
    size = os.environ.get("WORLD_SIZE", "")
    if not launched() and size in ("", "1"):
        _check_slurm()
        return ALONE
    numbers = _numbers()
    rank, size, local = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        count = torch.cuda.device_count()
        if local >= count:
            raise ConfigError(
                f"LOCAL_RANK is {local}, but torch sees {count} CUDA device"
                f"{'' if count == 1 else 's'} on this machine and each process needs its own; "
                f"start at most {count} processes on it (torchrun --nproc-per-node {count})."
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                timeout=timedelta(seconds=timeout),
                rank=rank,
                world_size=size,
                store=_store_of_restart(size, timeout),
            )
        except (RuntimeError, ValueError, dist.DistError) as error:
            raise ConfigError(
                f"the {size} processes of WORLD_SIZE did not find each other at "
                f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} within {timeout:g} "
                f"seconds of run.rank_timeout ({_first_line(error)}), but all must start; look at "
                "the launcher's addresses and counts."
            ) from error
        atexit.register(leave)
    world = World(rank, size, local, timeout, joined=True)
    _joined.append(world)
    return world


def leave() -> None:
    """Leave the process group, if this process has joined one."""
    _joined.clear()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def reporting() -> Iterator[None]:
    """Write an error of the block into the launcher's record, which torchrun shows at its end."""
    try:
        yield
    except Exception as error:
        if os.environ.get("TORCHELASTIC_ERROR_FILE"):
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        raise


def _store_of_restart(size: int, timeout: float) -> dist.Store | None:
    """Make the store for processes that torchrun has started again; None: torch makes it.

    By default torchrun on one machine keeps its store through restarts (torch 2.13), where the
    addresses of the processes before still lie; so each start has names of its own.
    """
    environment = os.environ
    restart = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    # Agents of several machines may count differently, and make a new store each time.
    one_machine = environment.get("GROUP_WORLD_SIZE") == "1"
    agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if restart == "0" or not one_machine or not agents:
        return None
    address, port = environment["MASTER_ADDR"], int(environment["MASTER_PORT"])
    wait = timedelta(seconds=timeout)
    store = dist.TCPStore(address, port, size, is_master=False, timeout=wait)
    return dist.PrefixStore(f"restart-{restart}", store)


def _numbers() -> dict[str, int]:
    """Read what a launcher has set.

    Raises:
        ConfigError: something is missing or no number, or the numbers do not fit.
    """
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"the environment has {', '.join(n for n in VARIABLES if n not in missing)} and no "
            f"{', '.join(missing)}, but a launcher sets all of {', '.join(VARIABLES)}; start with "
            "torchrun, or unset WORLD_SIZE and RANK for one process."
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = os.environ[name]
        if not text.isdecimal():
            raise ConfigError(
                f"the environment variable {name} is {text!r}, but a launcher sets a whole number; "
                "start with torchrun."
            )
        numbers[name] = int(text)
    if not numbers["RANK"] < numbers["WORLD_SIZE"]:
        raise ConfigError(
            f"the environment variable RANK is {numbers['RANK']} of WORLD_SIZE "
            f"{numbers['WORLD_SIZE']}, but ranks are below the number of processes; start with "
            "torchrun."
        )
    return numbers


def _check_slurm() -> None:
    """Raise ConfigError in one of several tasks that SLURM's srun started without a launcher."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "")
    if tasks.isdecimal() and int(tasks) > 1 and "SLURM_PROCID" in os.environ:
        raise ConfigError(
            f"srun started {tasks} tasks of this command, which would be as many runs of their "
            "own, but one run of several processes is started by torchrun; write srun "
            "--ntasks-per-node 1 torchrun --nproc-per-node GPUS -m flowgrpo train ... "
            "(docs/scaling.md)."
        )


def _is_of_others(error: BaseException) -> bool:
    """Tell an error of a collective, as it fails when another process has ended."""
    return isinstance(error, dist.DistError) or "gloo/transport" in str(error)


def _packed(error: Exception) -> tuple[str, bytes | None]:
    """Pack an error for other processes: its sentence, and its class if it is of this package."""
    kind = type(error)
    ours = kind.__module__.partition(".")[0] == "flowgrpo"
    try:
        packed = pickle.dumps(kind) if ours else None
    # A class that is local to a function.
    except (pickle.PicklingError, AttributeError):
        packed = None
    text = str(error) if ours else f"{kind.__name__}: {error}"
    return text, packed


def _unpacked(rank: int, fault: tuple[str, bytes | None]) -> Exception:
    """Make the error that rank `rank` has packed."""
    text, packed = fault
    words = f"rank {rank}: {text}" if text else f"rank {rank}"
    error: Exception = PeerError(words)
    if packed is not None:
        # Its class may ask for other arguments.
        with suppress(TypeError):
            error = pickle.loads(packed)(words)
    error.__dict__["told_by"] = rank
    return error


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0].strip().rstrip(".:")[:200]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
