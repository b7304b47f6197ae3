"""Rewards are functions: images, prompts, metadata -> one score an image.

    fn(images uint8 [B, 3, H, W], prompts list[str], metadata list[dict]) -> B scores

A name is one of `REWARDS`, or "package.module:function" of the user's own. The import happens in
`load`, so no reward's dependencies are needed for another's.

`Scorer` is the weighted sum of several. A reward that raises or returns scores that are not finite
is asked again, group by group; a group that fails every time is dropped and counted, never scored 0
in silence. A wrong number of scores is a mistake that no repetition mends, and raises.

Rewards live on different scales (PickScore differs by hundredths within a group, an aesthetic score
by halves), so a plain sum is ruled by the one that varies most. `normalize` brings them together
before the weights, with s the scores of one reward, [K, G], and only rows that are kept:

    std      s / sqrt(mean_k var_g(s))         its std inside the groups; how a prompt's groups
                                               differ plays no part, as advantages have none of it
    group    (s - mean_g s) / std_g(s)         GDPO (arXiv 2601.05242), and MixGRPO's advantage_aggr

After "group" a reward counts the same in every group, however little it varies there.
"""

from __future__ import annotations

import importlib
import logging
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo.config import ConfigError, RewardConfig
from flowgrpo.config.validation import similar
from flowgrpo.records import Prompts, Scores

log = logging.getLogger("flowgrpo")

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]

REWARDS = {
    "nano_strict": "flowgrpo.rewards.nano:strict",
    "nano_partial": "flowgrpo.rewards.nano:partial",
    "aesthetic": "flowgrpo.rewards.aesthetic:score",
    "clipscore": "flowgrpo.rewards.clipscore:score",
    "deqa": "flowgrpo.rewards.judges:deqa",
    "geneval": "flowgrpo.rewards.geneval:partial",
    "geneval_strict": "flowgrpo.rewards.geneval:strict",
    "hpsv2": "flowgrpo.rewards.hpsv2:score",
    "http": "flowgrpo.rewards.http:score",
    "imagereward": "flowgrpo.rewards.imagereward:score",
    "jpeg_compressibility": "flowgrpo.rewards.jpeg:compressibility",
    "jpeg_incompressibility": "flowgrpo.rewards.jpeg:incompressibility",
    "ocr": "flowgrpo.rewards.ocr:score",
    "pickscore": "flowgrpo.rewards.pickscore:score",
    "unifiedreward": "flowgrpo.rewards.judges:unifiedreward",
}
"""Reward name -> "module:function"."""


EPS = 1e-8
"""Added to a std before it divides: a reward that is the same everywhere stays finite."""


class RewardError(ConfigError):
    """A reward cannot be used: it is unknown, misbehaves, or failed for every group."""


def load(name: str, options: Mapping[str, Any] | None = None) -> Reward:
    """The reward called `name`, with these options; an http:// or https:// address is a remote one.

    The same name and options give the same object, so what it loads is loaded once.
    """
    if name.startswith(("http://", "https://")):
        from flowgrpo.rewards.http import score

        return _configured(score, (("url", name), *sorted((options or {}).items())))
    target = REWARDS.get(name, name)
    module, _, function = target.partition(":")
    if not module or not function:
        raise RewardError(
            f"reward {name!r} is unknown, but one of {', '.join(sorted(REWARDS))} or "
            f"package.module:function is expected{similar(name, REWARDS)}; name one of these."
        )
    try:
        found = getattr(importlib.import_module(module), function)
    # A module of the user's own may raise anything while it is imported.
    except Exception as error:
        missing = isinstance(error, ImportError | AttributeError)
        raise RewardError(
            f"reward {name!r} cannot be loaded from {target} "
            f"({error if missing else _told(error)}); check the name, or install what it needs."
        ) from error
    if not callable(found):
        raise RewardError(f"reward {name!r} is {type(found).__name__}, but a function is expected.")
    if not options:
        return found
    if not hasattr(found, "configured"):
        raise RewardError(
            f"reward {name!r} takes no options, but {', '.join(options)} is given in "
            "reward.options; leave it out."
        )
    return _configured(found, tuple(sorted(options.items())))


