"""Files and folders that are there whole or not at all: written beside their path, then renamed.

A reader, and a process that comes after one that was killed, sees the old content or the new one.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save_file

from flowgrpo.config import ConfigError

log = logging.getLogger("flowgrpo")
NO_FSYNC = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF)
"""Errors by which file systems of networks say that they have no fsync of a file or a folder."""
_without_fsync: set[str] = set()
"""Errors of fsync that were told."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file beside `path`, which it replaces at the end.

    After an error `path` is as it was, and the new file is gone. A link stays, and what it leads to
    is replaced.

    Raises:
        ConfigError: `path` is a device, a pipe or a folder, which a file would take the place of.
    """
    path = replaceable(path)
    temporary = _beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`, which it replaces at the end, once it is on disk.

    After an error `path` is as it was, and the new folder is gone.
    """
    temporary = _beside(path)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for entry in (*temporary.iterdir(), temporary):
            _sync(entry)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if path.exists():
        # A folder cannot be renamed over a full one.
        replaced = temporary.with_name(f"{temporary.name}.old")
        os.rename(path, replaced)
        os.rename(temporary, path)
        # What cannot go, such as a file that NFS holds for a reader, is removed the next time.
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(temporary, path)
    _sync(path.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder, of which a reader sees all or nothing."""
    temporary = _beside(path)
    os.rename(path, temporary)
    shutil.rmtree(temporary)


LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]{32}(\.old)?")
"""Names that the functions of this file use beside the path called group 1."""


def is_leftover(path: Path) -> bool:
    """Tell whether `path` has a name of something that is being written, or once was."""
    return LEFTOVER.fullmatch(path.name) is not None


def remove_leftovers(folder: Path) -> None:
    """Remove what processes left under `folder` when they were killed while writing.

    A folder that was set aside, and has not been replaced yet, gets its name back. No other process
    may be writing there.
    """
    for path in sorted(filter(is_leftover, folder.rglob(".*"))):
        name, aside = LEFTOVER.fullmatch(path.name).groups()
        replaced = path.with_name(name)
        # What cannot go, such as a file that NFS holds for a reader, is in nobody's way.
        with suppress(OSError):
            if aside and not replaced.exists():
                os.rename(path, replaced)
            elif path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def replaceable(path: Path) -> Path:
    """Find the file that is replaced where `path` is to be written: itself, or what it leads to.

    Raises:
        ConfigError: it is a device, a pipe or a folder, or a link that leads nowhere.
    """
    # One that leads in a circle is resolved to itself.
    target = Path(os.path.realpath(path)) if os.path.islink(path) else path
    if os.path.lexists(target) and not os.path.isfile(target):
        raise ConfigError(
            f"{str(path)!r} is a device, a pipe, a folder or a link in a circle, but a file is to "
            "be written there; choose another name."
        )
    return target


def _beside(path: Path) -> Path:
    # Processes of several machines may share the folder, so a process id is no name. A name may
    # have 255 bytes, of which this takes 38.
    return path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex}")


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    """Wait until an open file or folder is on the disk, where its file system can say so.

    A file system without fsync keeps the content and the order of the names; what it may lose is
    the last moments before a power cut. So it is told once, and the run goes on.
    """
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise
        name = errno.errorcode[error.errno]
        if name not in _without_fsync:
            _without_fsync.add(name)
            log.warning(
                "This file system refuses fsync (%s: %s), so files that were just written may be "
                "lost if the machine loses power.",
                name,
                error.strerror,
            )


def write_text(path: Path, text: str) -> None:
    """Replace the file `path` by `text`, in UTF-8, and wait until it is on the disk.

    What UTF-8 cannot write, as of a path whose bytes are none, is written as its number.
    """
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Replace the file `path` by `content` and wait until it is on the disk."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def write_json(path: Path, values: Any) -> None:
    """Replace `path` by `values` as indented JSON, see `plain`."""
    write_text(path, json.dumps(plain(values), indent=2) + "\n")


def plain(value: Any) -> Any:
    """Convert `value` for JSON: tensors to numbers or lists, numbers not finite to null."""
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str | bool | int | None):
        return value
    return float(value) if math.isfinite(value) else None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace the safetensors file `path` by `tensors`, of any device."""
    with replacing(path) as temporary:
        save_tensors(temporary, tensors)


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file where it is; for a path that is not seen yet."""
    save_file({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}, path)


def order_metadata(path: Path) -> None:
    """Put the metadata of the safetensors file `path` into the order of their names, in place.

    The library writes them in an order that it draws, so equal contents have unequal files.
    """
    with open(path, "r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        # The tensors' places count from the end of the header, which must stay where it is.
        if len(text) <= size:
            file.seek(8)
            file.write(text.ljust(size))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file.

    Raises:
        ConfigError: the file is missing or no safetensors file.
    """
    try:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            # The library opens no path whose bytes are no UTF-8.
            return load(path.read_bytes())
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"{path} cannot be read ({error}), but a safetensors file is expected; restore it."
        ) from error
