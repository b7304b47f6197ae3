"""The run directory: what a run writes, and how it goes on.

    runs/nano-0/
      config.json          the configuration
      metrics.jsonl        one object a line; see `RunDirectory.log`
      tensorboard/         the same numbers as TensorBoard events, and the samples
      samples/*.png        the same prompts and seeds before, during and after
      curve.png            held-out accuracy against iterations
      checkpoints/step-*   see checkpoints.py
      adapter/             for `pipe.load_lora_weights("runs/nano-0/adapter")`; or transformer/
      summary.json         before, after, seconds, versions

A run that is killed and resumed goes on with the numbers it would have had: `State` (state.py) is
restored to the bit, metrics.jsonl is cut back to the checkpoint, and nothing reads torch's global
generator. Two equal runs write equal metrics.jsonl except under the key "seconds".
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from flowgrpo import files
from flowgrpo.config import Config, ConfigError, from_json, replace, to_dict, to_json
from flowgrpo.runs import checkpoints, loggers, model_card
from flowgrpo.runs.export import export
from flowgrpo.runs.process import versions
from flowgrpo.runs.state import State

log = logging.getLogger("flowgrpo")
MAY_CHANGE = {
    "run.steps",
    "run.out",
    "run.resume",
    "run.eval_every",
    "run.checkpoint_every",
    "run.threads",
    "run.wandb",
    "run.progress",
    # Cached embeddings are the fresh ones to the bit.
    "policy.text_cache",
    "policy.offload_text_encoders",
    # Scores are the same beside the rollout and after it.
    "sample.overlap",
}
"""Fields in which a continuation may differ: they do not change its numbers."""


class RunDirectory:
    """A run directory that this process writes to. Opened by `open`, released by `close`."""

    def __init__(self, config: Config) -> None:
        self.config, self.path = config, config.out_dir
        self.samples, self.checkpoints = self.path / "samples", self.path / "checkpoints"
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        _lock(self._metrics, self.path)
        # A checkpoint may be among what a process that was killed has set aside.
        files.remove_leftovers(self.path)
        saved = checkpoints.list_checkpoints(self.checkpoints) if config.run.resume else []
        self.checkpoint = saved[-1] if saved else None
        self.loggers = loggers.Loggers(config, self.path)

    @classmethod
    def open(cls, config: Config) -> RunDirectory:
        """Create the directory of a new run, or open the one that `config.run.resume` names.

        Raises:
            ConfigError: the directory is not empty, cannot be written, belongs to another
                configuration or is in use. Nothing is left behind or changed then.
        """
        folder = config.out_dir
        loggers.check(config.run)
        if config.run.resume:
            _check_same(config, resume_config(folder))
        else:
            _create(folder, config)
        run = cls(config)
        run.samples.mkdir(exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        return run

    def log(
        self,
        iteration: int,
        values: Mapping[str, Any],
        seconds: Mapping[str, float] | float | None = None,
        kind: str = "train",
        pictures: loggers.Pictures | None = None,
    ) -> None:
        """Append one line to metrics.jsonl, and the same numbers to TensorBoard with `pictures`.

        Args:
            iteration: completed iterations, 0 before the first.
            values: numbers, 0-dim tensors, or nested dicts and lists of them; not finite -> null.
            seconds: times, kept apart so that equal runs differ only there.
            kind: "train", "eval", or "guided" (the base model with guidance).
            pictures: name -> picture; metrics.jsonl has none of them.
        """
        line = {"iteration": iteration, "kind": kind, **files.plain(values)}
        if seconds is not None:
            line["seconds"] = files.plain(seconds)
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        self.loggers.write(line, kind, pictures or {})

    def metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Read the lines of metrics.jsonl so far, all or of one kind."""
        text = (self.path / "metrics.jsonl").read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if kind in (None, line["kind"])]

    def save(self, state: State, transformer: nn.Module, score: float | None = None) -> Path:
        """Write the checkpoint of `state.iteration`; keep the last two and the best by `score`
        (the evaluation's accuracy, if there was one at this iteration)."""
        self._metrics.flush()
        os.fsync(self._metrics.fileno())
        record = {**files.plain(state.counters()), "score": score, "versions": versions()}
        lora = self.config.policy.adapter == "lora"

        def adapter(folder: Path) -> None:
            export(transformer, state.ema, self.config.policy, folder)
            model_card.write(folder, self.config, transformer, state.iteration)

        path = checkpoints.save(
            self.checkpoints, state.iteration, state.tensors(), record, adapter if lora else None
        )
        checkpoints.prune(self.checkpoints)
        return path

    def restore(self, state: State) -> bool:
        """Bring `state` back from the newest checkpoint and metrics.jsonl to its iteration.

        Returns:
            False if there is no checkpoint, and the run starts from the beginning.

        Raises:
            ConfigError: the checkpoint is corrupt or of another model; nothing is changed then.
        """
        if self.checkpoint is not None:
            state.restore(self.checkpoint)
            written = checkpoints.read_state(self.checkpoint)["record"].get("versions")
            if written != versions():
                log.warning(
                    "%s was written by other versions, so numbers may differ: %s, now %s",
                    self.checkpoint,
                    written,
                    versions(),
                )
        self._cut_metrics(state.iteration if self.checkpoint else -1)
        checkpoints.clean(self.checkpoints)
        return self.checkpoint is not None

    def finish(self, summary: Mapping[str, Any], state: State, transformer: nn.Module) -> None:
        """Write summary.json, and the averaged weights for diffusers."""
        final = self.path / ("adapter" if self.config.policy.adapter == "lora" else "transformer")
        with files.replacing_folder(final) as folder:
            export(transformer, state.ema, self.config.policy, folder)
            model_card.write(folder, self.config, transformer, state.iteration, summary)
        files.write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Flush and release the directory."""
        self.loggers.close()
        self._metrics.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _cut_metrics(self, iteration: int) -> None:
        """Cut metrics.jsonl after `iteration`; the rest comes again, with the same numbers.

        Also dropped are a line that was being written when the process died, and an evaluation that
        was run only because the run ended ("final").
        """
        path = self.path / "metrics.jsonl"
        size = 0
        for line in path.read_bytes().splitlines(keepends=True):
            try:
                values = json.loads(line)
            except ValueError:
                break
            beyond = values["iteration"] > iteration or values.get("final", False)
            if beyond or not line.endswith(b"\n"):
                break
            size += len(line)
        os.truncate(path, size)


def resume_config(folder: str | Path) -> Config:
    """Read the configuration of the run in `folder`, set to go on there."""
    path = Path(folder) / "config.json"
    try:
        text = path.read_text(encoding="utf-8")
    # A ValueError: it is no UTF-8, or its path no path.
    except (OSError, ValueError) as error:
        name = path if str(path).isprintable() else repr(str(path))
        raise ConfigError(
            f"run.resume is {str(folder)!r}, but {name} cannot be read "
            f"({getattr(error, 'strerror', error)}); name a run directory that `flowgrpo train` "
            "wrote."
        ) from error
    return replace(from_json(text), **{"run.resume": str(folder)})


def _check_same(config: Config, stored: Config) -> None:
    """Raise ConfigError if a continuation differs from the run in more than `MAY_CHANGE`."""
    before = _by_name(stored)
    for name, value in _by_name(config).items():
        if name not in MAY_CHANGE and value != before[name]:
            raise ConfigError(
                f"{name} is {value!r}, but the run in {stored.run.resume} was started with "
                f"{before[name]!r}; leave it as it was, or start a new run with another --run.out."
            )


def _by_name(config: Config) -> dict[str, Any]:
    """List the fields of a configuration by dotted name, as JSON values."""
    fields: dict[str, Any] = {}
    for section, values in to_dict(config).items():
        if isinstance(values, dict):
            fields |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            fields[section] = values
    return fields


def check_directory(config: Config) -> None:
    """Raise early, before a model is loaded, if a new run's directory is taken."""
    folder = config.out_dir
    if config.run.resume:
        return
    # A process that is killed while it writes config.json leaves a file with another name.
    if folder.is_dir() and not all(map(files.is_leftover, folder.iterdir())):
        raise ConfigError(
            f"run.out {str(folder)!r} is not empty, but a new or empty directory is expected; "
            f"choose another --run.out, or go on with that run by --run.resume {folder}."
        )


def _create(folder: Path, config: Config) -> None:
    """Create the directory of a new run with its config.json."""
    check_directory(config)
    # Folders that are new are removed again if the directory turns out not to be writable.
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "config.json", to_json(config))
    except OSError as error:
        if new:
            shutil.rmtree(new[-1], ignore_errors=True)
        raise ConfigError(
            f"run.out {str(folder)!r} cannot be written ({error.strerror}), but a directory that "
            "can be created and written is expected; choose another --run.out."
        ) from error


def _lock(file: Any, folder: Path) -> None:
    """Lock the open `file` of `folder` for this process, where the system has such locks."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise ConfigError(
            f"run directory {str(folder)!r} is in use by another process, but one process at a "
            "time writes it; stop that one or choose another --run.out."
        ) from error
