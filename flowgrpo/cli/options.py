"""Options of the commands, and how a command line is read."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import tyro

from flowgrpo.config import (
    ConfigError,
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
)
from flowgrpo.config.validation import path_text, settle_paths
from flowgrpo.curation.options import Thresholds

T = TypeVar("T")


@dataclass(frozen=True)
class TrainOptions:
    """Train by the recipe; every option is a field of the configuration."""

    policy: PolicyConfig
    sample: SampleConfig
    reward: RewardConfig
    optim: OptimConfig
    run: RunConfig


@dataclass(frozen=True)
class EvaluateOptions:
    """Evaluate a trained model against its base on held-out prompts, with the same seeds; or
    pictures of other systems (--images); or put evaluations into one table (--table)."""

    target: Annotated[str, tyro.conf.Positional] = ""
    """Run directory, checkpoint folder, recipe, or model (folder or Hub id); none with --images."""
    images: tuple[str, ...] = ()
    """Pictures that other systems made, a row each: folders in GenEval's layout, or JSONL files."""
    quality_images: tuple[str, ...] = ()
    """With --images: each system's pictures of the quality prompts; default: the same pictures."""
    label: tuple[str, ...] = ()
    """Names of the rows of --images or --table; default: names of the folders, or as they are."""
    skip_unreadable: bool = False
    """Leave out pictures that are missing or cannot be read; they are named and counted."""
    table: tuple[str, ...] = ()
    """Folders of evaluations, or their evaluation.json: one table of all their rows."""
    adapter: str | None = None
    """LoRA weights in diffusers' or PEFT's format, to compare with a recipe's or a bare model: a
    file, a folder, or OWNER/NAME, OWNER/NAME/FOLDER, OWNER/NAME@REVISION on the Hub."""
    model: str | None = None
    """Where the model of a run or recipe is now: a folder or a Hub id; default: where it was."""
    checkpoint: Literal["last", "best"] = "last"
    """Which checkpoint of a run directory: the newest, or the one with the best accuracy."""
    rewards: tuple[str, ...] = ()
    """Rewards to report, the first as the accuracy; default: as in training."""
    reward_options: dict[str, str] = field(default_factory=dict)
    """Options of rewards: NAME.OPTION VALUE."""
    quality: tuple[str, ...] = ()
    """Rewards on prompts of their own: "paper", which are the five of its table, or names."""
    quality_prompts: str = "general"
    """Prompt set of --quality: as sample.prompts, a file such as DrawBench's, or hub:OWNER/NAME."""
    quality_samples: int = 1
    """Images for each quality prompt."""
    prompt_set: str | None = None
    """Prompt set; default: as in training."""
    split: str = "heldout"
    """Part of the prompt set: heldout or train; of nano and nano_text also tune."""
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
    height: int | None = None
    """Pixels from top to bottom; default: --resolution, or as in training."""
    width: int | None = None
    """Pixels from left to right; default: --resolution, or as in training."""
    frames: int | None = None
    """Frames of a video; default: as in training, or the model's own."""
    batch_size: int | None = None
    """Rows of one forward; default: as in training, or 8. With --images: pictures at once, 16."""
    out: str | None = None
    """Folder for the results; default: in the run's, or runs/images/evaluation; --table: none."""
    variant: str | None = None
    """Which of the model's files, such as fp16; default: the run's, or those without a variant."""
    quantize: Literal["none", "nf4", "int8", "fp8"] | None = None
    """Bits of the transformer's frozen weights; default: the run's, or none."""
    device: str = "auto"
    """Torch device; with --images, that of the rewards."""

    def __post_init__(self) -> None:
        settle_paths(self, "target", "adapter", "prompt_set", "quality_prompts", "out")
        for name in ("images", "quality_images", "table"):
            object.__setattr__(self, name, tuple(map(path_text, getattr(self, name))))


@dataclass(frozen=True)
class SampleOptions:
    """Write pictures of prompts, by the deterministic sampler."""

    prompts: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Prompts, each in quotation marks."""
    run: str | None = None
    """Run directory or checkpoint: images of the base, of its initial adapter, and trained."""
    model: str | None = None
    """Model: "nano", "nano_text", a folder or a Hub id; default: nano, or with --run where the
    run's was."""
    adapter: str | None = None
    """LoRA weights in diffusers' or PEFT's format for --model, shown below the base's images."""
    image: str | None = None
    """Picture that a model which edits, such as FLUX.1-Kontext, changes as each prompt says."""
    out: str = "sample.png"
    """The picture to write: .png, .jpg or .jpeg; videos are written beside it, as .webp."""
    count: int = 4
    """Images for each prompt."""
    steps: int | None = None
    """Sampling steps; default: the run's for evaluation, or 40."""
    guidance: float | None = None
    """Classifier-free guidance scale, 1: none; default: the run's, or 1."""
    resolution: int | None = None
    """Pixels on each side; default: the run's, or the model's own."""
    height: int | None = None
    """Pixels from top to bottom; default: --resolution, or the run's."""
    width: int | None = None
    """Pixels from left to right; default: --resolution, or the run's."""
    frames: int | None = None
    """Frames of a video; default: the run's, or the model's own."""
    seed: int = 0
    """Seed of the noise."""
    variant: str | None = None
    """Which of the model's files, such as fp16; default: the run's, or those without a variant."""
    quantize: Literal["none", "nf4", "int8", "fp8"] | None = None
    """Bits of the transformer's frozen weights; default: the run's, or none."""
    device: str = "auto"
    """Torch device."""

    def __post_init__(self) -> None:
        settle_paths(self, "run", "model", "adapter", "image", "out")


