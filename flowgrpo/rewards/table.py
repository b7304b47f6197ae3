"""Rewards by name: functions of images, prompts and metadata -> one score per image.

    fn(images uint8 [B, 3, H, W], prompts list[str], metadata list[dict]) -> B scores

A name is one of `REWARDS`, or "package.module:function" of the user's own. The import happens in
`load`, so no reward's dependencies are needed for another's.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from flowgrpo.config.validation import similar
from flowgrpo.rewards.interface import Reward, RewardError, describe_error

REWARDS = {
    "nano_strict": "flowgrpo.rewards.nano:strict",
    "nano_partial": "flowgrpo.rewards.nano:partial",
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
    "ocr": "flowgrpo.rewards.ocr:score",
    "pickscore": "flowgrpo.rewards.pickscore:score",
    "unifiedreward": "flowgrpo.rewards.remote.judges:unifiedreward",
}
"""Reward name -> "module:function"."""


def load(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """Load the reward `name` with these options; an http:// or https:// address is a remote one.

    The same name and options give the same object, so what it loads is loaded once.
    """
    if name.startswith(("http://", "https://")):
        from flowgrpo.rewards.remote.http import score

        return _configured(score, (("url", name), *sorted((options or {}).items())))
    target = REWARDS.get(name, name)
    module, _, function = target.partition(":")
    if not module or not function:
        raise RewardError(
            f"reward {name!r} is unknown, but one of {', '.join(sorted(REWARDS))} or "
            f"package.module:function is expected{similar(name, REWARDS)}; name one of these."
        )
    try:
        reward = getattr(importlib.import_module(module), function)
    # A module of the user's own may raise anything while it is imported.
    except Exception as error:
        missing = isinstance(error, ImportError | AttributeError)
        raise RewardError(
            f"reward {name!r} cannot be loaded from {target} "
            f"({error if missing else describe_error(error)}); check the name, or install what it "
            "needs."
        ) from error
    if not callable(reward):
        kind = type(reward).__name__
        raise RewardError(f"reward {name!r} is {kind}, but a function is expected.")
    if not options:
        return reward
    if not hasattr(reward, "configured"):
        raise RewardError(
            f"reward {name!r} takes no options, but {', '.join(options)} is given in "
            "reward.options; leave it out."
        )
    return _configured(reward, tuple(sorted(options.items())))


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
