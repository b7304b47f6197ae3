"""Checkpoints on disk: safetensors + JSON, written beside and renamed, never half there.

    checkpoints/step-000050/
      weights.safetensors     trained parameters, by name
      optimizer.safetensors   AdamW's state, "<parameter name>|<key>"
      ema.safetensors         averaged parameters, by name
      old.safetensors         the policy that samples, by name, where it is another (nft)
      state.json              format, iteration, counters, SHA-256 of each file, versions
      pytorch_lora_weights.safetensors   what diffusers' `load_lora_weights` reads (LoRA runs)
      pieces/                 in place of all .safetensors, where parameters are sharded: a file of
                              each process, "<file stem>/<name>", by torch.distributed.checkpoint

A checkpoint is complete or absent: files are written and synced in a hidden folder beside it, which
is then renamed. Reading checks every file against its SHA-256 before anything is restored. Pieces
are read by any number of processes, and by one without others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from flowgrpo.config import ConfigError
from flowgrpo.distributed import pieces
from flowgrpo.distributed.world import World
from flowgrpo.files import read_tensors, remove_folder, replacing_folder, save_tensors

log = logging.getLogger("flowgrpo")
FORMAT = "flowgrpo-checkpoint-1"
STATE = "state.json"
PREFIX = "step-"
PIECES = "pieces"
"""Folder of a checkpoint that several processes wrote."""


def save(
    folder: Path,
    iteration: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    record: dict[str, Any],
    extra: Callable[[Path], None] | None = None,
) -> Path:
    """Write the checkpoint of `iteration` under `folder`.

    Args:
        folder: the run's `checkpoints` folder.
        iteration: completed iterations; names the checkpoint.
        tensors: file stem ("weights", ...) -> name -> tensor.
        record: JSON values stored in state.json under "record".
        extra: f(folder), writes further files there before the checkpoint appears.
    """
    final = folder / f"{PREFIX}{iteration:06d}"
    # A resumed run reaches an iteration again, and replaces its checkpoint.
    with replacing_folder(final) as temporary:
        for stem, values in tensors.items():
            save_tensors(temporary / f"{stem}.safetensors", values)
        if extra is not None:
            extra(temporary)
        sums = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        state = {"format": FORMAT, "iteration": iteration, "sha256": sums, "record": record}
        (temporary / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    return final


def save_pieces(
    folder: Path,
    iteration: int,
    tensors: dict[str, dict[str, torch.Tensor]],
    record: dict[str, Any],
    world: World,
) -> Path:
    """Write a checkpoint as `save` does, each process of `world` its pieces of the tensors.

    To be called by all. `folder` is one that all see.
    """
    final = folder / f"{PREFIX}{iteration:06d}"
    with ExitStack() as stack:
        temporary = world.from_first(lambda: stack.enter_context(replacing_folder(final)))
        named = {f"{stem}/{name}": t for stem, ts in tensors.items() for name, t in ts.items()}
        with world.together(lockstep=True):
            pieces.write(temporary / PIECES, named, world)
        with world.together():
            share = pieces.own_files(temporary / PIECES, world)
            sums = {f"{PIECES}/{path.name}": _sha256(path) for path in share}
        everywhere = world.gather(sums)
        with world.together():
            if world.first:
                sums = {name: value for sums in everywhere for name, value in sums.items()}
                state = {"format": FORMAT, "iteration": iteration, "sha256": sums, "record": record}
                text = json.dumps(state, indent=2) + "\n"
                (temporary / STATE).write_text(text, encoding="utf-8")
                # Renames it.
                stack.close()
    return final


def is_sharded(checkpoint: Path) -> bool:
    """Tell a checkpoint in pieces from one in whole files."""
    return (checkpoint / PIECES).is_dir()


def load_pieces(
    checkpoint: Path,
    empty: Callable[[str, torch.Size, torch.dtype], torch.Tensor],
    world: World,
) -> dict[str, dict[str, torch.Tensor]]:
    """Read the tensors of a checkpoint in pieces by file stem and name, each process its own.

    Args:
        empty: f(name, shape, dtype), makes the tensor that one of that name is read into.
        world: all its processes call this. Each compares its share of the files with their SHA-256.
    """
    sums = sorted(read_state(checkpoint)["sha256"].items())
    with world.together():
        for name, expected in sums[world.rank :: world.size]:
            _compare(checkpoint / name, expected)
        named = {
            key: empty(key.partition("/")[2], *kind)
            for key, kind in pieces.describe(checkpoint / PIECES).items()
        }
    with world.together(lockstep=True):
        pieces.read(checkpoint / PIECES, named, world)
    tensors: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in named.items():
        stem, _, name = key.partition("/")
        tensors.setdefault(stem, {})[name] = tensor
    return tensors


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.glob(f"{PREFIX}*") if p.is_dir() and (p / STATE).is_file())


def latest(run_dir: str | Path) -> Path:
    """Find the newest checkpoint of a run directory; `run_dir` itself if it is a checkpoint."""
    run_dir = Path(run_dir)
    if (run_dir / STATE).is_file():
        return run_dir
    checkpoints = list_checkpoints(run_dir / "checkpoints")
    if not checkpoints:
        raise ConfigError(
            f"{run_dir} holds no checkpoint, but a run directory with checkpoints/step-* or one "
            "such folder is expected; name the directory that `flowgrpo train` wrote."
        )
    return checkpoints[-1]


def best(run_dir: str | Path) -> Path:
    """Find the checkpoint of a run directory with the best score; the newest if none has one."""
    newest = latest(run_dir)
    candidates = list_checkpoints(newest.parent)
    scores = {path: read_state(path)["record"].get("score") for path in candidates}
    scored = [path for path in candidates if scores[path] is not None]
    return max(scored, key=lambda path: scores[path]) if scored else newest


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read state.json of a checkpoint: {"format", "iteration", "sha256", "record"}."""
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise ValueError(f"its format is {state['format']!r}, not {FORMAT!r}")
        for name, kind in (("iteration", int), ("sha256", dict), ("record", dict)):
            if not isinstance(state[name], kind):
                raise ValueError(f"its {name} is {state[name]!r}, not of type {kind.__name__}")
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise _corrupt(checkpoint / STATE, error) from error
    return state