@cache
def _configured(reward: Any, options: tuple[tuple[str, Any], ...]) -> Reward:
    return reward.configured(**dict(options))


def options_of(given: Mapping[str, str], names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Reward name -> option -> text, from texts under NAME.OPTION.

    Raises:
        RewardError: a key is not of that form, or its name is none of `names`.
    """
    found: dict[str, dict[str, str]] = {name: {} for name in names}
    for key, value in given.items():
        # From the right, since an address or a module has dots of its own.
        name, _, option = key.rpartition(".")
        if name not in found:
            raise RewardError(
                f"reward.options has {key!r}, but NAME.OPTION is expected with one of the rewards "
                f"of this run, {', '.join(found)}{similar(name, found)}; correct the name."
            )
        found[name][option] = value
    return found


class Scorer:
    """The weighted sum of rewards over K groups of images."""

    def __init__(
        self,
        weights: Mapping[str, float],
        retries: int = 2,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        timeout: float = 0.0,
        normalize: str = "none",
    ) -> None:
        """options: reward name -> its options. timeout: of the rewards that have one; 0: theirs."""
        self.weights = dict(weights)
        self.retries, self.normalize = retries, normalize
        self.rewards = {}
        for name in self.weights:
            own = dict((options or {}).get(name, {}))
            if timeout and "timeout" in getattr(load(name), "defaults", {}):
                own.setdefault("timeout", timeout)
            self.rewards[name] = load(name, own)
        self.problems: dict[str, str] = {}
        """Why each reward failed last."""

    @classmethod
    def of(cls, config: RewardConfig, reported: Iterable[str] = ()) -> Scorer:
        """The rewards that `config` trains with; or those `reported`, each by itself."""
        weights = dict.fromkeys(reported, 1.0) or config.weights
        names = dict.fromkeys((*config.weights, *config.report, *weights))
        return cls(
            weights,
            config.retries,
            options=options_of(config.options, names),
            timeout=config.timeout,
            normalize=config.normalize,
        )

    def prepare(self, prompts: Prompts) -> None:
        """Find out before the first image what cannot work: look at the prompts, load what the
        rewards need, call remote ones.

        Raises:
            RewardError: a reward cannot judge images of a prompt; or a model, a library or a
                server is missing.
        """
        for reward in self.rewards.values():
            check = getattr(reward, "check", None)
            if check is not None:
                for text, entry in zip(prompts.texts, prompts.metadata, strict=True):
                    check(text, entry)
        for reward in self.rewards.values():
            if hasattr(reward, "build"):
                reach = getattr(reward.build(), "reach", None)
                if reach is not None:
                    reach()

    def __call__(self, images: Tensor, prompts: Prompts, group_size: int) -> Scores:
        """Score K * G images, G for each of the K prompts in turn.

        Raises:
            RewardError: a reward returned a wrong number of scores, or failed for every group.
        """
        return self.combine(self.parts(images, prompts, group_size), group_size)

    def parts(self, images: Tensor, prompts: Prompts, group_size: int) -> dict[str, Tensor]:
        """float64 scores of each reward for some of the groups, NaN in those that failed.

        Raises:
            RewardError: a reward returned a wrong number of scores.
        """
        return {name: self._all_groups(name, images, prompts, group_size) for name in self.weights}

    def combine(self, parts: dict[str, Tensor], group_size: int) -> Scores:
        """The weighted sum over all groups, from what `parts` returned for them in turn.

        Raises:
            RewardError: a reward failed for every group.
        """
        for name, scores in parts.items():
            if len(_failed(scores, group_size)) * group_size == len(scores):
                raise RewardError(
                    f"reward {name!r} failed for all {len(scores) // group_size} groups after "
                    f"{self.retries} retries ({self.problems[name]}), but {len(scores)} finite "
                    "scores are expected; mend it."
                )
        kept = torch.stack(list(parts.values())).isfinite().all(dim=0)
        kept = kept.view(-1, group_size).all(dim=1)
        total = sum(
            weight * normalized(parts[name].view(-1, group_size), kept, self.normalize).flatten()
            for name, weight in self.weights.items()
        )
        dropped = total.isnan().view(-1, group_size).any(dim=1)
        total = total.masked_fill(dropped.repeat_interleave(group_size), torch.nan)
        return Scores(total, parts, dropped)

    def _all_groups(self, name: str, images: Tensor, prompts: Prompts, group_size: int) -> Tensor:
        """float64 [B] scores of one reward, NaN in the groups that failed every attempt."""
        scores = torch.full((len(images),), torch.nan, dtype=torch.float64)
        problems = ["it returned scores that are not finite"]

        def attempt(rows: slice, these: Prompts) -> None:
            try:
                scores[rows] = _call(self.rewards[name], name, images[rows], these, group_size)
            except RewardError:
                raise
            # A reward is the user's code or a remote service: anything may come out of it.
            except Exception as error:
                problems.append(_told(error))

        attempt(slice(None), prompts)
        for _ in range(self.retries):
            for group in _failed(scores, group_size):
                rows = slice(group * group_size, (group + 1) * group_size)
                attempt(rows, prompts.take([group]))
        failed = _failed(scores, group_size)
        if failed:
            self.problems[name] = problems[-1]
            message = "reward %r failed for %d of %d groups, which are dropped (%s)"
            log.warning(message, name, len(failed), len(prompts), problems[-1])
        for group in failed:
            scores[group * group_size : (group + 1) * group_size] = torch.nan
        return scores


def normalized(scores: Tensor, kept: Tensor, how: str) -> Tensor:
    """One reward's scores [K, G] as the weighted sum takes them, see the top of this file.

    kept: bool [K], groups that no reward failed for; the others take no part.
    """
    if how == "std":
        inside = scores[kept].var(dim=1, correction=0).mean().sqrt()
        return scores / (inside + EPS)
    if how == "group":
        centred = scores - scores.mean(dim=1, keepdim=True)
        return centred / (scores.std(dim=1, correction=0, keepdim=True) + EPS)
    return scores


def _failed(scores: Tensor, group_size: int) -> list[int]:
    """The groups with a score that is not finite."""
    bad = ~scores.isfinite().view(-1, group_size).all(dim=1)
    return bad.nonzero()[:, 0].tolist()


def _told(error: Exception) -> str:
    """An error on one line, with the place in the user's own code that it came through."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    text = text if len(text) <= 300 else f"{text[:300]} ..."
    places = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_own(frame)]
    return f"{text}, {places[-1].filename} line {places[-1].lineno}" if places else text


