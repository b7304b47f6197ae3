"""The process of a run: threads, allocator, determinism, device, versions, and its end."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata

import torch

from flowgrpo import __version__
from flowgrpo.config import ConfigError, RunConfig
from flowgrpo.distributed.world import is_first

PACKAGES = ("torch", "diffusers", "transformers", "peft", "safetensors", "numpy", "triton")
OPTIONAL = ("bitsandbytes",)
"""Named where they are installed."""


def versions() -> dict[str, str | None]:
    """List the versions of Python, this package and the libraries that decide the numbers."""
    installed: dict[str, str | None] = {
        "python": platform.python_version(),
        "flowgrpo": __version__,
    }
    installed |= {name: _version(name) for name in PACKAGES}
    installed |= {name: _version(name) for name in OPTIONAL if _version(name)}
    # The package's version does not always name the build, such as +cu130; the module's does.
    installed["torch"] = str(torch.__version__)
    return installed


@functools.cache
def _version(name: str) -> str | None:
    """Read the version of a package, which takes milliseconds, once a process."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def kernel_backends(device: torch.device) -> str:
    """Name the kernel backends that run on `device`, for example "native"."""
    from flowgrpo_kernels import backend_info

    return ", ".join(sorted(set(backend_info()["ops"][device.type].values())))


def device_name(device: torch.device) -> str:
    """Name a GPU, or the CPU with its thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def quiet_loading() -> None:
    """Turn off the bars that diffusers and transformers show while they read a model from disk;
    downloads have their own."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def check_one_process(command: str, advice: str) -> None:
    """Raise ConfigError in a process that a launcher started as one of several.

    Args:
        command: one that is a single process, as "flowgrpo compare".
        advice: what to do instead.
    """
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1:
        raise ConfigError(
            f"the environment variable WORLD_SIZE is {size}, as launchers such as torchrun and "
            f"accelerate set it, but {command} is one process; {advice}."
        )


def prepare_process(run: RunConfig) -> None:
    """Set threads, deterministic algorithms, and an allocator that keeps its memory."""
    quiet_loading()
    if run.threads:
        torch.set_num_threads(run.threads)
    if torch.cuda.is_available():
        # cuBLAS reads this when it starts; without it its results may differ between two runs.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        # glibc hands freed blocks above 128 KiB back to the kernel, and page faults on getting them
        # again were half of nano's time. M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD; old glibc
        # refuses more than 32 MiB for the last.
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 1 << 30)
        libc.mallopt(-2, 1 << 26)
        if not libc.mallopt(-3, 1 << 30):
            libc.mallopt(-3, 1 << 25)
    except (OSError, AttributeError):
        pass


@dataclass
class Stop:
    """A request to stop, from a signal to the loop."""

    requested: bool = False
    """The loop is to end. Of several processes all have the same value, see `Monitor.iteration`."""
    asked: bool = False
    """A signal has come to this process."""
    signal: int = 0
    """Number of the signal that asked first."""
    alone: bool = True
    """There are no other processes, so what is asked for is requested at once."""


def _leave_terminal() -> None:
    """Send to nowhere what would go to a terminal that is gone, which is an error from now on."""
    for number in (1, 2):
        with suppress(OSError):
            if os.isatty(number):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)


@contextmanager
def stoppable(alone: bool = True) -> Iterator[Stop]:
    """Let the first Ctrl-C, the end of the terminal, or a signal by which a scheduler of a cluster
    says that the time is nearly up, only set `stop.requested`; a second Ctrl-C aborts.

    Schedulers send several signals, which ask for the same once: SLURM sends SIGTERM after the
    SIGUSR1 of --signal, Grid Engine SIGUSR2 after SIGUSR1. The loop looks at `stop.requested` after
    each iteration, so that what it started is finished and saved; an evaluation after one is left
    at its next chunk, and made when the run goes on. Outside the main thread, where
    Python delivers no signals, nothing is changed.
    """
    stop = Stop(alone=alone)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        if stop.asked:
            # `kill` after a Ctrl-C is the same person, who wants the end now.
            impatient = stop.signal == signal.SIGINT and number == signal.SIGTERM
            if number == signal.SIGINT or impatient:
                raise KeyboardInterrupt
            return
        stop.asked, stop.signal = True, number
        stop.requested = stop.requested or stop.alone
        if number == getattr(signal, "SIGHUP", None):
            _leave_terminal()
        # os.write, because print may be the very call that the signal interrupted; and the reader
        # may be gone.
        with suppress(OSError):
            if not is_first():
                return
            again = b"once more" if number == signal.SIGINT else b"Ctrl-C"
            os.write(2, b"\nFinishing this iteration, then saving; %s to abort at once.\n" % again)

    numbers = [signal.SIGINT, signal.SIGTERM]
    # Under nohup it is ignored, and stays so.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    for name in ("SIGUSR1", "SIGUSR2", "SIGXCPU"):
        # A handler of the caller's stays.
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            numbers.append(number)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
