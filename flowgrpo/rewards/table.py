"""Rewards by name: functions of images, prompts and metadata -> one score per image.

    fn(images uint8 [B, 3, H, W], prompts list[str], metadata list[dict]) -> B scores

What is done with videos, and how a reward asks for them, is in frames.py.

A name is one of `REWARDS`, or "package.module:function" or "file.py:function" of the user's own.
The import happens in `load`, so no reward's dependencies are needed for another's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from flowgrpo.config.isolation import isolated
from flowgrpo.config.user_code import advice, import_function, split_target
from flowgrpo.config.validation import similar
from flowgrpo.rewards.interface import Reward, RewardError, check_arguments, describe_error

REWARDS = {
    "nano_strict": "flowgrpo.rewards.nano:strict",
    "nano_partial": "flowgrpo.rewards.nano:partial",
    "nano_classifier": "flowgrpo.rewards.nano:classifier",
    "aesthetic": "flowgrpo.rewards.aesthetic:score",
    "clipscore": "flowgrpo.rewards.clipscore:score",
    "deqa": "flowgrpo.rewards.remote.judges:deqa",
    "geneval": "flowgrpo.rewards.geneval.reward:partial",
    "geneval_strict": "flowgrpo.rewards.geneval.reward:strict",
    "hpsv2": "flowgrpo.rewards.hpsv2:score",
    "http": "flowgrpo.rewards.remote.http:score",
    "imagereward": "flowgrpo.rewards.imagereward:score",
    "jpeg_compressibility": "flowgrpo.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowgrpo.rewards.jpeg:incompressibility",
    "motion_smoothness": "flowgrpo.rewards.motion:smoothness",
    "ocr": "flowgrpo.rewards.ocr:score",
    "ocr_strict": "flowgrpo.rewards.ocr:strict",
    "pickscore": "flowgrpo.rewards.pickscore:score",
    "unifiedreward": "flowgrpo.rewards.remote.judges:unifiedreward",
}
"""Reward name -> "module:function"."""


def load(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Load the reward `name` with these options; an http:// or https:// address is a remote one,
    several with commas between them are servers of one.

    The same name and options give the same object, so what it loads is loaded once.
    """
    if is_address(name):
        from flowgrpo.rewards.remote.http import score

        return _configured(score, (("url", name), *sorted((options or {}).items())))
    target = REWARDS.get(name, name)
    module, function = split_target(target)
    if not module or not function:
        raise RewardError(
            f"reward {name!r} is unknown, but one of {', '.join(sorted(REWARDS))} or "
            f"package.module:function or file.py:function is expected{similar(name, REWARDS)}; "
            "name one of these."
        )
    if function.partition("/")[0].isdecimal():
        raise RewardError(
            f"reward {name!r} has a number in place of a function's name, but "
            "package.module:function or file.py:function is expected; write the address of a "
            f"server as http://{name}."
        )
    try:
        with isolated(f"reward {name!r}"):
            reward = import_function(target)
    # A module of the user's own may raise anything while it is imported, a script SystemExit.
    except (Exception, SystemExit) as error:
        missing = isinstance(error, ImportError | AttributeError | FileNotFoundError)
        raise RewardError(
            f"reward {name!r} cannot be loaded from {target} "
            f"({error if missing else describe_error(error)}); {advice(error)}."
        ) from error
    if (kind := _unusable(reward)) is not None:
        raise RewardError(
            f"reward {name!r} is {kind}, but a function is expected, which takes images, prompts "
            "and metadata and returns one score an image; write one around it."
        )
    check_arguments(reward, name)
    if not options:
        return reward
    if not hasattr(reward, "configured"):
        raise RewardError(
            f"reward {name!r} takes no options, but {', '.join(options)} is given in "
            "reward.options; leave it out."
        )
    return _configured(reward, tuple(sorted(options.items())))


def is_address(name: str) -> bool:
    """Tell whether a reward's name is the address of a remote one."""
    return name.lower().startswith(("http://", "https://"))


def is_users(name: str) -> bool:
    """Tell the user's own rewards from those of `REWARDS` and remote ones."""
    return name not in REWARDS and not is_address(name)


def is_remote(name: str, reward: Any) -> bool:
    """Tell a reward of this package that servers compute; a user's own may have any options."""
    return not is_users(name) and "url" in getattr(reward, "defaults", {})


def _unusable(reward: Any) -> str | None:
    """Describe what is no function of images; None for one."""
    if inspect.isclass(reward):
        return f"the class {reward.__name__}"
    if not callable(reward):
        return type(reward).__name__
    if inspect.iscoroutinefunction(reward) or inspect.iscoroutinefunction(type(reward).__call__):
        return "an async function"
    return None


def on_device(name: str, options: Mapping[str, Any], devices: Mapping[str, str]) -> dict[str, Any]:
    """Add the device of `reward.devices` to the options of a reward that has one and none given.

    Raises:
        RewardError: `devices` names the reward, and it has no device.
    """
    device = devices.get(name, devices.get("all"))
    if device is None or "device" in options:
        return dict(options)
    if "device" in getattr(load(name), "defaults", {}):
        return {**options, "device": device}
    if name in devices:
        raise RewardError(
            f"reward.devices has {name!r}, but that reward has no model whose device can be set; "
            "leave it out."
        )
    return dict(options)


@cache
def _configured(reward: Any, options: tuple[tuple[str, Any], ...]) -> Reward:
    return reward.configured(**dict(options))


def options_of(texts: Mapping[str, str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort the texts under NAME.OPTION by reward: reward name -> option -> text.

    Raises:
        RewardError: a key is not of that form, or its name is none of `names`.
    """
    options: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in texts.items():
        # From the right, since an address or a module has dots of its own.
        name, _, option = key.rpartition(".")
        if name not in options:
            raise RewardError(
                f"reward.options has {key!r}, but NAME.OPTION is expected with one of the rewards "
                f"of this run, {', '.join(options)}{similar(name, options)}; correct the name."
            )
        options[name][option] = value
    return options
