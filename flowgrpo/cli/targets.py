"""Targets of a command line: a run, a checkpoint, a recipe or a model, and the folder to write."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

from flowgrpo import cuda_graphs
from flowgrpo.cli.options import EvaluateOptions, SampleOptions
from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.config.validation import require, shown
from flowgrpo.distributed.world import World
from flowgrpo.nano import MODELS
from flowgrpo.policies import Policy
from flowgrpo.policies.load import load_policy
from flowgrpo.recipes import RECIPES, recipe
from flowgrpo.runs import checkpoints, directory
from flowgrpo.runs.process import prepare_process, versions


def load_base(config: Config) -> Policy:
    """Load the model of `config` without adapters.

    A run may have demanded CUDA graphs of its device; here they are used where there are any.
    """
    capture = "off" if config.sample.capture == "off" else "auto"
    config = replace(config, **{"sample.capture": capture, "optim.capture": "off"})
    prepare_process(config.run)
    policy = load_policy(config, trainable=False)
    cuda_graphs.prepare(policy, config)
    return policy


def check_same_command(
    world: World,
    config: Config,
    options: EvaluateOptions | SampleOptions,
    checkpoint: Path | None,
) -> None:
    """Raise ConfigError unless all processes have the same command, configuration, checkpoint and
    versions."""
    fields: dict[str, Any] = directory.fields_by_name(config)
    for name, value in dataclasses.asdict(options).items():
        fields[f"--{name.replace('_', '-')}"] = value
    if checkpoint is not None:
        fields["the checkpoint"] = (checkpoint.name, checkpoints.read_state(checkpoint)["record"])
    fields |= {f"the version of {name}": value for name, value in versions().items()}
    advice = "start all with the same command, files and environment"
    world.check_same("the command", fields, advice)


def check_numbers(
    options: EvaluateOptions | SampleOptions, *names: str, zero: bool = False
) -> None:
    """Raise unless the named options, where given, are finite and > 0 (>= 0 with `zero`)."""
    for name in names:
        value, rule = getattr(options, name), "at least 0" if zero else "greater than 0"
        # Written so that NaN fails it as well.
        good = value is None or (0 <= value < float("inf") and (zero or value != 0))
        require(good, f"--{name.replace('_', '-')} is {value}, but it must be {rule}; change it.")


def image_size(options: EvaluateOptions | SampleOptions, config: Config) -> dict[str, int | None]:
    """Changes of the configuration that the options ask for, or else run.eval_resolution; a new
    resolution also replaces the height and width of before."""
    resolution = options.resolution
    if resolution is None and options.height is None and options.width is None:
        resolution = config.run.eval_resolution or None
    square = None if resolution is None else 0
    return {
        # All images are of one size here.
        "run.eval_resolution": 0,
        "policy.resolution": resolution,
        "policy.height": square if options.height is None else options.height,
        "policy.width": square if options.width is None else options.width,
        "policy.frames": options.frames,
    }


def evaluated_rows(options: EvaluateOptions | SampleOptions, config: Config) -> int | None:
    """Rows of a forward with which a run evaluates at a size of its own; None: those of training,
    or another size is asked for."""
    if any(side is not None for side in (options.resolution, options.height, options.width)):
        return None
    return None if config.eval_batch_size == config.sample.batch_size else config.eval_batch_size


def config_of_model(model: str) -> Config:
    """Make the configuration for a model without a run."""
    base = Config(recipe=Path(model).name)
    # The embedded models are small, any other may be large.
    rows = base.sample.batch_size if model in MODELS else 8
    return replace(base, **{"policy.model": model, "sample.batch_size": rows})


def resolve_target(target: str, best: bool) -> tuple[Config, Path | None]:
    """Find the configuration and checkpoint of a run directory or checkpoint folder; for a recipe's
    name or a model the checkpoint is None."""
    folder = Path(target)
    # os.path answers False for a name that is too long, or a folder that may not be looked into.
    exists = os.path.exists(folder)
    if not exists and (target in RECIPES or re.search(r":\w+$", target)):
        return recipe(target), None
    hub = not exists and not target.startswith(("/", ".")) and target.count("/") == 1
    if hub or os.path.isfile(folder / "model_index.json"):
        return config_of_model(target), None
    require(
        os.path.isdir(folder),
        f"{target!r} is neither a run directory nor a recipe ({', '.join(RECIPES)}) nor a model, "
        "but one of these is expected; name a directory that `flowgrpo train` wrote.",
    )
    checkpoint = checkpoints.best(folder) if best else checkpoints.latest(folder)
    checkpoints.verify(checkpoint)
    # checkpoints/step-* lies two folders below the run.
    run = folder if checkpoint != folder else folder.resolve().parents[1]
    return directory.resume_config(run), checkpoint


def check_writable(folder: Path) -> None:
    """Raise ConfigError unless `folder` can be created and written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".flowgrpo-probe"
        probe.write_bytes(b"")
        probe.unlink()
    # ValueError: its path is no path.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{shown(str(folder))} cannot be written ({getattr(error, 'strerror', error)}), but a "
            "folder for the results is expected; choose another --out."
        ) from error
