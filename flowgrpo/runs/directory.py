"""The run directory: what a run writes, and how it goes on.

    runs/nano-0/
      config.json          the configuration
      content.json         fingerprints of prompts and weights, see content.py
      metrics.jsonl        one object a line; see `RunDirectory.log`
      tensorboard/         the same numbers as TensorBoard events, and the samples
      samples/*.png        the same prompts and seeds before, during and after; of videos four
                           frames of each, and the first ones whole as .webp
      curve.png            held-out accuracy against iterations
      checkpoints/step-*   see checkpoints.py
      initial/             the adapter of policy.init_adapter, where the run started from one
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
from flowgrpo.config.config import AUTO
from flowgrpo.config.validation import path_text, shown
from flowgrpo.distributed.world import ALONE, World
from flowgrpo.evaluation.evaluate import Evaluation
from flowgrpo.policies.adapters import INITIAL
from flowgrpo.runs import checkpoints, content, loggers, model_card
from flowgrpo.runs.export import export
from flowgrpo.runs.process import versions
from flowgrpo.runs.state import State

log = logging.getLogger("flowgrpo")
MAY_CHANGE = {
    "run.steps",
    "run.min_seconds",
    "run.out",
    "run.resume",
    "run.eval_every",
    "run.eval_seconds",
    "run.checkpoint_every",
    "run.threads",
    "run.rank_timeout",
    "run.wandb",
    "run.progress",
    # Of a model trained whole the last bits change, as they do with the number of processes.
    "run.parallel",
    "run.shard_size",
    "run.cpu_offload",
    # Cached embeddings are the fresh ones to the bit.
    "policy.text_cache",
    "policy.offload_text_encoders",
    # Scores are the same beside the rollout and after it.
    "sample.overlap",
    # Places: what lies there is compared by content.py.
    "policy.model",
    "policy.variant",
    "sample.prompts",
    "policy.device",
    "run.accept_changes",
    # Replayed rollouts have the bits of others.
    "sample.capture",
    # Services; their addresses and tokens, see `_without_services`.
    "reward.timeout",
    "reward.retries",
    # Where their models are, as the option device.
    "reward.devices",
}
"""Fields in which a continuation may differ: they do not change its numbers."""

SERVICE_OPTIONS = (
    *("url", "token", "timeout", "retries", "backoff", "concurrency", "device", "workers"),
    *("wait", "tolerance", "offset"),
    # What lies there is compared by content.py.
    *content.PLACE_OPTIONS,
)
"""Options of rewards that say where they are computed, and how a service is called."""

FIRST_FILES = ("config.json", "content.json", "metrics.jsonl")
FIRST_FOLDERS = ("samples", "checkpoints", "tensorboard", "evaluations", "wandb", INITIAL)
"""Folders, beside `FIRST_FILES`, that a run writes before its first checkpoint."""


class RunDirectory:
    """A run directory that this process writes to. Opened by `open`, released by `close`."""

    def __init__(self, config: Config) -> None:
        # Absolute, as code of the user's may change the working directory.
        self.config, self.path = config, Path(os.path.abspath(config.out_dir))
        self.samples, self.checkpoints = self.path / "samples", self.path / "checkpoints"
        self._metrics = open(self.path / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        if reason := lock(self._metrics, self.path):
            log.warning(
                "The run directory %s cannot be locked (%s), so nothing keeps a second process "
                "from writing it too.",
                self.path,
                reason,
            )
        # A checkpoint may be among what a process that was killed has set aside.
        files.remove_leftovers(self.path)
        saved = checkpoints.list_checkpoints(self.checkpoints) if config.run.resume else []
        self.checkpoint = saved[-1] if saved else None
        self.loggers = loggers.Loggers(config, self.path)

    @classmethod
    def open(cls, config: Config, now: content.Content | None = None) -> RunDirectory:
        """Create the directory of a new run, or open the one that `config.run.resume` names.

        Args:
            config: of the run.
            now: the content that it trains and evaluates with; None: it is not looked at.

        Raises:
            ConfigError: the directory holds a run that has begun or other files, cannot be
                written, belongs to another configuration or content, or is in use. Nothing is left
                behind or changed then.
        """
        folder = config.out_dir
        loggers.check(config.run)
        changes = {}
        if config.run.resume:
            _check_same(config, resume_config(folder))
            changes = content.check(folder, config, now) if now is not None else {}
        else:
            _create(folder, config)
        try:
            run = cls(config)
            if not config.run.resume:
                run._clear()
            run.samples.mkdir(exist_ok=True)
            run.checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"the run directory {str(folder)!r} cannot be written ({error.strerror}), but a "
                "run writes its metrics and checkpoints there; make it writable."
            ) from error
        if now is not None:
            try:
                run._note_content(now, changes)
            except BaseException:
                run.close()
                raise
        return run

    def _note_content(self, now: content.Content, changes: Mapping[str, str]) -> None:
        """Write content.json, and put aside evaluations that `changes` have made incomparable."""
        iteration = checkpoints.read_state(self.checkpoint)["iteration"] if self.checkpoint else 0
        evaluations = self.path / "evaluations"
        if changes.keys() & {"evaluation", "model", "rewards"} and evaluations.is_dir():
            number, aside = 0, evaluations
            while aside.exists():
                number += 1
                aside = self.path / f"evaluations-before-change-{number}"
            evaluations.rename(aside)
        accepted = [words for name, words in changes.items() if name != "code"]
        if accepted:
            log.warning("The run goes on with other content, as accepted: %s.", "; ".join(accepted))
        if "code" in changes:
            log.warning(
                "%s changed since the run began; scores of before and after compare only where it "
                "gives the same ones.",
                changes["code"],
            )
        if changes or not (self.path / content.FILE).exists():
            content.write(self.path, now, iteration, changes)

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
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
        return [line for line in lines if kind in (None, line["kind"])]

    def save(self, state: State, transformer: nn.Module, score: float | None = None) -> Path:
        """Write the checkpoint of `state.iteration`; keep the last two and the best by `score`
        (the evaluation's accuracy, if there was one at this iteration)."""
        self._metrics.flush()
        files.sync(self._metrics.fileno())
        record = {**files.plain(state.counters()), "score": score, "versions": versions()}
        lora = self.config.policy.adapter == "lora"
        if state.sharded:
            path = checkpoints.save_pieces(
                self.checkpoints, state.iteration, state.tensors(), record, state.world
            )
            checkpoints.prune(self.checkpoints)
            return path

        def adapter(folder: Path) -> None:
            export(transformer, state.ema, self.config.policy, folder)
            model_card.write(
                folder, self.config, transformer, state.iteration, weights=state.ema.weights
            )

        path = checkpoints.save(
            self.checkpoints, state.iteration, state.tensors(), record, adapter if lora else None
        )
        checkpoints.prune(self.checkpoints)
        return path

    def save_initial(self, state: State, transformer: nn.Module) -> None:
        """Copy the adapter that the run starts from: a resumed run and `evaluate` read it here."""
        with files.replacing_folder(self.path / INITIAL) as folder:
            export(transformer, state.ema, self.config.policy, folder)

    def save_evaluation(self, evaluation: Evaluation, name: str) -> None:
        """Write an evaluation into the folder evaluations/`name`."""
        evaluation.save(self.path / "evaluations" / name)

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
        """Write summary.json, and the weights that `state.ema` shows for diffusers."""
        final = self.path / ("adapter" if self.config.policy.adapter == "lora" else "transformer")
        with files.replacing_folder(final) as folder:
            export(transformer, state.ema, self.config.policy, folder, state.world)
            iteration, weights = state.iteration, state.ema.weights
            model_card.write(folder, self.config, transformer, iteration, summary, weights=weights)
        files.write_json(self.path / "summary.json", summary)

    def close(self) -> None:
        """Flush and release the directory."""
        self.loggers.close()
        self._metrics.close()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _clear(self) -> None:
        """Remove what a run that never began has left; this process has the lock."""
        for name in FIRST_FOLDERS:
            shutil.rmtree(self.path / name, ignore_errors=True)
        (self.path / content.FILE).unlink(missing_ok=True)
        self._metrics.truncate(0)

    def _cut_metrics(self, iteration: int) -> None:
        """Cut metrics.jsonl after `iteration`; the rest comes again, with the same numbers.

        Also dropped are a line that was being written when the process died, and an evaluation that
        was run only because the run ended ("final").
        """
        path = self.path / "metrics.jsonl"
        lines = path.read_bytes().splitlines(keepends=True)
        size, end = 0, len(lines)
        for number, line in enumerate(lines):
            # An editor may have left an empty line.
            if line.strip():
                values = _metrics_line(line)
                if values is None or values["iteration"] > iteration or values.get("final", False):
                    end = number
                    break
            size += len(line)
        # Only the last line may have been cut off; what follows another is not written again.
        later = [values for line in lines[end + 1 :] if (values := _metrics_line(line))]
        if (
            end < len(lines)
            and _metrics_line(lines[end]) is None
            and any(values["iteration"] <= iteration for values in later)
        ):
            raise ConfigError(
                f"line {end + 1} of {path} is {shown(lines[end][:60].decode(errors='replace'))}, "
                "but a line that `flowgrpo train` wrote is expected; restore it, or remove it to "
                "go on without."
            )
        os.truncate(path, size)


class Follower(RunDirectory):
    """The run directory in another process than the first: read for a checkpoint, never written."""

    def __init__(self, config: Config, checkpoint: Path | None) -> None:
        """checkpoint: the one that the first process goes on from.

        Raises:
            ConfigError: this process does not see it.
        """
        self.config, self.path = config, Path(os.path.abspath(config.out_dir))
        self.samples, self.checkpoints = self.path / "samples", self.path / "checkpoints"
        self.checkpoint = checkpoint
        if checkpoint is not None and not (checkpoint / checkpoints.STATE).is_file():
            raise ConfigError(
                f"the checkpoint {str(checkpoint)!r} is not seen on {os.uname().nodename}, but all "
                "processes of a run read it; put the run directory on a file system that all "
                "machines share."
            )
        self.loggers = loggers.NoLoggers()

    def log(self, *arguments: Any, **options: Any) -> None:
        """Write nothing."""

    def save(self, state: State, transformer: nn.Module, score: float | None = None) -> None:
        """Write this process's pieces of a sharded model, and else nothing."""
        if state.sharded:
            tensors = state.tensors()
            checkpoints.save_pieces(self.checkpoints, state.iteration, tensors, {}, state.world)

    def save_initial(self, *arguments: Any) -> None:
        """Write nothing."""

    def save_evaluation(self, *arguments: Any) -> None:
        """Write nothing."""

    def finish(self, summary: Mapping[str, Any], state: State, transformer: nn.Module) -> None:
        """Hand the first process the pieces of a sharded model, and write nothing."""
        if state.sharded:
            export(transformer, state.ema, self.config.policy, self.path, state.world)

    def restore(self, state: State) -> bool:
        """Bring `state` back from the checkpoint; False if there is none."""
        if self.checkpoint is not None:
            state.restore(self.checkpoint)
        return self.checkpoint is not None

    def close(self) -> None:
        """Nothing is open."""


def _metrics_line(line: bytes) -> dict[str, Any] | None:
    """Read a line of metrics.jsonl; None for one that is not whole, or of something else."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    is_ours = isinstance(values, dict) and isinstance(values.get("iteration"), int)
    return values if is_ours and line.endswith(b"\n") else None


def resume_config(folder: str | Path) -> Config:
    """Read the configuration of the run in `folder`, set to go on there."""
    path = Path(path_text(folder)) / "config.json"
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
    # A change is accepted each time anew.
    return replace(from_json(text), **{"run.resume": str(folder), "run.accept_changes": False})


def settle_resume(config: Config, world: World = ALONE) -> Config:
    """Decide what `run.resume` "auto" means, the first process for all: the run directory if a run
    has begun there, or a new run. Any other value stays."""
    if config.run.resume != AUTO:
        return config
    folder = world.from_first(lambda: _begun(config.out_dir))
    return replace(config, **{"run.resume": folder})


def _begun(folder: Path) -> str | None:
    """Name `folder` if it holds a run with a checkpoint; None if there is nothing to go on from."""
    saved = checkpoints.list_checkpoints(folder / "checkpoints")
    # One that a process set aside when it was killed while replacing it comes back later.
    aside = any((folder / "checkpoints").glob(f".{checkpoints.PREFIX}*.old"))
    return str(folder) if (folder / "config.json").is_file() and (saved or aside) else None


def _check_same(config: Config, stored: Config) -> None:
    """Raise ConfigError if a continuation differs from the run in more than `MAY_CHANGE`."""
    before, now = (_without_services(fields_by_name(c)) for c in (stored, config))
    if config.policy.device != stored.policy.device:
        log.warning(
            "policy.device is %r, and the run in %s began with %r: on another kind of device the "
            "last bits of its numbers are others.",
            config.policy.device,
            stored.run.resume,
            stored.policy.device,
        )
    may_change = set(MAY_CHANGE)
    if config.policy.init_adapter and stored.policy.init_adapter:
        # A place too: the run goes on from its own copy of what lay there.
        may_change.add("policy.init_adapter")
    for name, value in now.items():
        if name not in may_change and value != before[name]:
            raise ConfigError(
                f"{name} is {value!r}, but the run in {stored.run.resume} was started with "
                f"{before[name]!r}; leave it as it was, or start a new run with another --run.out."
            )


def fields_by_name(config: Config) -> dict[str, Any]:
    """List the fields of a configuration by dotted name, as JSON values."""
    fields: dict[str, Any] = {}
    for section, values in to_dict(config).items():
        if isinstance(values, dict):
            fields |= {f"{section}.{name}": value for name, value in values.items()}
        else:
            fields[section] = values
    return fields


def _without_services(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace what only says where the rewards are: addresses by their number among the weights,
    files by their names, options of `SERVICE_OPTIONS` by nothing."""
    addresses = [name for name in fields["reward.weights"] if is_address(name)]
    aliases = {name: f"address {number}" for number, name in enumerate(addresses, start=1)}
    names = dict.fromkeys((*fields["reward.weights"], *fields["reward.report"]))
    files_named: dict[str, list[str]] = {}
    for name in filter(is_file, names):
        files_named.setdefault(os.path.basename(name), []).append(name)
    # Two files of one name are told apart by their paths.
    aliases |= {paths[0]: name for name, paths in files_named.items() if len(paths) == 1}
    options = {}
    for key, value in fields["reward.options"].items():
        name, _, option = key.rpartition(".")
        if option not in SERVICE_OPTIONS:
            options[f"{aliases.get(name, name)}.{option}"] = value
    weights = {aliases.get(name, name): w for name, w in fields["reward.weights"].items()}
    report = [aliases.get(name, name) for name in fields["reward.report"]]
    extra = [name for name in report if is_address(name)]
    report = [f"reported address {extra.index(n)}" if n in extra else n for n in report]
    return {
        **fields,
        "reward.weights": weights,
        "reward.report": report,
        "reward.options": options,
    }


def is_address(name: str) -> bool:
    """Tell an address of a remote reward from a reward's name."""
    return name.lower().startswith(("http://", "https://"))


def is_file(name: str) -> bool:
    """Tell a reward that is named by the path of its file, "file.py:function"."""
    return name.rpartition(":")[0].endswith(".py")


def check_directory(config: Config) -> None:
    """Raise early, before a model is loaded, if a new run's directory is taken."""
    folder = config.out_dir
    if config.run.resume:
        return
    try:
        # A process that is killed while it writes config.json leaves a file with another name.
        taken = os.path.isdir(folder) and not all(map(files.is_leftover, folder.iterdir()))
    except OSError as error:
        raise ConfigError(
            f"run.out {str(folder)!r} cannot be looked into ({error.strerror}), but a new or empty "
            "directory is expected; choose another --run.out."
        ) from error
    if taken and not _never_began(folder):
        raise ConfigError(
            f"run.out {str(folder)!r} is not empty, but a new or empty directory is expected; "
            f"choose another --run.out, or go on with that run by --run.resume {folder}."
        )


def _never_began(folder: Path) -> bool:
    """Tell a run that ended before its first checkpoint, and that no process is at work on.

    There is nothing to go on from then, and nothing but what such a run writes.
    """
    names = {path.name for path in folder.iterdir() if not files.is_leftover(path)}
    if "config.json" not in names or names - {*FIRST_FILES, *FIRST_FOLDERS}:
        return False
    try:
        # Other programs have a config.json and folders of these names as well.
        resume_config(folder)
    except ConfigError:
        return False
    # One that is damaged counts too.
    if any((folder / "checkpoints").glob(f"{checkpoints.PREFIX}*")):
        return False
    try:
        with open(folder / "metrics.jsonl", "ab+") as file:
            # Without locks no process can be told from none.
            if lock(file, folder):
                return False
            file.seek(0)
            if b'"kind": "train"' in file.read():
                return False
    except (OSError, ConfigError):
        return False
    return True


def _create(folder: Path, config: Config) -> None:
    """Create the directory of a new run with its config.json."""
    check_directory(config)
    # Folders that are new are removed again if the directory turns out not to be writable.
    new = [path for path in (folder, *folder.parents) if not os.path.exists(path)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files.write_text(folder / "config.json", to_json(config))
    # ValueError: its path is no path.
    except (OSError, ValueError) as error:
        if new:
            shutil.rmtree(new[-1], ignore_errors=True)
        raise ConfigError(
            f"run.out {shown(str(folder))} cannot be written "
            f"({getattr(error, 'strerror', error)}), but a directory that "
            "can be created and written is expected; choose another --run.out."
        ) from error


def lock(file: Any, folder: Path, kind: str = "run directory", option: str = "--run.out") -> str:
    """Lock the open `file` of `folder` for this process; messages say what `kind` of folder it is,
    and which `option` names it.

    Returns:
        The reason why the system has no locks for it; "" if it is locked.

    Raises:
        ConfigError: another process has the lock.
    """
    try:
        import fcntl
    except ImportError:
        return "no fcntl on this system"
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ConfigError(
            f"{kind} {str(folder)!r} is in use by another process, or by another call of this one, "
            f"but one at a time writes it; stop that one or choose another {option}."
        ) from error
    except OSError as error:
        # Lustre without its flock option says ENOSYS, other file systems of networks ENOTSUP.
        return error.strerror or str(error)
    return ""
