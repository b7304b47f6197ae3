"""Where a run's numbers go besides metrics.jsonl: TensorBoard and, if asked, Weights & Biases."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.config import Config, ConfigError, to_dict


@dataclass(frozen=True)
class Board:
    """One place that takes numbers."""

    write: Callable[[Mapping[str, float], int], None]
    """f(name -> number, iteration)."""
    close: Callable[[], None]


def check(config: Config) -> None:
    """Raise ConfigError if a board that `config` asks for is not installed."""
    if config.run.wandb and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"run.wandb is {config.run.wandb!r}, but the package wandb, which it needs, is not "
            "installed; install flowgrpo[wandb] or leave run.wandb out."
        )


def start(config: Config, folder: Path, iteration: int) -> list[Board]:
    """The boards of the run in `folder`, whose next number is of `iteration`."""
    found = [tensorboard(folder / "tensorboard", iteration if config.run.resume else None)]
    return [*found, wandb(config, folder)] if config.run.wandb else found


def tensorboard(folder: Path, purge: int | None) -> Board:
    """TensorBoard events under `folder`; those written from iteration `purge` on are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder), purge_step=purge)

    def write(numbers: Mapping[str, float], iteration: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, iteration)

    return Board(write, writer.close)


def wandb(config: Config, folder: Path) -> Board:
    """Weights & Biases; a resumed run goes on in the same record there."""
    import wandb

    # The identity comes from the directory, so that no file has to remember it.
    identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    record = wandb.init(
        project=config.run.wandb,
        name=folder.name,
        id=identity,
        resume="allow",
        dir=str(folder),
        config=to_dict(config),
    )
    return Board(
        lambda numbers, iteration: record.log(dict(numbers), step=iteration), record.finish
    )


def numbers(line: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    """The numbers of a metrics line as ("train/rewards/x", 0.5), nested dicts included."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}/{name}")
        elif isinstance(value, int | float) and name != "iteration":
            yield f"{prefix}/{name}", float(value)
