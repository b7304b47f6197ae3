"""The command line: ``flowgrpo train | evaluate | sample | serve-reward | doctor``.

A mistake of the user's is one sentence on stderr and exit code 2; a run that was stopped by Ctrl-C
and saved exits with 130, one whose output nobody reads any more with 141.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from flowgrpo import __version__
from flowgrpo.config import (
    Config,
    ConfigError,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
)
from flowgrpo.recipes import RECIPES, recipe

T = TypeVar("T")

FULL = (errno.ENOSPC, errno.EDQUOT)
USAGE = f"""flowgrpo {__version__}: Flow-GRPO, online RL for flow-matching text-to-image models

usage: flowgrpo train [RECIPE] [--section.field value ...]   train
       flowgrpo evaluate RUN_DIR [options]                   score a run against its base model
       flowgrpo evaluate MODEL --adapter DIR [options]       the same for any LoRA adapter
       flowgrpo sample PROMPT ... [options]                  write pictures
       flowgrpo serve-reward NAME [options]                  serve a reward by HTTP
       flowgrpo doctor                                       show what this machine offers

RECIPE is nano, or one of
{textwrap.fill(", ".join(sorted(set(RECIPES) - {"nano"})), 96, break_on_hyphens=False)}

flowgrpo COMMAND --help lists the options of a command.
"""


@dataclass(frozen=True)
class Sections:
    """Train by the recipe; every option is a field of the configuration."""

    policy: PolicyConfig
    sample: SampleConfig
    reward: RewardConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a trained model against its base on held-out prompts, with the same seeds."""

    target: Annotated[str, tyro.conf.Positional]
    """Run directory, checkpoint folder, a recipe's name, or a model (folder or Hub id)."""
    adapter: str | None = None
    """LoRA weights in diffusers' format to compare with a recipe's or a bare model."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint of a run directory: the newest, or the one with the best accuracy."""
    rewards: tuple[str, ...] = ()
    """Rewards to report, the first as the accuracy; default: as in training."""
    reward_options: dict[str, str] = field(default_factory=dict)
    """Options of rewards: NAME.OPTION VALUE."""
    prompt_set: str | None = None
    """Prompt set; default: as in training."""
    split: str = "heldout"
    """Part of the prompt set: heldout or train; of nano also tune."""
    prompts: int | None = None
    """Number of prompts; 0: all; default: as in training."""
    samples: int | None = None
    """Images for each prompt; default: as in training."""
    steps: int | None = None
    """Sampling steps; default: as in training, or 40."""
    cfg: float | None = None
    """Guidance scale of all images; default: as in training, or none."""
    guidance: float = 1.0
    """Also evaluate the base model with this guidance scale; 1: do not."""
    resolution: int | None = None
    """Pixels on each side; default: as in training, or the model's own."""
    batch_size: int | None = None
    """Rows of one forward; default: as in training, or 8."""
    out: str | None = None
    """Folder for report.json and grid.png; default: evaluation in the run directory."""
    device: str = "auto"
    """Torch device."""


@dataclass(frozen=True)
class Sample:
    """Write pictures of prompts, by the deterministic sampler."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Prompts, each in quotation marks."""
    run: str | None = None
    """Run directory or checkpoint: shows the base model's images above the trained model's."""
    model: str = "nano"
    """Model to sample from without --run: "nano", a folder or a Hub id."""
    adapter: str | None = None
    """LoRA weights in diffusers' format for --model, shown below the base model's images."""
    out: str = "sample.png"
    """The picture to write."""
    count: int = 4
    """Images for each prompt."""
    steps: int | None = None
    """Sampling steps; default: the run's for evaluation, or 40."""
    guidance: float | None = None
    """Classifier-free guidance scale, 1: none; default: the run's, or 1."""
    resolution: int | None = None
    """Pixels on each side; default: the run's, or the model's own."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """Torch device."""


@dataclass(frozen=True)
class Serve:
    """Serve a reward by HTTP, for `--reward.weights http://HOST:PORT 1.0` on another machine."""

    name: Annotated[str, tyro.conf.Positional]
    """A reward's name, or package.module:function."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback only with a token."""
    port: int = 8400
    """Port to listen on."""
    token: str | None = None
    """Bearer token that callers must send; default: the variable FLOWGRPO_SERVE_TOKEN."""


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    commands: dict[str, Callable[[list[str]], int]] = {
        "train": train,
        "evaluate": evaluate,
        "sample": sample,
        "serve-reward": serve_reward,
        "doctor": doctor,
    }
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE, end="")
            return 0 if argv else 2
        if argv[0] == "--version":
            print(__version__)
            return 0
        if argv[0] not in commands:
            raise ConfigError(
                f"{argv[0]!r} is no command, but one of {', '.join(commands)} is expected; see "
                "flowgrpo --help."
            )
        _quiet()
        # So that my_rewards.py in the working directory is found; last, so that it shadows nothing.
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        return commands[argv[0]](argv[1:])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # Who read the output, such as `| head`, has enough. What is left of it is written when
        # Python ends, and would fail once more.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("aborted", file=sys.stderr)
        return 130