def verify(checkpoint: Path) -> None:
    """Raise unless every file of the checkpoint is there and intact."""
    for name, expected in read_state(checkpoint)["sha256"].items():
        _compare(checkpoint / name, expected)


def load(checkpoint: Path, stem: str) -> dict[str, torch.Tensor]:
    """Read the tensors of `<stem>.safetensors`, or those of that stem in pieces, after comparing
    the files with their SHA-256."""
    if is_sharded(checkpoint):
        verify(checkpoint)
        named = {
            key: torch.empty(shape, dtype=dtype)
            for key, (shape, dtype) in pieces.describe(checkpoint / PIECES).items()
            if key.startswith(f"{stem}/")
        }
        pieces.read(checkpoint / PIECES, named)
        return {key.partition("/")[2]: tensor for key, tensor in named.items()}
    path = checkpoint / f"{stem}.safetensors"
    _compare(path, read_state(checkpoint)["sha256"].get(path.name))
    return read_tensors(path)


def check(into: dict[str, torch.Tensor], values: dict[str, torch.Tensor], path: Path) -> None:
    """Raise unless `values`, read from `path`, has the names, shapes and dtypes of `into`."""
    missing, foreign = sorted(into.keys() - values.keys()), sorted(values.keys() - into.keys())
    changed = sorted(
        name
        for name in into.keys() & values.keys()
        if (into[name].shape, into[name].dtype) != (values[name].shape, values[name].dtype)
    )
    for names, problem in ((missing, "lacks"), (foreign, "also holds"), (changed, "differs in")):
        if names:
            raise ConfigError(
                f"{path} {problem} {names[0]} ({len(names)} such of {len(into)} tensors), but the "
                "weights of this model and adapter are expected; use the configuration that wrote "
                "it."
            )


@torch.no_grad()
def restore(into: dict[str, torch.Tensor], values: dict[str, torch.Tensor]) -> None:
    """Copy `values` into the tensors `into` in place, by name."""
    for name, tensor in into.items():
        tensor.copy_(values[name])


def prune(folder: Path, keep: int = 2) -> None:
    """Remove all checkpoints but the last `keep` and the one with the best score."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        return
    try:
        remaining = {*checkpoints[-keep:], best(folder.parent)}
    except ConfigError as error:
        # One that is damaged ends no run that goes on from another.
        log.warning("No old checkpoint is removed: %s", error)
        return
    for path in checkpoints:
        if path not in remaining:
            try:
                remove_folder(path)
            except OSError as error:
                log.warning("The old checkpoint %s cannot be removed (%s).", path, error)


def clean(folder: Path) -> None:
    """Remove the folders that a process left when it died while writing."""
    for leftover in folder.glob(f".{PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _corrupt(path: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"{path} cannot be read ({error}), but an intact file of a flowgrpo checkpoint is "
        f"expected; remove {path.parent} to go on from the checkpoint before it."
    )


def _compare(path: Path, expected: str | None) -> None:
    try:
        if _sha256(path) != expected:
            raise ValueError("its SHA-256 is not the one that state.json holds")
    except (OSError, ValueError) as error:
        raise _corrupt(path, error) from error


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
