"""Text embeddings: each text by itself, once, and from disk if it was there before.

A text is encoded in a batch of one. The kernels of a matrix product depend on the number of its
rows, so in a larger batch the bits of an embedding would depend on the texts beside it, and one
from disk could not be the same as a fresh one.

The cache is a folder of safetensors files, one for each text, named by the SHA-256 of everything
that decides the bits: the files of the text encoders and tokenizers, dtype, number of tokens, kind
of device, versions of the libraries, and the text. What is read is compared with the SHA-256 of
the tensors that was stored with it. In 16 bits a prompt of 128 tokens takes 1.7 MB for
SD3.5, 1.05 MB for FLUX.1 and 0.92 MB for Qwen-Image, and one of 512 tokens 7.9 MB for
FLUX.2-klein-4B; nothing is ever removed, and the folder may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from flowgrpo.config import ConfigError, PolicyConfig
from flowgrpo.config.validation import path_text
from flowgrpo.distributed.world import SPECIFIC
from flowgrpo.files import replacing
from flowgrpo.policies.pipelines import Pipeline
from flowgrpo.records import Conditioning

log = logging.getLogger("flowgrpo")
LIBRARIES = ("torch", "transformers", "diffusers", "tokenizers")
WHOLE = 1 << 20
"""Bytes up to which a file's content counts whole in the cache's key."""


class TextEncoder:
    """Conditioning of texts by `encode`, which is given one text and returns one row.

    With `offload` the `encoders` are on `device` only while texts are being encoded.
    """

    def __init__(
        self,
        encode: Callable[[str], Conditioning],
        encoders: Sequence[nn.Module],
        device: torch.device,
        cache: TextCache | None = None,
        offload: bool = False,
    ) -> None:
        self._encode, self._encoders, self._device = encode, encoders, device
        self._cache, self._offload = cache, offload

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """Embeddings of the texts, on the device; equal texts are encoded once."""
        known = {text: self._cache.read(text) if self._cache else None for text in texts}
        missing = [text for text, row in known.items() if row is None]
        with self._on_device(bool(missing)):
            for text in missing:
                known[text] = self._encode(text)
                if self._cache:
                    self._cache.write(text, known[text])
        rows = [known[text].to(self._device) for text in texts]
        return Conditioning(
            torch.cat([row.embeds for row in rows]), torch.cat([row.pooled for row in rows])
        )

    @contextmanager
    def _on_device(self, needed: bool) -> Iterator[None]:
        if not (needed and self._offload):
            yield
            return
        try:
            for encoder in self._encoders:
                encoder.to(self._device)
            yield
        finally:
            for encoder in self._encoders:
                encoder.to("cpu")


def make_encoder(
    encode: Callable[[str], Conditioning],
    encoders: Sequence[nn.Module],
    source: Pipeline,
    components: Sequence[str],
    length: int,
    device: torch.device,
    config: PolicyConfig,
) -> TextEncoder:
    """Make the encoder of a pipeline's texts, with the cache and the place that `config` says.

    Args:
        encode: one text -> one row.
        components: of the pipeline, whose files decide the bits.
        length: tokens of a text.
    """
    cached = open_cache(config.text_cache, source, components, length, device)
    return TextEncoder(encode, encoders, device, cached, config.offload_text_encoders)


class TextCache:
    """Embeddings in the folder `folder`; `identity` holds what they depend on beside the text."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder, self._identity = folder, dict(identity)
        self._broken = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"policy.text_cache {str(folder)!r} cannot be created ({error.strerror}), but a "
                "folder for text embeddings is expected; choose another, or an empty one for none."
            ) from error

    def path(self, text: str) -> Path:
        """The file of `text`, whether it exists or not."""
        key = json.dumps({**self._identity, "text": text}, sort_keys=True)
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / name[:2] / f"{name}.safetensors"

    def read(self, text: str) -> Conditioning | None:
        """The embeddings that `write` stored, on the CPU; None, with a warning, for a file that is
        not intact."""
        path = self.path(text)
        try:
            if not path.exists():
                return None
            with safe_open(path, "pt") as file:
                stored = (file.metadata() or {}).get("sha256")
                row = Conditioning(file.get_tensor("embeds"), file.get_tensor("pooled"))
            if stored != _digest(row):
                raise ValueError("its tensors are not those that were stored")
        except (OSError, ValueError, SafetensorError) as error:
            message = "%s cannot be used (%s); its text is encoded again."
            log.warning(message, path, error, extra=SPECIFIC)
            return None
        return row

    def write(self, text: str, row: Conditioning) -> None:
        """Store the embeddings of `text`; readers see the whole file or none."""
        if self._broken:
            return
        path, row = self.path(text), row.to(torch.device("cpu"))
        tensors = {"embeds": row.embeds.contiguous(), "pooled": row.pooled.contiguous()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"text": text, "sha256": _digest(row)})
        except (OSError, SafetensorError) as error:
            # A full disk stops no run: embeddings are only computed more often.
            self._broken = True
            message = "%s cannot be written (%s); no more text is cached."
            log.warning(message, path, error, extra=SPECIFIC)