def train(argv: list[str]) -> int:
    """``flowgrpo train [RECIPE] [--section.field value ...]``"""
    config = parse_train(argv)
    from flowgrpo import train as training
    from flowgrpo.runs import directory, loggers, monitor

    directory.check_directory(config)
    loggers.check(config)
    show_plan(config)
    try:
        summary = training.run(config)
    except (training.RatioError, monitor.DivergedError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    # safetensors has an error of its own for a disk that is full.
    except Exception as error:
        if getattr(error, "errno", None) not in FULL and "No space left" not in str(error):
            raise
        print(
            f"error: the disk of run.out {str(config.out_dir)!r} is full ({error}); free some "
            f"space and go on with --run.resume {config.out_dir}.",
            file=sys.stderr,
        )
        return 1
    return 130 if summary.get("interrupted") else 0


def show_plan(config: Config) -> None:
    """Print the group arithmetic and expected memory before anything large is loaded; the embedded
    model's are in the banner alone."""
    from flowgrpo import plan

    if config.run.progress == "none" or plan.architecture(config.policy.model) is None:
        return
    for name, text in plan.plan(config, plan.gpu_memory()).items():
        print(f"{name}: {text}")


def parse_train(argv: list[str]) -> Config:
    """The configuration that a `train` command line asks for."""
    named = bool(argv) and not argv[0].startswith("-")
    name, options = (argv[0], argv[1:]) if named else ("nano", argv)
    folder = _option(options, "--run.resume")
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
    sections = Sections(base.policy, base.sample, base.reward, base.optim, base.run)
    given = parse(Sections, options, f"flowgrpo train {base.recipe}", sections)
    if folder is not None and given.run.out != base.run.out:
        raise ConfigError(
            f"run.out is {given.run.out!r} with run.resume {folder!r}, but a run goes on in its "
            "own directory; leave --run.out out."
        )
    return Config(base.recipe, given.policy, given.sample, given.reward, given.optim, given.run)


def parse(cls: type[T], argv: list[str], prog: str, default: Any = None) -> T:
    """Parse `argv` by tyro. A ConfigError that a field raised comes out as it is; tyro prints its
    own errors and exits with 2."""
    arguments: dict[str, Any] = {"args": argv, "prog": prog, "registry": _registry()}
    if default is not None:
        arguments["default"] = default
    # Quietly first, because tyro would print a ConfigError's sentence in a box.
    unseen = io.StringIO()
    try:
        with contextlib.redirect_stdout(unseen), contextlib.redirect_stderr(unseen):
            return tyro.cli(cls, **arguments)
    except SystemExit as stop:
        for error in _chain(stop):
            if isinstance(error, ConfigError):
                raise error from None
    return tyro.cli(cls, **arguments)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _registry() -> tyro.constructors.ConstructorRegistry:
    """Reads dict[str, float] as NAME WEIGHT NAME WEIGHT ..., and dict[str, str] in the same way;
    tyro fixes a default's keys."""
    registry = tyro.constructors.ConstructorRegistry()

    def once(names: list[str]) -> None:
        twice = [name for place, name in enumerate(names) if name in names[:place]]
        if twice:
            raise ConfigError(f"{twice[0]!r} is given twice, but once is expected; leave one out.")

    def weights(words: list[str]) -> dict[str, float]:
        once(words[::2])
        try:
            pairs = zip(words[::2], map(float, words[1::2]), strict=True)
            return dict(pairs)
        except ValueError as error:
            raise ConfigError(
                f"the weights are {' '.join(words)!r}, but NAME WEIGHT, repeated, is expected; "
                "write, for example, nano_strict 0.5 nano_partial 0.5."
            ) from error

    def options(words: list[str]) -> dict[str, str]:
        if len(words) % 2:
            raise ConfigError(
                f"the options are {' '.join(words)!r}, but NAME.OPTION VALUE, repeated, is "
                "expected; write, for example, geneval.batch_size 16."
            )
        once(words[::2])
        return dict(zip(words[::2], words[1::2], strict=True))

    readers = {
        dict[str, float]: ("NAME WEIGHT ...", weights),
        dict[str, str]: ("NAME.OPTION VALUE ...", options),
    }

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        if info.type not in readers:
            return None
        metavar, read = readers[info.type]
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar=metavar,
            instance_from_str=read,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [w for pair in value.items() for w in map(str, pair)],
        )

    return registry


def _option(argv: list[str], name: str) -> str | None:
    """The value of `name VALUE` or `name=VALUE`, or None."""
    for place, word in enumerate(argv):
        if word == name and place + 1 < len(argv):
            return argv[place + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None


def evaluate(argv: list[str]) -> int:
    """``flowgrpo evaluate RUN_DIR``"""
    options = parse(Evaluate, argv, "flowgrpo evaluate")
    from flowgrpo.cli import commands as cli_commands

    cli_commands.evaluate_run(options)
    return 0


def sample(argv: list[str]) -> int:
    """``flowgrpo sample PROMPT ...``"""
    options = parse(Sample, argv, "flowgrpo sample")
    from flowgrpo.cli import commands as cli_commands

    cli_commands.sample_pictures(options)
    return 0


def serve_reward(argv: list[str]) -> int:
    """``flowgrpo serve-reward NAME [--host --port --token]``"""
    given = parse(Serve, argv, "flowgrpo serve-reward")
    from flowgrpo.rewards.serve import serve

    serve(given.name, given.host, given.port, given.token)
    return 0


def doctor(argv: list[str]) -> int:
    """``flowgrpo doctor``"""
    if argv and argv[0] not in ("-h", "--help"):
        raise ConfigError(f"doctor takes no options, but {argv[0]!r} was given; leave it out.")
    if argv:
        print(
            "usage: flowgrpo doctor\n\nShow versions, devices, backends, and what is off and why."
        )
        return 0
    from flowgrpo.cli.doctor import doctor as examine

    examine()
    return 0


def _quiet() -> None:
    """Keep the libraries' notices and loading bars out of the output; downloads still show."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")
