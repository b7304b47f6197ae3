"""Options of ``flowgrpo curate``; read without torch, so that ``--help`` waits for nothing."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from flowgrpo.config.validation import ConfigError, path_text, require, settle_paths, similar


class Thresholds(dict[str, float]):
    """Reward -> number; on the command line NAME NUMBER, repeated."""


SERVICE_OPTIONS = ("url", "token", "timeout", "retries", "backoff", "concurrency")
"""Options of rewards that say where and how a service is called: not written, free to change."""
CHANGEABLE = (
    "out",
    "skip_unreadable",
    "skip_uncaptioned",
    "batch_size",
    "workers",
)
"""Options that a command which goes on may change: they decide nothing about an image that has
been read."""


@dataclass(frozen=True)
class CurateOptions:
    """Make a curated set of image-text pairs: score, select, crop to one size, split by prompt."""

    sources: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Folders of pictures with captions, webdataset shards (.tar), hub:OWNER/NAME, curated sets."""
    out: str = "curated"
    """Folder of the curated set; the same command goes on where it stopped."""
    rewards: dict[str, float] = field(default_factory=dict)
    """Rewards and their weights: NAME WEIGHT, as reward.weights."""
    reward_options: dict[str, str] = field(default_factory=dict)
    """Options of rewards: NAME.OPTION VALUE."""
    min: Thresholds = field(default_factory=Thresholds)
    """Lowest score of an image that stays: NAME NUMBER."""
    max: Thresholds = field(default_factory=Thresholds)
    """Highest score of an image that stays: NAME NUMBER."""
    top: Thresholds = field(default_factory=Thresholds)
    """Share of the images that stays, the best by this reward, after min and max: NAME SHARE."""
    resolution: int = 512
    """Pixels on each side: images are cropped to the centre and made smaller."""
    height: int | None = None
    """Pixels from top to bottom; default: --resolution."""
    width: int | None = None
    """Pixels from left to right; default: --resolution."""
    upscale: bool = False
    """Enlarge images that are smaller; otherwise they are dropped."""
    shares: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Shares of the prompts in train, validation and test; images of one prompt stay together."""
    split_seed: int = 0
    """Another number splits the prompts in another way."""
    pairs: bool = False
    """Write pairs.jsonl: of each training prompt the best image, and the worst of all its
    images, by the weighted sum of the rewards."""
    pair_gap: float = 0.0
    """Smallest difference of the weighted sums in a pair; 0: any that is above 0."""
    caption_column: str | None = None
    """Key, column or member of a shard with the caption; default: prompt, caption or text."""
    image_column: str | None = None
    """Column of a Hub set with the picture; default: the first one that holds pictures."""
    hub_split: str = "train"
    """Split of a Hub set."""
    limit: int | None = None
    """Read only so many images."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and count them; otherwise the first is an error."""
    skip_uncaptioned: bool = False
    """Leave out pictures without a caption, and count them; otherwise the first is an error."""
    batch_size: int = 16
    """Images that are read and scored at once."""
    workers: int = 0
    """Threads that decode and encode pictures; 0: one a core, at most 8."""

    def __post_init__(self) -> None:
        settle_paths(self, "out")
        object.__setattr__(self, "sources", tuple(map(path_text, self.sources)))
        for name in ("min", "max", "top"):
            object.__setattr__(self, name, Thresholds(getattr(self, name)))
        require(
            bool(self.sources),
            "no source was given, but at least one is expected; name a folder of pictures, a "
            "shard (.tar) or hub:OWNER/NAME.",
        )
        twice = [name for n, name in enumerate(self.sources) if name in self.sources[:n]]
        require(
            not twice,
            f"the source {twice[0] if twice else ''!r} is named twice, but once is expected; leave "
            "one out.",
        )
        for name in ("resolution", "height", "width", "limit", "batch_size"):
            value = getattr(self, name)
            require(
                value is None or value > 0,
                f"--{name.replace('_', '-')} is {value}, but it must be greater than 0; change it.",
            )
        require(
            self.workers >= 0,
            f"--workers is {self.workers}, but it must be at least 0; change it.",
        )
        self._check_shares()
        self._check_thresholds()
        self._check_pairs()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the set's images, in pixels."""
        return self.height or self.resolution, self.width or self.resolution

    def identity(self) -> dict[str, Any]:
        """List what decides the content of the set, as JSON has it."""
        values = dataclasses.asdict(self)
        for name in (*CHANGEABLE, "resolution", "height", "width"):
            del values[name]
        return {
            **values,
            "sources": list(self.sources),
            "shares": list(self.shares),
            "size": list(self.size),
            "reward_options": without_services(self.reward_options),
        }

    def _check_shares(self) -> None:
        good = all(0 <= share <= 1 for share in self.shares)
        require(
            good and abs(math.fsum(self.shares) - 1) < 1e-9,
            f"--shares is {' '.join(f'{share:g}' for share in self.shares)}, which "
            f"sums to {math.fsum(self.shares):g}, but shares of train, validation and test in "
            "[0, 1] that sum to 1 are expected; write, for example, --shares 0.9 0.05 0.05.",
        )

    def _check_thresholds(self) -> None:
        for option in ("rewards", "min", "max", "top"):
            for name, value in getattr(self, option).items():
                require(
                    math.isfinite(value),
                    f"--{option} {name} is {value}, but a finite number is expected; change it.",
                )
        for option in ("min", "max", "top"):
            for name in getattr(self, option):
                if name not in self.rewards:
                    scored = ", ".join(self.rewards) or "none"
                    raise ConfigError(
                        f"--{option} has {name!r}, which does not score the images, but one of "
                        f"--rewards ({scored}) is expected{similar(name, self.rewards)}; correct "
                        f"the name, or add --rewards {name} 1.0."
                    )
        for name, low in self.min.items():
            high = self.max.get(name, math.inf)
            require(
                low <= high,
                f"--min {name} is {low:g} and --max {name} is {high:g}, which leave no score "
                "between them; change one.",
            )
        for name, share in self.top.items():
            require(
                0 < share <= 1,
                f"--top {name} is {share:g}, but a share in (0, 1] is expected; write 0.3 for the "
                "best 30 %.",
            )

    def _check_pairs(self) -> None:
        require(
            self.pair_gap >= 0 and math.isfinite(self.pair_gap),
            f"--pair-gap is {self.pair_gap}, but a finite number of at least 0 is expected; change "
            "it.",
        )
        require(
            self.pairs or self.pair_gap == 0,
            f"--pair-gap is {self.pair_gap:g} without --pairs, but it is a gap of pairs; add "
            "--pairs or leave it out.",
        )
        require(
            not self.pairs or any(self.rewards.values()),
            "--pairs is on, but no reward has a weight other than 0, by which images are better or "
            "worse; name one, for example --rewards aesthetic 1.0.",
        )
        require(
            not self.pairs or self.shares[0] > 0,
            "--pairs is on, but the share of train is 0, and pairs are of the training split; "
            "change --shares.",
        )


def without_services(options: Mapping[str, str]) -> dict[str, str]:
    """Leave out the options of rewards that only say where and how a service is called."""
    return {
        name: value
        for name, value in options.items()
        if name.rpartition(".")[2] not in SERVICE_OPTIONS
    }


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Name the first option that differs between two identities, with both values; "" if none."""
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            option = "resolution" if name == "size" else name.replace("_", "-")
            return f"--{option} {before.get(name)} then and {now.get(name)} now"
    return ""
