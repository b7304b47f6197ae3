"""The whole configuration of a run, as one frozen value.

A ``Config`` is five frozen dataclasses, one per concern (sections.py), and the rules that join
them. A rule that a value breaks raises ``ConfigError`` with the rule in it, at construction, so a
``Config`` that exists is a valid one.

Shape letters: K prompts per iteration, G samples per prompt, T sampling steps, B = K G rows.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgrpo.config import parallel
from flowgrpo.config.sections import (
    OptimConfig,
    PolicyConfig,
    RewardConfig,
    RunConfig,
    SampleConfig,
)
from flowgrpo.config.validation import ConfigError, build, check_types, require

AUTO = "auto"
"""Value of `run.resume` that goes on with the run in the run directory, if one has begun."""


@dataclass(frozen=True)
class Config:
    """The configuration of a whole run. A recipe returns it, `replace` changes it."""

    recipe: str = "custom"
    """Name of the recipe that returned it."""
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sample: SampleConfig = field(default_factory=SampleConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        check_types("", self)
        chunks, updates = self.sample.chunks, self.optim.updates_per_iteration
        require(
            chunks % updates == 0,
            f"optim.updates_per_iteration {updates} does not divide the {chunks} chunks of an "
            f"iteration (K {self.sample.prompts_per_iteration} x G {self.sample.group_size} = "
            f"{self.sample.rows} rows in chunks of sample.batch_size {self.sample.batch_size}); "
            "change one so that every update gets the same number of chunks.",
        )
        per, trained = self.optim.steps_per_forward, self.sample.trained_steps
        require(
            trained % per == 0,
            f"optim.steps_per_forward is {per}, but it must divide the {trained} trained steps of "
            "a row; change one.",
        )
        require(
            per == 1
            or self.optim.split_forward
            or self.optim.anchor == "replay"
            or self.optim.ratio_tolerance > 0,
            f"optim.steps_per_forward is {per} with optim.anchor rollout, but velocities of a "
            "larger batch may differ in the last bits from the rollout's, and "
            "optim.ratio_tolerance is 0; turn optim.split_forward on, set optim.anchor to replay, "
            "or allow a deviation.",
        )
        parallel.check(self.policy, self.sample, self.optim, self.run)
        require(
            not (self.optim.guard and self.sample.transition == "cps"),
            "optim.guard is on with sample.transition cps, but GRPO-Guard needs a Gaussian "
            "log-probability; choose flow_sde or dance_sde, or turn guard off.",
        )

    @property
    def chunks_per_update(self) -> int:
        """Chunks of `sample.batch_size` rows that one optimizer step accumulates."""
        return self.sample.chunks // self.optim.updates_per_iteration

    @property
    def evaluated_policy(self) -> PolicyConfig:
        """The model with the image size of evaluations."""
        if not self.run.eval_resolution:
            return self.policy
        size = {"resolution": self.run.eval_resolution, "height": 0, "width": 0}
        return dataclasses.replace(self.policy, **size)

    @property
    def eval_batch_size(self) -> int:
        """Rows of an evaluation's forward: as many pixels as training's has, where its images are
        larger (training's size is stated then), and at least one."""
        policy, rows = self.policy, self.sample.batch_size
        pixels = (policy.height or policy.resolution) * (policy.width or policy.resolution)
        if not pixels or self.run.eval_resolution**2 <= pixels:
            return rows
        return max(rows * pixels // self.run.eval_resolution**2, 1)

    @property
    def reported(self) -> tuple[str, ...]:
        """Names of the rewards that evaluation reports, those of training among them; the first is
        the accuracy."""
        return tuple(dict.fromkeys((*self.reward.report, *self.reward.weights)))

    @property
    def updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.run.steps * self.optim.updates_per_iteration

    @property
    def reduction(self) -> str:
        """Order in which gradients are added, "tree" or "all_reduce"; see `run.reduction`."""
        if self.run.reduction != "auto":
            return self.run.reduction
        return "tree" if self.policy.adapter == "lora" else "all_reduce"

    @property
    def out_dir(self) -> Path:
        """The run directory."""
        resumed = None if self.run.resume == AUTO else self.run.resume
        return Path(resumed or self.run.out or f"runs/{self.recipe}-{self.run.seed}")


def parts_of(chunks: int, most: int) -> int:
    """Choose the number of leaves (distributed/dealing.py) of so many chunks: the largest divisor
    up to `most`, or `most` itself where that is less than half of it."""
    if chunks <= most:
        return chunks
    divisor = max(n for n in range(1, most + 1) if chunks % n == 0)
    return divisor if 2 * divisor >= most else most


def to_dict(config: Config) -> dict[str, Any]:
    """Convert the config to nested dicts of JSON values (tuples become lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> Config:
    """Invert `to_dict`; unknown fields and values of a wrong type raise ConfigError."""
    return build(Config, values)


def to_json(config: Config) -> str:
    """Write the config as indented JSON text."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(text: str) -> Config:
    """Invert `to_json`."""
    try:
        values = json.loads(text)
    # A number of thousands of digits is a ValueError, and a nesting of thousands a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"the configuration is no JSON ({error}), but what to_json wrote is expected; restore "
            "the file."
        ) from error
    return from_dict(values)
