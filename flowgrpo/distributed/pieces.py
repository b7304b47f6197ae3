"""Tensors in pieces on disk, by torch.distributed.checkpoint: each rank writes those that it holds.

The files are safetensors, with the place of each piece in their headers, and no pickle. Whoever
reads them asks for other pieces, of more ranks or fewer, or for whole tensors.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo.distributed.world import World


def write(folder: Path, tensors: dict[str, Tensor], world: World) -> None:
    """Write this rank's pieces of `tensors` into `folder`, and wait for the disk. A collective.

    What all ranks have whole is written once.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    checkpoint.save(tensors, storage_writer=writer)


def own_files(folder: Path, world: World) -> list[Path]:
    """List a share of the files in `folder`, of which each rank has another."""
    return sorted(folder.iterdir())[world.rank :: world.size]


def describe(folder: Path) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """List the tensors in `folder`, put together: name -> shape and dtype."""
    metadata = _reader(folder).read_metadata().state_dict_metadata
    return {name: (kind.size, kind.properties.dtype) for name, kind in metadata.items()}


def read(folder: Path, into: dict[str, Tensor], world: World | None = None) -> None:
    """Read tensors by name into memory that is there: pieces or whole ones, in place.

    world: its ranks read together, a collective; None: this process alone.
    """
    from torch.distributed import checkpoint

    alone = world is None or not world.joined
    with warnings.catch_warnings():
        # That it is read by one process alone.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        checkpoint.load(into, storage_reader=_reader(folder), no_dist=alone)


def _reader(folder: Path) -> Any:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(folder))
