"""flowgrpo train: a run by a recipe and the fields that the command line changes."""

from __future__ import annotations

import errno
import os
import sys

from flowgrpo.cli.options import TrainOptions, option_value, parse
from flowgrpo.config import Config, ConfigError
from flowgrpo.config.config import AUTO
from flowgrpo.recipes import describe, recipe

FULL = (errno.ENOSPC, errno.EDQUOT)


def train(argv: list[str]) -> int:
    """Run ``flowgrpo train [RECIPE] [--section.field value ...]``."""
    config = parse_train(argv)
    from flowgrpo import train as flowgrpo_train
    from flowgrpo import update
    from flowgrpo.distributed import world
    from flowgrpo.runs import directory, loggers, monitor
    from flowgrpo.sampling.finite import NotFiniteError

    try:
        with world.reporting():
            processes = world.join(config.run.rank_timeout)
            config = directory.settle_resume(config, processes)
            with processes.together():
                if processes.first:
                    directory.check_directory(config)
                    loggers.check(config.run)
                    show_plan(config)
            summary = flowgrpo_train.run(config)
    except (*(update.RatioError, monitor.DivergedError, NotFiniteError, world.PeerError),) as error:
        if not world.is_said_elsewhere(error):
            print(f"error: {error}", file=sys.stderr)
        return 1
    # safetensors has an error of its own for a disk that is full.
    except Exception as error:
        if getattr(error, "errno", None) not in FULL and "No space left" not in str(error):
            raise
        # A cache or a temporary file may lie on another disk than the run.
        print(
            f"error: no space is left on a disk that the run in {str(config.out_dir)!r} writes to "
            f"({error}); free some and go on with --run.resume {config.out_dir}.",
            file=sys.stderr,
        )
        return 1
    return 130 if summary.get("interrupted") else 0


def show_plan(config: Config) -> None:
    """Print the group arithmetic and expected memory before anything large is loaded; the embedded
    model's are in the banner alone."""
    from flowgrpo import plan

    policy = config.policy
    if config.run.progress == "none" or plan.sizes_of(policy.model, policy.variant) is None:
        return
    gpus = int(os.environ.get("WORLD_SIZE", 1))
    for name, text in plan.plan_lines(config, plan.gpu_memory(), gpus).items():
        print(f"{name}: {text}")


def parse_train(argv: list[str]) -> Config:
    """Read the configuration that a `train` command line asks for."""
    named = bool(argv) and not argv[0].startswith("-")
    name, options = (argv[0], argv[1:]) if named else ("nano", argv)
    folder = option_value(options, "--run.resume")
    if folder == AUTO:
        # Whether there is a run to go on with is the first process's to say.
        folder = None
    if folder is not None:
        from flowgrpo.runs import directory

        base = directory.resume_config(folder)
        if named and name != base.recipe:
            raise ConfigError(
                f"the recipe is {name!r}, but the run in {folder} was started with "
                f"{base.recipe!r}; leave the recipe out."
            )
    else:
        base = recipe(name)
    sections = TrainOptions(base.policy, base.sample, base.reward, base.optim, base.run)
    sections = parse(
        TrainOptions,
        options,
        f"flowgrpo train {base.recipe}",
        sections,
        description=describe(base.recipe, base) or None,
    )
    if folder is not None and sections.run.out != base.run.out:
        raise ConfigError(
            f"run.out is {sections.run.out!r} with run.resume {folder!r}, but a run goes on in its "
            "own directory; leave --run.out out."
        )
    return Config(
        recipe=base.recipe,
        policy=sections.policy,
        sample=sections.sample,
        reward=sections.reward,
        optim=sections.optim,
        run=sections.run,
    )
