"""The weighted sum of several rewards, and what happens when one fails.

A reward that raises or returns scores that are not finite is asked again, group by group; a group
that fails every time is dropped and counted, never scored 0 in silence. A wrong number of scores is
a mistake that no repetition mends, and raises; so does a reward that asks the process to end.

The user's own rewards get copies of the images and metadata, so what one of them changes reaches no
other, and no picture; what they set for the whole process is put back (config/isolation.py).

Rewards live on different scales (PickScore differs by hundredths within a group, an aesthetic score
by halves), so a plain sum is ruled by the one that varies most. `normalize` brings them together
before the weights, with s the scores of one reward, [K, G], and only groups that are complete:

    std      s / sqrt(mean_k var_g(s))         its std inside the groups; how a prompt's groups
                                               differ plays no part, as advantages have none of it
    group    (s - mean_g s) / std_g(s)         GDPO (arXiv 2601.05242), and MixGRPO's advantage_aggr

After "group" a reward counts the same in every group, however little it varies there.

A reward that is the same inside a group, or inside all of them for "std", up to `ROUNDING` of its
size, has nothing to compare there: it adds 0, and what tells two groups apart is not blown up.
"""

from __future__ import annotations

import copy
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowgrpo.config import RewardConfig
from flowgrpo.config.isolation import isolated
from flowgrpo.distributed.world import SPECIFIC
from flowgrpo.records import Prompts, Scores
from flowgrpo.rewards import models
from flowgrpo.rewards.frames import as_asked, takes_videos
from flowgrpo.rewards.images import comparison_picture, comparison_video
from flowgrpo.rewards.interface import ReplyError, RewardError, describe_error
from flowgrpo.rewards.table import Reward, is_remote, is_users, load, on_device, options_of

EPS = 1e-8
"""Added to a std before it divides."""
ROUNDING = 1e-6
"""Std over the largest |score| up to which scores count as equal: a float32 network returns other
last bits, about 1e-7 of a score, for the same image in another batch."""
LARGEST = 1e30
"""Largest |score|: a sum of squares, or a float32 advantage, of more would overflow."""
NOT_FINITE = f"it returned scores that are not finite, or beyond {LARGEST:g}"
"""Problem of a reward that raised no error."""
BLANKS = 2
"""Images that rewards are tried on: so that one number for all images is seen to be too few."""
CERTAIN = (ImportError, NameError, SyntaxError, FileNotFoundError, PermissionError, ReplyError)
"""Errors that no image is the reason of."""

log = logging.getLogger("flowgrpo")