@dataclass(frozen=True)
class ServeOptions:
    """Serve a reward by HTTP, for `--reward.weights http://HOST:PORT 1.0` on another machine."""

    name: Annotated[str, tyro.conf.Positional]
    """A reward's name, package.module:function or file.py:function."""
    host: str = "127.0.0.1"
    """Address to listen on; other than loopback only with a token."""
    port: int = 8400
    """Port to listen on."""
    token: str | None = None
    """Bearer token that callers must send; default: the variable FLOWGRPO_SERVE_TOKEN."""


@dataclass(frozen=True)
class CompareOptions:
    """Compare the arms of a study; fields of the configuration are changed in all arms."""

    study: Annotated[str, tyro.conf.Positional]
    """A shipped study (methods, kl, steps, scouts), or a .yaml or .json file."""
    arms: tuple[str, ...] = ()
    """Labels of the arms to compare; default: all."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training; each arm is trained once with each."""
    out: str | None = None
    """Folder of runs, tables and picture, with which it goes on; default: runs/compare-STUDY."""
    jobs: int | Literal["auto"] = "auto"
    """Runs at once; auto: one a GPU, or one a CPU core where memory allows."""
    images: int | None = None
    """Images that each run trains on, in place of the study's budget."""
    seconds: float | None = None
    """Seconds of training of each run, in place of the study's budget; with --images both."""
    report: bool = False
    """Only write tables and picture of the runs that are there."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        settle_paths(self, "out")


def parse(
    cls: type[T], argv: list[str], prog: str, default: Any = None, description: str | None = None
) -> T:
    """Parse `argv` by tyro. A ConfigError that a field raised comes out as it is; tyro prints its
    own errors and exits with 2.

    description: what the help says, in place of the class's docstring.
    """
    arguments: dict[str, Any] = {"args": argv, "prog": prog, "registry": _registry()}
    arguments["description"] = description
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
    """Read dict[str, float] as NAME WEIGHT NAME WEIGHT ..., dict[str, str] and `Thresholds` in the
    same way; by itself tyro fixes a default's keys."""
    registry = tyro.constructors.ConstructorRegistry()

    def check_unique(names: list[str]) -> None:
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise ConfigError(f"{twice[0]!r} is given twice, but once is expected; leave one out.")

    def weights(words: list[str]) -> dict[str, float]:
        check_unique(words[::2])
        try:
            pairs = zip(words[::2], map(float, words[1::2]), strict=True)
            return dict(pairs)
        except ValueError as error:
            raise ConfigError(
                f"the weights are {' '.join(words)!r}, but NAME WEIGHT, repeated, is expected; "
                "write, for example, nano_strict 0.5 nano_partial 0.5."
            ) from error

    def thresholds(words: list[str]) -> Thresholds:
        check_unique(words[::2])
        try:
            pairs = zip(words[::2], map(float, words[1::2]), strict=True)
            return Thresholds(pairs)
        except ValueError as error:
            raise ConfigError(
                f"the thresholds are {' '.join(words)!r}, but NAME NUMBER, repeated, is expected; "
                "write, for example, --min aesthetic 5.5."
            ) from error

    def options(words: list[str]) -> dict[str, str]:
        if len(words) % 2:
            raise ConfigError(
                f"the options are {' '.join(words)!r}, but NAME.OPTION VALUE, repeated, is "
                "expected; write, for example, geneval.batch_size 16."
            )
        check_unique(words[::2])
        return dict(zip(words[::2], words[1::2], strict=True))

    readers = {
        dict[str, float]: ("NAME WEIGHT ...", weights),
        dict[str, str]: ("NAME.OPTION VALUE ...", options),
        Thresholds: ("NAME NUMBER ...", thresholds),
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


def gather(argv: list[str], *names: str) -> list[str]:
    """Write a repeated option as one: --images A --images B as --images A B, at its first place."""
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    current = None
    for word in argv:
        name, equals, value = word.partition("=")
        option = name.replace("_", "-")
        if option in names:
            if option not in values:
                rest.append(option)
            current = values.setdefault(option, [])
            if equals:
                current.append(value)
                current = None
        elif word.startswith("-") or current is None:
            current = None
            rest.append(word)
        else:
            current.append(word)
    return [word for name in rest for word in (name, *values.get(name, ()))]


def option_value(argv: list[str], name: str) -> str | None:
    """Find the value of `name VALUE` or `name=VALUE` in `argv`, or None."""
    for number, word in enumerate(argv):
        if word == name and number + 1 < len(argv):
            return argv[number + 1]
        if word.startswith(f"{name}="):
            return word.partition("=")[2]
    return None