def open_cache(
    setting: str,
    source: Pipeline,
    components: Iterable[str],
    max_length: int,
    device: torch.device,
) -> TextCache | None:
    """Open the cache that `policy.text_cache` names, for the text encoders of a pipeline.

    Args:
        setting: a folder; "auto" for flowgrpo/text in $XDG_CACHE_HOME or ~/.cache; "" for none.
            Without a usable folder "auto" is none too, with a warning.
        source: the pipeline; one that came without its files gets no cache.
        components: the pipeline's folders with text encoders and tokenizers.
        max_length: tokens of T5, or of what stands in its place.
    """
    if not setting or source.folder is None:
        return None
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    try:
        identity = {
            "files": fingerprint(source.folder, components),
            "dtype": str(source.dtype),
            "max_length": max_length,
            "device": on,
            "versions": {name: metadata.version(name) for name in LIBRARIES},
        }
    # A file of the model that may not be read, or a library without its metadata.
    except (OSError, metadata.PackageNotFoundError) as error:
        log.warning(
            "Text embeddings are not cached: what they depend on is not known (%s: %s).",
            type(error).__name__,
            error,
        )
        return None
    if source.text_quantizer:
        identity["quantizer"] = source.text_quantizer
    if source.variant:
        # Of the files of its folder, it has read others.
        identity["variant"] = source.variant
    if setting != "auto":
        return TextCache(Path(os.path.abspath(path_text(setting))), identity)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "flowgrpo" / "text"
    try:
        return TextCache(home.expanduser(), identity)
    # RuntimeError: there is no home directory.
    except (ConfigError, RuntimeError) as error:
        reason = str(error.__cause__ or error)
        log.warning("Text embeddings are not cached: there is no usable %s (%s).", home, reason)
        return None


def fingerprint(folder: Path, components: Iterable[str]) -> str:
    """SHA-256 of the files in `folder`/`components`.

    A file above 1 MiB counts by size, modification time, first and last MiB, as reading 10 GB of
    T5 would take longer than encoding a prompt set. In the Hub's cache it counts by its name there,
    which is the SHA-256 of its content.
    """
    digest = hashlib.sha256()
    for component in sorted(components):
        for path in sorted((folder / component).rglob("*")):
            if path.is_file():
                entry = [path.relative_to(folder).as_posix(), *_content(path)]
                digest.update(json.dumps(entry).encode())
    return digest.hexdigest()


def _content(path: Path) -> list[Any]:
    target, status = path.resolve(), path.stat()
    if re.fullmatch("[0-9a-f]{64}", target.name):
        return [target.name]
    with open(path, "rb") as file:
        digest = hashlib.sha256(file.read(WHOLE))
        if status.st_size <= WHOLE:
            return [digest.hexdigest()]
        file.seek(-WHOLE, os.SEEK_END)
        digest.update(file.read(WHOLE))
    return [digest.hexdigest(), status.st_size, status.st_mtime_ns]


def _digest(row: Conditioning) -> str:
    digest = hashlib.sha256()
    for tensor in (row.embeds, row.pooled):
        digest.update(f"{tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data