def _is_own(frame: traceback.FrameSummary) -> bool:
    """Whether a frame is neither of an installed library, nor of Python, nor of this package."""
    path, known = Path(frame.filename), sysconfig.get_paths()
    theirs = {Path(known[name]) for name in ("stdlib", "purelib", "platlib")}
    return path.is_file() and not {*theirs, Path(__file__).parents[1]} & {*path.parents}


def _call(reward: Reward, name: str, images: Tensor, prompts: Prompts, group_size: int) -> Tensor:
    """float64 scores of `images` on the CPU; the count is checked."""
    texts = [text for text in prompts.texts for _ in range(group_size)]
    metadata = [entry for entry in prompts.metadata for _ in range(group_size)]
    out = reward(images, texts, metadata)
    if isinstance(out, tuple) and len(out) == 2 and isinstance(out[1], dict):
        raise RewardError(
            f"reward {name!r} returned a tuple of scores and a dict, as flow_grpo's rewards do, "
            "but the scores alone are expected; return the first of the two."
        )
    if isinstance(out, Tensor):
        out = out.detach().to("cpu", torch.float64).numpy()
    elif isinstance(out, list | tuple):
        # Of numbers of any library, 0-dim tensors among them.
        out = [float(score) for score in out]
    scores = torch.from_numpy(np.array(out, dtype=np.float64))
    if scores.shape != (len(images),):
        raise RewardError(
            f"reward {name!r} returned scores of shape {tuple(scores.shape)} for {len(images)} "
            f"images, but one score an image, shape ({len(images)},), is expected; correct it."
        )
    return scores
