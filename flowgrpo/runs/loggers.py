"""Loggers of a run's numbers and sample pictures: TensorBoard and, if asked, Weights & Biases.

A list becomes numbers only if its name is in `SERIES`: its mean and its last value.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flowgrpo.config import Config, ConfigError, RunConfig, to_dict
from flowgrpo.config.user_code import is_installed

log = logging.getLogger("flowgrpo")
Pictures = Mapping[str, Image.Image]

SERIES = ("grad_norm",)
"""Lists with one number an update, of which the iteration's mean and its last are logged."""


@dataclass(frozen=True)
class Logger:
    """A service that takes numbers and pictures."""

    name: str
    write: Callable[[Mapping[str, float], Pictures, int], None]
    """f(name -> number, name -> picture, iteration)."""
    close: Callable[[], None]


class NoLoggers:
    """The loggers of a process that writes nothing."""

    def open(self, iteration: int) -> None:
        """Open nothing."""

    def write(self, line: Mapping[str, Any], kind: str, pictures: Pictures) -> None:
        """Write nothing."""

    def close(self) -> None:
        """Nothing is open."""


class Loggers:
    """All loggers of the run in `folder`."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._open: list[Logger] | None = None

    def open(self, iteration: int) -> None:
        """Open them for lines from `iteration` on; lines that a resumed run wrote of these are
        hidden.

        Raises:
            ConfigError: Weights & Biases cannot be started.
        """
        self._open = start(self.config, self.folder, iteration)

    def write(self, line: Mapping[str, Any], kind: str, pictures: Pictures) -> None:
        """Write a line of metrics.jsonl, and pictures by name, under "kind/name"; open the loggers
        if `open` has not."""
        if self._open is None:
            self.open(line["iteration"])
        values = dict(numbers(line, kind))
        tagged = {f"{kind}/{name}": picture for name, picture in pictures.items()}
        for logger in tuple(self._open):
            try:
                logger.write(values, tagged, line["iteration"])
            # A service of others may raise anything, and metrics.jsonl has the same numbers.
            except Exception as error:
                self._open.remove(logger)
                log.warning(
                    "%s failed (%s: %s) and gets no more numbers; metrics.jsonl has them all.",
                    logger.name,
                    type(error).__name__,
                    error,
                )

    def close(self) -> None:
        """Write all that is still in memory."""
        for logger in self._open or ():
            try:
                logger.close()
            except Exception as error:
                log.warning("%s was not closed (%s: %s).", logger.name, type(error).__name__, error)


def check(run: RunConfig) -> None:
    """Raise ConfigError if a logger that `run` asks for is not installed."""
    if run.wandb and not is_installed("wandb"):
        raise ConfigError(
            f"run.wandb is {run.wandb!r}, but the package wandb, which it needs, is not "
            "installed; install flowgrpo[wandb] or leave run.wandb out."
        )


def start(config: Config, folder: Path, iteration: int) -> list[Logger]:
    """Start the loggers of the run in `folder`, whose next number is of `iteration`."""
    loggers = []
    # The one that may fail comes first, so that the other has written nothing then.
    if config.run.wandb:
        loggers.append(wandb(config, folder))
    try:
        events = tensorboard(folder / "tensorboard", iteration if config.run.resume else None)
    # Its library may be damaged, and its folder not writable; metrics.jsonl has the same numbers.
    except Exception as error:
        log.warning(
            "There are no TensorBoard events (%s: %s); metrics.jsonl has all numbers.",
            type(error).__name__,
            error,
        )
        return loggers
    return [*loggers, events]


def tensorboard(folder: Path, purge: int | None) -> Logger:
    """Log to TensorBoard events under `folder`; those from iteration `purge` on are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=purge)

    def write(numbers: Mapping[str, float], pictures: Pictures, iteration: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, iteration)
        for name, picture in pictures.items():
            writer.add_image(name, np.asarray(picture), iteration, dataformats="HWC")
        # Otherwise a process that is killed loses two minutes, and the checkpoint that the run goes
        # on from may be younger.
        writer.flush()

    return Logger("TensorBoard", write, writer.close)


def wandb(config: Config, folder: Path) -> Logger:
    """Log to Weights & Biases; a resumed run goes on in the same record there.

    Raises:
        ConfigError: it cannot be started, for example without a login.
    """
    # The identity comes from the directory, so that no file has to remember it.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    try:
        import wandb

        record = wandb.init(
            project=config.run.wandb,
            name=folder.name,
            id=identity,
            resume="allow",
            dir=str(folder),
            config=to_dict(config),
        )
    # Without a login, a network or the right project: wandb's own errors, and others.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")[:300]
        raise ConfigError(
            f"run.wandb is {config.run.wandb!r}, but Weights & Biases cannot be started "
            f"({type(error).__name__}: {reason}); run `wandb login`, set WANDB_MODE=offline, or "
            "leave run.wandb out."
        ) from error

    def write(numbers: Mapping[str, float], pictures: Pictures, iteration: int) -> None:
        images = {name: wandb.Image(picture) for name, picture in pictures.items()}
        record.log({**numbers, **images}, step=iteration)

    return Logger("Weights & Biases", write, record.finish)


def numbers(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """List the numbers of a metrics line as ("train/rewards/x", 0.5), nested dicts included, and of
    a list in `SERIES` ("train/grad_norm/mean", 0.5) and ("train/grad_norm/last", 0.25)."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{name}")
        elif name in SERIES and isinstance(value, list) and value and None not in value:
            yield f"{prefix}/{name}/mean", sum(value) / len(value)
            yield f"{prefix}/{name}/last", float(value[-1])
        elif isinstance(value, int | float) and name != "iteration":
            yield f"{prefix}/{name}", float(value)
