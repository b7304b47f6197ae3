"""Binaries of NVIDIA's compiler (cubin files): the target, and the parameters of a kernel."""

from __future__ import annotations

import struct

# Attributes in the section .nv.info.<kernel>: a parameter's place and size, and those of all.
_KPARAM_INFO, _CBANK_PARAM_SIZE = 0x17, 0x19
_SIZED = 4
_EM_CUDA = 190


def parameters(cubin: bytes, entry: str) -> tuple[list[tuple[int, int]], int]:
    """Reads ((offset, bytes) of each parameter in order, bytes of all) of a kernel."""
    if cubin[:4] != b"\x7fELF" or struct.unpack_from("<H", cubin, 18)[0] != _EM_CUDA:
        raise ValueError("this is no binary for an NVIDIA GPU")
    info = _section(cubin, f".nv.info.{entry}")
    layout: dict[int, tuple[int, int]] = {}
    total, at = 0, 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != _SIZED:
            # The value itself, in two bytes.
            if attribute == _CBANK_PARAM_SIZE:
                total = value
            continue
        if attribute == _KPARAM_INFO:
            _, ordinal, offset, flags = struct.unpack_from("<IHHI", info, at)
            layout[ordinal] = offset, flags >> 18
        at += value
    return [layout[i] for i in range(len(layout))], total


def _section(elf: bytes, name: str) -> bytes:
    """Returns the bytes of a section of a 64-bit file."""
    (table,) = struct.unpack_from("<Q", elf, 40)
    size, count, names = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + i * size) for i in range(count)]
    strings = headers[names][4]
    for header in headers:
        start = strings + header[0]
        if elf[start : elf.index(b"\0", start)] == name.encode():
            return elf[header[4] : header[4] + header[5]]
    raise ValueError(f"there is no section {name}")