class Scorer:
    """Scores K groups of images by the weighted sum of rewards."""

    def __init__(
        self,
        weights: Mapping[str, float],
        retries: int = 2,
        *,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        timeout: float = 0.0,
        normalize: str = "none",
        devices: Mapping[str, str] | None = None,
        offset: int = 0,
        frames: int = 1,
    ) -> None:
        """options: reward name -> its options. timeout: of the rewards that have one; 0: theirs.
        devices: reward name, or all -> the device of its model, unless `options` has it. offset: of
        remote rewards, the server of several that is asked first. frames: of a video, whose mean
        the score of a reward of images is."""
        self.weights = dict(weights)
        self.retries, self.normalize, self.frames = retries, normalize, frames
        self.rewards = {}
        for name in self.weights:
            arguments = on_device(name, (options or {}).get(name, {}), devices or {})
            if timeout and "timeout" in getattr(load(name), "defaults", {}):
                arguments.setdefault("timeout", timeout)
            if offset and is_remote(name, load(name)):
                arguments.setdefault("offset", offset)
            self.rewards[name] = load(name, arguments)
        self.problems: dict[str, str] = {}
        """Reward name -> its last error."""

    @classmethod
    def of(cls, config: RewardConfig, reported: Iterable[str] = (), *, offset: int = 0) -> Scorer:
        """Load the rewards that `config` trains with; or those `reported`, each by itself."""
        weights = dict.fromkeys(reported, 1.0) or config.weights
        names = dict.fromkeys((*config.weights, *config.report, *weights))
        return cls(
            weights,
            config.retries,
            options=options_of(config.options, names),
            timeout=config.timeout,
            normalize=config.normalize,
            devices=config.devices,
            offset=offset,
            frames=config.frames,
        )

    def prepare(self, prompts: Prompts) -> None:
        """Check the rewards before the first image: their prompts, models, libraries and servers.

        Raises:
            RewardError: a reward cannot judge images of a prompt; or a model, a library or a
                server is missing.
        """
        self.check(prompts)
        for name, device in self.devices().items():
            call_users(partial(models.device, device), name, "use its device")

        def has_weights(entry: tuple[str, Any]) -> bool:
            return "url" not in getattr(entry[1], "defaults", {})

        # Addresses first: one that is missing is seen at once, weights take minutes to load.
        for name, reward in sorted(self.rewards.items(), key=has_weights):
            if hasattr(reward, "build"):
                built = call_users(
                    reward.build, name, "be loaded" if not is_users(name) else "be built"
                )
                reach = getattr(built, "reach", None)
                if reach is not None:
                    call_users(reach, name, "reach what it needs")

    def devices(self) -> dict[str, str]:
        """List the devices of the models of this package's rewards, by name; "auto" is one too."""
        options = {n: getattr(r, "options", {}) for n, r in self.rewards.items() if not is_users(n)}
        return {name: values["device"] for name, values in options.items() if "device" in values}

    def servers(self) -> dict[str, str]:
        """Describe the servers of remote rewards, by name: which serve, what the others said."""
        remote = {name: r for name, r in self.rewards.items() if is_remote(name, r)}
        return {name: reward.build().servers.describe() for name, reward in remote.items()}

    def check(self, prompts: Prompts) -> None:
        """Raise RewardError unless the rewards can judge images of these prompts."""
        for name, reward in self.rewards.items():
            check = getattr(reward, "check", None)
            if check is not None:
                for text, entry in zip(prompts.texts, prompts.metadata, strict=True):
                    call_users(partial(check, text, entry), name, f"check the prompt {text!r}")

    def try_out(self, prompts: Prompts, blank: Tensor) -> None:
        """Call the rewards with a blank image, uint8 [3, H, W], or a blank video, uint8
        [F, 3, H, W], before real ones.

        An error of which a blank image may be the reason, or that may pass, is only logged. Several
        servers of one reward are compared by a picture that is not blank.

        Raises:
            RewardError: what a reward returns is not one number an image, or it failed by one of
                the `CERTAIN` errors; or two of its servers score differently.
        """
        blanks = torch.stack([blank] * BLANKS)
        for name, reward in self.rewards.items():
            if is_remote(name, reward):
                servers = reward.build().servers
                picture = comparison_picture(*blank.shape[-2:])
                if takes_videos(reward):
                    picture = comparison_video(*blank.shape[:-3] or (1,), *blank.shape[-2:])
                servers.compare(picture, prompts.texts[0], prompts.metadata[0])
            images, _ = as_asked(reward, blanks, self.frames)
            try:
                answer = _ask(reward, name, images, prompts.take([0]), [len(images)])
            except RewardError:
                raise
            except CERTAIN as error:
                raise RewardError(
                    f"reward {name!r} failed before the first image ({describe_error(error)}), "
                    "which would be so for all images; correct it or install what it needs."
                ) from error
            # The user's code, or a service: anything may come out of it.
            except Exception as error:
                message = "reward %r failed on a blank image, before the first real one (%s)"
                log.warning(message, name, describe_error(error))
                continue
            try:
                _scores(answer, name, len(images))
            except RewardError:
                raise
            # Numbers are asked for, and what was returned may answer that by any error.
            except Exception as error:
                words = " ".join(str(answer).split())[:80]
                raise RewardError(
                    f"reward {name!r} returned {words} for {len(images)} images, but one number an "
                    "image is expected; correct it."
                ) from error

    def __call__(self, images: Tensor, prompts: Prompts, group_size: int) -> Scores:
        """Score K * G images, G for each of the K prompts in turn.

        Raises:
            RewardError: a reward returned a wrong number of scores, or failed for every group.
        """
        return self.combine(self.score_each(images, prompts, group_size), group_size)

    def score_each(
        self, images: Tensor, prompts: Prompts, counts: int | Sequence[int]
    ) -> dict[str, Tensor]:
        """Score images [b, 3, H, W] or videos [b, F, 3, H, W] by each reward, float64 [b]; NaN in
        groups that failed.

        Args:
            counts: images of each prompt, in turn; one number for all, or one each.

        Raises:
            RewardError: a reward returned a wrong number of scores.
        """
        if isinstance(counts, int):
            counts = [counts] * len(prompts)
        # Of videos, too, all rewards of images get one tensor, as one may know it again.
        prepared: dict[bool, tuple[Tensor, int]] = {}
        scores = {}
        for name, reward in self.rewards.items():
            kind = takes_videos(reward)
            if kind not in prepared:
                prepared[kind] = as_asked(reward, images, self.frames)
            scores[name] = self._all_groups(name, *prepared[kind], prompts, counts)
        return scores

    def combine(self, rewards: dict[str, Tensor], group_size: int) -> Scores:
        """Sum the rewards of all groups, float64 [B] each, by their weights.

        Raises:
            RewardError: a reward failed for every group.
        """
        for name, scores in rewards.items():
            complete = scores.isfinite().view(-1, group_size).all(dim=1)
            if not complete.any():
                raise RewardError(
                    f"reward {name!r} failed for all {len(complete)} groups after "
                    f"{self.retries} retries ({self.problems[name]}), but {len(scores)} finite "
                    "scores are expected; mend it."
                )
        finite = torch.stack(list(rewards.values())).isfinite().all(dim=0)
        complete = finite.view(-1, group_size).all(dim=1)
        total = sum(
            weight
            * normalize(rewards[name].view(-1, group_size), complete, self.normalize).flatten()
            for name, weight in self.weights.items()
        )
        dropped = total.isnan().view(-1, group_size).any(dim=1)
        total = total.masked_fill(dropped.repeat_interleave(group_size), torch.nan)
        return Scores(total, rewards, dropped)

    def _all_groups(
        self, name: str, images: Tensor, frames: int, prompts: Prompts, counts: Sequence[int]
    ) -> Tensor:
        """Score b images by one reward, or b videos by `frames` images of each in turn, float64
        [b]; NaN in the groups that failed every attempt."""
        scores = torch.full((len(images) // frames,), torch.nan, dtype=torch.float64)
        ends = np.cumsum(counts).tolist()
        groups = [slice(end - n, end) for end, n in zip(ends, counts, strict=True)]
        problems = [NOT_FINITE]

        def failed() -> list[int]:
            return [i for i, rows in enumerate(groups) if not scores[rows].isfinite().all()]

        def attempt(rows: slice, asked: Prompts, counts: Sequence[int]) -> None:
            try:
                # All rows as the tensor itself: a reward may know it again.
                chunk = images
                if asked is not prompts:
                    chunk = images[rows.start * frames : rows.stop * frames]
                each = [frames * count for count in counts]
                answer = _ask(self.rewards[name], name, chunk, asked, each)
                scores[rows] = _scores(answer, name, len(chunk)).view(-1, frames).mean(dim=1)
            except RewardError:
                raise
            # A reward is the user's code or a remote service: anything may come out of it.
            except Exception as error:
                problems.append(describe_error(error))

        attempt(slice(None), prompts, counts)
        for _ in range(self.retries):
            for group in failed():
                attempt(groups[group], prompts.take([group]), counts[group : group + 1])
        dropped = failed()
        if dropped:
            self.problems[name] = problems[-1]
            message = "reward %r failed for %d of %d groups, which are dropped (%s)"
            log.warning(message, name, len(dropped), len(prompts), problems[-1], extra=SPECIFIC)
        for group in dropped:
            scores[groups[group]] = torch.nan
        return scores


def normalize(scores: Tensor, complete: Tensor, method: str) -> Tensor:
    """Normalise one reward's scores [K, G] by `reward.normalize`, see the top of this file.

    complete: bool [K], groups that no reward failed for; the others take no part.
    """
    if not complete.any():
        # All groups are dropped.
        return scores
    if method == "std":
        inside = scores[complete].var(dim=1, correction=0).mean().sqrt()
        return _divide(scores, inside, scores[complete].abs().amax())
    if method == "group":
        centred = scores - scores.mean(dim=1, keepdim=True)
        inside = scores.std(dim=1, correction=0, keepdim=True)
        return _divide(centred, inside, scores.abs().amax(dim=1, keepdim=True))
    return scores


def _divide(scores: Tensor, std: Tensor, largest: Tensor) -> Tensor:
    """scores / std; 0, or NaN for scores that are, where std is a rounding of `largest` |score|."""
    equal = std <= ROUNDING * largest
    return torch.where(equal, scores * 0.0, scores / (std + EPS))


def call_users(call: Callable[[], Any], name: str, purpose: str) -> Any:
    """Call code of the reward `name` before there are images; an error names the reward, and one of
    the user's code is one sentence too, "... cannot `purpose`"."""
    try:
        with isolated(f"reward {name!r}") if is_users(name) else nullcontext():
            return call()
    except RewardError as error:
        if repr(name) in str(error):
            raise
        raise RewardError(f"reward {name!r} cannot {purpose}: {error}") from error
    except (Exception, SystemExit) as error:
        if not is_users(name):
            raise
        raise RewardError(
            f"reward {name!r} cannot {purpose} ({describe_error(error)}), but a function of "
            "images, prompts and metadata is expected; correct it or its options."
        ) from error


def _ask(reward: Reward, name: str, images: Tensor, prompts: Prompts, counts: Sequence[int]) -> Any:
    """Call a reward with so many images of each prompt; the user's own gets copies."""
    texts = [t for text, n in zip(prompts.texts, counts, strict=True) for t in [text] * n]
    metadata = [e for entry, n in zip(prompts.metadata, counts, strict=True) for e in [entry] * n]
    if is_users(name):
        images, metadata = images.clone(), [copy.deepcopy(entry) for entry in metadata]
    try:
        with isolated(f"reward {name!r}") if is_users(name) else nullcontext():
            return reward(images, texts, metadata)
    except Exception:
        raise
    # SystemExit and its like would end the process before what was learned is saved.
    except BaseException as error:
        in_main = threading.current_thread() is threading.main_thread()
        # Ctrl-C reaches the main thread alone.
        if isinstance(error, KeyboardInterrupt) and in_main:
            raise
        raise RewardError(
            f"reward {name!r} asked the process to end ({describe_error(error)}), but one score an "
            "image is expected; raise an error, or return NaN for an image without a score."
        ) from error


def _scores(answer: Any, name: str, count: int) -> Tensor:
    """Read what a reward returned for `count` images, float64 [count] on the CPU; NaN for those
    beyond `LARGEST`.

    Raises:
        RewardError: it is no list, array or tensor of `count` scores.
        TypeError, ValueError: one of them is no number.
    """
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], dict):
        raise RewardError(
            f"reward {name!r} returned a tuple of scores and a dict, as flow_grpo's rewards do, "
            "but the scores alone are expected; return the first of the two."
        )
    if isinstance(answer, Tensor):
        answer = answer.detach().to("cpu", torch.float64).numpy()
    elif isinstance(answer, list | tuple):
        # Of numbers of any library, 0-dim tensors among them.
        answer = [float(score) for score in answer]
    elif not isinstance(answer, int | float) and not hasattr(answer, "__array__"):
        if inspect.iscoroutine(answer):
            # Otherwise Python warns that it was never awaited.
            answer.close()
        raise RewardError(
            f"reward {name!r} returned a {type(answer).__name__} for {count} images, but a list, "
            "an array or a tensor of one score an image is expected; correct it."
        )
    scores = torch.from_numpy(np.array(answer, dtype=np.float64))
    if scores.shape != (count,):
        raise RewardError(
            f"reward {name!r} returned scores of shape {tuple(scores.shape)} for {count} "
            f"images, but one score an image, shape ({count},), is expected; correct it."
        )
    return torch.where(scores.abs() <= LARGEST, scores, torch.nan)
