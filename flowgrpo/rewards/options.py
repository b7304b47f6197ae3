"""Options of rewards: keyword arguments, environment variables, defaults.

A reward that needs options is written as a function of them that returns the reward:

    @configurable("pickscore")
    def score(*, model: str = "yuvalkirstain/PickScore_v1", batch_size: int = 32):
        ...load the model...
        return lambda images, prompts, metadata: ...

`score` is then itself a reward: the function above runs on the first call, once, so naming a reward
loads nothing. `score.configured(model="/models/pick")` is the same reward with other options, as
`--reward.options pickscore.model /models/pick` makes it. What is not given so comes from the
environment, FLOWGRPO_REWARD_PICKSCORE_MODEL, or else is the default.
"""

from __future__ import annotations

import importlib
import inspect
import math
import os
import threading
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowgrpo.config.user_code import is_installed
from flowgrpo.config.validation import similar
from flowgrpo.rewards.images import check_images, check_videos
from flowgrpo.rewards.interface import Reward, RewardError, check_arguments

FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
"""Spellings of a bool option, in lower case."""

TEXTUAL = (bool, int, float, str)
"""Types of options that text becomes; paths too."""

Check = Callable[[str, Mapping[str, Any]], Any]
"""A function of a prompt and its metadata that raises RewardError for one it cannot judge."""


class ConfigurableReward:
    """A reward that is built on its first call, from the options that hold by then."""

    def __init__(
        self,
        name: str,
        build: Callable[..., Reward],
        options: Mapping[str, Any] | None = None,
        check: Check | None = None,
        frames: bool | str = False,
    ) -> None:
        """frames: True for a reward of videos, or the name of the option that says so."""
        for parameter in inspect.signature(build).parameters.values():
            named = parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
            if not named or parameter.default is parameter.empty:
                raise RewardError(
                    f"the options of reward {name!r} have the parameter {parameter}, but options "
                    "with a name and a default are expected; give it a default."
                )
        self.name, self.check, self._frames = name, check, frames
        self.__doc__ = build.__doc__
        self._build, self._explicit = build, dict(options or {})
        self._reward: Reward | None = None
        self._lock = threading.Lock()

    @property
    def defaults(self) -> dict[str, Any]:
        """Option name -> default."""
        return {p.name: p.default for p in inspect.signature(self._build).parameters.values()}

    @property
    def options(self) -> dict[str, Any]:
        """Option name -> its present value: explicit, of the environment, or the default."""
        return {option: self._value(option, default) for option, default in self.defaults.items()}

    @property
    def frames(self) -> bool:
        """True: it is given videos, uint8 [B, F, 3, H, W]."""
        if isinstance(self._frames, str):
            return self._value(self._frames, self.defaults[self._frames])
        return self._frames

    def configured(self, **options: Any) -> ConfigurableReward:
        """Return the same reward with these options.

        Text becomes a number, or one of `FLAGS`, where such a value is expected.

        Raises:
            RewardError: an option is unknown, or its value has a wrong type.
        """
        for option, value in options.items():
            if option not in self.defaults:
                raise RewardError(
                    f"reward {self.name!r} has no option {option!r}, but one of "
                    f"{', '.join(self.defaults)} is expected{similar(option, self.defaults)}; "
                    "correct the name."
                )
            options[option] = self._typed(
                f"the option {option} of reward {self.name!r}", option, value
            )
        options = {**self._explicit, **options}
        return ConfigurableReward(self.name, self._build, options, self.check, self._frames)

    def build(self) -> Reward:
        """Load what the reward needs; a second call changes nothing.

        Raises:
            RewardError: the function of options returns no function.
        """
        with self._lock:
            if self._reward is None:
                reward = self._build(**self.options)
                if not callable(reward):
                    raise RewardError(
                        f"the options of reward {self.name!r} made a {type(reward).__name__}, but "
                        "a function of images, prompts and metadata is expected; return one."
                    )
                check_arguments(reward, self.name)
                self._reward = reward
            return self._reward

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Any:
        """Score images, uint8 [B, 3, H, W], or with `frames` videos, by B numbers."""
        (check_videos if self.frames else check_images)(images, prompts, metadata)
        return self.build()(images, prompts, metadata)

    def _value(self, option: str, default: Any) -> Any:
        if option in self._explicit:
            return self._explicit[option]
        variable = f"FLOWGRPO_REWARD_{self.name}_{option}".upper()
        text = os.environ.get(variable)
        return default if text is None else self._typed(variable, option, text)

    def _typed(self, what: str, option: str, value: Any) -> Any:
        """Convert `value` to the type of the option's default, or raise."""
        default = self.defaults[option]
        if value is default:
            return value
        kind = str if default is None else type(default)
        if kind is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        try:
            typed = _convert(value, kind) if isinstance(value, str) else value
        except (TypeError, ValueError):
            typed = None
        # An int is a float too, a bool is neither.
        is_bool = isinstance(typed, bool)
        if is_bool != (kind is bool) or not isinstance(
            typed, (float, int) if kind is float else kind
        ):
            expected = (
                f"one of {', '.join(FLAGS)}" if kind is bool else f"a value of type {kind.__name__}"
            )
            if kind not in TEXTUAL and isinstance(value, str):
                expected += ", which no text becomes,"
            raise RewardError(f"{what} is {value!r}, but {expected} is expected; correct it.")
        return typed


def _convert(text: str, kind: type) -> Any:
    """Convert the text of an option to `kind`; None for a bool in none of the `FLAGS`, and for what
    text becomes by itself, letter by letter, such as a list."""
    if kind is bool:
        return FLAGS.get(text.strip().lower())
    return kind(text) if kind in TEXTUAL or issubclass(kind, os.PathLike) else None


def configurable(
    name: str, check: Check | None = None, frames: bool | str = False
) -> Callable[[Callable[..., Reward]], ConfigurableReward]:
    """Decorate a function of options that returns a reward: it becomes a `ConfigurableReward`.

    check: called with the prompts of a run before its first image. frames: True for a reward of
    videos, or the name of the bool option that says so.
    """
    return lambda build: ConfigurableReward(name, build, check=check, frames=frames)


def check_numbers(
    reward: str, positive: Mapping[str, float], zero: Mapping[str, float] | None = None
) -> None:
    """Raise RewardError unless the options of `positive` are finite and > 0, of `zero` >= 0."""
    for options, rule in ((positive, "greater than 0"), (zero or {}, "at least 0")):
        for option, value in options.items():
            # Written so that NaN fails it as well.
            if not 0 <= value < math.inf or (value == 0 and options is positive):
                raise RewardError(
                    f"the option {option} of reward {reward!r} is {value}, but it must be {rule}; "
                    "change it."
                )


def library(module: str, reward: str, install: str | None = None) -> Any:
    """Import a module, or raise a RewardError that says what to install."""
    try:
        if not is_installed(module.partition(".")[0]):
            raise ModuleNotFoundError(f"No module named {module!r}")
        return importlib.import_module(module)
    except ImportError as error:
        raise RewardError(
            f"reward {reward!r} needs the library {module}, which cannot be imported ({error}); "
            f"run pip install {install or chr(39) + 'flowgrpo[rewards]' + chr(39)}."
        ) from error
