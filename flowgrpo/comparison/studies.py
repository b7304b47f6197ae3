"""Studies: what is compared with what, on which budget.

A study has arms. Each is the base recipe with some fields changed, and is trained once for each
seed. All runs train until both budgets are spent, images and seconds of training, so that one run
has a score at equal images and one at equal seconds. A budget that is 0 is none; then the runs are
read where the shortest of them ends.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowgrpo.config import Config, ConfigError, replace
from flowgrpo.config.validation import check_types, require, shown, similar
from flowgrpo.recipes import recipe

PANELS = {
    "images": "accuracy against images",
    "seconds": "accuracy against seconds of training",
    "quality": "accuracy against the change of quality, as a share of what is allowed",
    "diversity": "accuracy against diversity",
    "kl": "accuracy against the KL to the base",
}
"""Panels of the picture -> what they show."""

SET_HERE = (
    *("run.seed", "run.out", "run.resume", "run.steps", "run.min_seconds", "run.eval_every"),
    *("run.eval_seconds", "run.checkpoint_every", "run.accept_changes", "run.progress"),
)
"""Fields that a comparison sets by itself, from seeds, folder, budget and evaluations."""

COMMON = (
    *("policy.model", "policy.variant", "policy.device", "policy.init_adapter"),
    *("policy.resolution", "policy.height", "policy.width", "policy.frames"),
    *("policy.embedded_guidance", "reward.frames"),
    *("sample.prompts", "sample.eval_steps", "sample.guidance_scale", "reward.report"),
    *(
        "run.eval_prompts",
        "run.eval_samples",
        "run.eval_resolution",
        "run.eval_guidance",
        "run.eval_kl",
        "run.threads",
    ),
)
"""Fields in which arms may not differ: they decide what is measured, from which base, and how
long a second is."""

LABEL = re.compile(r"[\w(+=][\w .,+=()-]*")
"""Names of arms, which name folders."""


@dataclass(frozen=True)
class Study:
    """One comparison."""

    name: str
    """Names the folder, and stands in the title."""
    recipe: str
    """Base recipe of all arms: a name, or package.module:function."""
    arms: dict[str, dict[str, object]]
    """Label -> fields that are changed, by dotted name. Others are compared with the first."""
    question: str = ""
    """Question that it answers, in a sentence."""
    common: dict[str, object] = field(default_factory=dict)
    """Fields that are changed in all arms, by dotted name."""
    images: int = 0
    """Images that each run trains on, at least; 0: no such budget."""
    seconds: float = 0.0
    """Seconds of training (rollouts, rewards, updates) of each run, at least; 0: no such budget."""
    evaluations: int = 8
    """Evaluations on the way to each budget."""
    panels: tuple[str, ...] = ("images", "seconds")
    """Panels of the picture, keys of `PANELS`."""

    def __post_init__(self) -> None:
        check_types("study.", self)
        require(
            re.fullmatch(r"[\w.-]+", self.name) is not None and self.name.strip(".") != "",
            f"study.name is {shown(self.name)}, but letters, digits and .-_ are expected; a folder "
            "is named so.",
        )
        require(
            len(self.arms) >= 2,
            f"study.arms of {self.name} has {len(self.arms)} entries, but a comparison needs at "
            "least 2; add one.",
        )
        for label in self.arms:
            require(
                LABEL.fullmatch(label) is not None and label == label.strip() and label != "base",
                f"study.arms has {shown(label)}, but a label of letters, digits, spaces and "
                ".,+=()-_ other than 'base' is expected; a folder is named so.",
            )
        folders: dict[str, str] = {}
        for label in self.arms:
            other = folders.setdefault(folder_name(label).lower(), label)
            require(
                other == label,
                f"study.arms has {other!r} and {label!r}, but their folders would have one name; "
                "rename one.",
            )
        require(
            self.images >= 0 and 0 <= self.seconds < math.inf and self.evaluations >= 1,
            f"study.images is {self.images}, seconds {self.seconds} and evaluations "
            f"{self.evaluations}, but budgets of at least 0 and at least one evaluation are "
            "expected; change the one that is not.",
        )
        for panel in self.panels:
            require(
                panel in PANELS,
                f"study.panels has {shown(panel)}{similar(panel, PANELS)}, but one of "
                f"{', '.join(PANELS)} is expected; correct it.",
            )

    def with_budget(self, images: int | None, seconds: float | None) -> Study:
        """Replace the budget, if one is given: the one that is not is then none.

        Raises:
            ConfigError: there is no budget.
        """
        for name, value in (("images", images), ("seconds", seconds)):
            require(
                value is None or 0 < value < math.inf,
                f"--{name} is {value}, but it must be greater than 0; change it.",
            )
        study = self
        if images is not None or seconds is not None:
            study = dataclasses.replace(self, images=images or 0, seconds=float(seconds or 0))
        require(
            study.images > 0 or study.seconds > 0,
            f"the study {self.name} has no budget, but images or seconds of training for each run "
            "are expected; give --images N, --seconds S, or both.",
        )
        return study

    def configs(self, overrides: Mapping[str, Any] | None = None) -> dict[str, Config]:
        """Build the configuration of each arm, without what depends on seed and folder.

        Args:
            overrides: fields that are changed in all arms, over all others, by dotted name.

        Raises:
            ConfigError: a field is unknown, has a value that breaks a rule, is set by the
                comparison itself or decides what is measured; or an arm repeats another.
        """
        overrides = dict(overrides or {})
        base = recipe(self.recipe)
        configs: dict[str, Config] = {}
        for label, changes in self.arms.items():
            fields = {**self.common, **changes, **overrides}
            where = f"arm {label!r} of the study {self.name}"
            for name in fields:
                require(
                    name not in SET_HERE,
                    f"{where} sets {name}, but a comparison sets it by itself, from its seeds, "
                    "folder, budget and evaluations; leave it out.",
                )
            for name in changes:
                require(
                    name not in COMMON,
                    f"{where} sets {name}, but in that all arms must agree, or they would not be "
                    "measured alike; set it for all, in the study's common fields or on the "
                    "command line.",
                )
            try:
                config = replace(base, **{n: _tuples(value) for n, value in fields.items()})
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
            if "run.eval_guidance" not in fields:
                config = replace(config, **{"run.eval_guidance": 1.0})
            if not config.run.eval_kl:
                level = replace(base, **_known(base, self.common)).sample.noise_level
                config = replace(config, **{"run.eval_kl": level})
            configs[label] = config
        _check_distinct(self.name, configs)
        return configs


def _known(base: Config, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Choose the fields of the sampler's noise, which the KL of all arms is measured with."""
    return {name: value for name, value in fields.items() if name == "sample.noise_level"}


def _check_distinct(name: str, configs: Mapping[str, Config]) -> None:
    """Raise ConfigError if an arm repeats another, or is scored by another first reward."""
    labels = list(configs)
    for number, label in enumerate(labels):
        for other in labels[:number]:
            require(
                configs[label] != configs[other],
                f"arm {label!r} of the study {name} repeats arm {other!r}: both have one "
                "configuration, but each must be another; change or remove one.",
            )
        first, accuracy = configs[labels[0]].reported[0], configs[label].reported[0]
        require(
            accuracy == first,
            f"arm {label!r} of the study {name} is scored by {accuracy!r} and arm {labels[0]!r} by "
            f"{first!r}, but all must have one score; set reward.report in the common fields.",
        )


def _tuples(value: Any) -> Any:
    """Make tuples of the lists of YAML and JSON, which has no tuples."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def folder_name(label: str) -> str:
    """Name the folder of an arm: its label, with - for spaces and commas."""
    return re.sub(r"[ ,]+", "-", label)


# Of those that learn from the results of a rollout: the numbers of `nano_awm`. Their rollouts are
# deterministic, so images of a group that begin from equal noise would be equal.
FORWARD = {
    "sample.shared_noise": False,
    "sample.steps": 6,
    "sample.prompts_per_iteration": 24,
    "sample.batch_size": 96,
    "optim.lr": 2e-3,
    "optim.warmup": 5,
    "optim.adv_clip": 2.0,
    "optim.beta": 0.03,
    "optim.updates_per_iteration": 1,
    "optim.step_weighting": "none",
    "optim.ema_decay": 0.97,
}

# As nano_awm, where large errors count less.
ADVANTAGE_MATCHING = {
    "optim.objective": "awm",
    "optim.level_weight": "normalized",
    "optim.levels": 3,
    **FORWARD,
}

SCOUTS = {"sample.scouts": 24, "sample.scout_forwards": 3}

# A rate that falls by the number of updates would be read at another height in each arm. Half of
# the recipe's held-out prompts, as many runs are evaluated many times.
STEADY = {"optim.decay": 0, "run.eval_prompts": 120}

STUDIES = {
    study.name: study
    for study in (
        Study(
            name="methods",
            question="Which way to learn from a reward gets furthest on equal images, and on "
            "equal seconds?",
            recipe="nano",
            common=STEADY,
            # Rates, pulls and groups but for those of the recipes nano and nano_awm: the best of a
            # few runs of forty iterations on the tuning prompts (benchmarks/LOG.md).
            arms={
                # The recipe's own.
                "GRPO": {"optim.objective": "grpo"},
                # Those that only imitate their own results, SFT and ORW, learn the errors of a
                # sampler of few steps as well, and make them larger with each iteration: with the
                # six steps and the pull of nano_awm they forget how to draw. (Where images of a
                # group are weighed against each other, what all of them share cancels.) More steps
                # and a stronger pull to the base hold that, and then the rate may be high.
                "SFT": {
                    "optim.objective": "sft",
                    **FORWARD,
                    "sample.steps": 12,
                    "optim.beta": 0.3,
                    # One image of a group is learnt from: small groups give more of them, and draws
                    # cost less than images.
                    "sample.group_size": 4,
                    "sample.prompts_per_iteration": 72,
                    "sample.batch_size": 144,
                    "optim.levels": 4,
                    "optim.lr": 3e-3,
                },
                "DPO": {
                    "optim.objective": "dpo",
                    **FORWARD,
                    "optim.levels": 3,
                    "optim.lr": 6e-3,
                },
                # The verifier has no gradient: the reward is a network that imitates it.
                "ReFL": {
                    "optim.objective": "refl",
                    **FORWARD,
                    "reward.weights": {"nano_classifier": 1.0},
                    # Images are not compared with each other, so most come from another prompt.
                    "sample.group_size": 2,
                    "sample.prompts_per_iteration": 96,
                    "optim.lr": 3e-3,
                },
                "ORW": {
                    "optim.objective": "orw",
                    **FORWARD,
                    "sample.batch_size": 144,
                    "sample.steps": 12,
                    "optim.beta": 0.3,
                    # A right image has reward 1, a wrong one 0.28 on average, and counts exp(-7).
                    "optim.tau": 0.1,
                    "optim.levels": 2,
                    "optim.lr": 6e-3,
                },
                "AWM": ADVANTAGE_MATCHING,
                "NFT": {"optim.objective": "nft", "optim.levels": 3, **FORWARD},
            },
            # Forty iterations of most, and as long as they take GRPO on one core.
            images=11_520,
            seconds=80.0,
            evaluations=4,
        ),
        Study(
            name="kl",
            question="Does the KL to the base keep pictures good and diverse where a reward can "
            "be hacked?",
            recipe="nano",
            # The second reward is the size of a JPEG, which falls furthest with what was asked for
            # left out: flat pictures. Equal shares of both, whatever their scales.
            common={
                **STEADY,
                "optim.objective": "grpo",
                "reward.weights": {"nano_partial": 0.5, "jpeg_compressibility": 0.5},
                "reward.report": ("nano_strict", "nano_partial", "jpeg_compressibility"),
                "reward.normalize": "std",
            },
            arms={
                "beta 0": {"optim.beta": 0.0},
                # The recipe's own.
                "default": {},
                "beta 0.4": {"optim.beta": 0.4},
            },
            images=11_520,
            panels=("images", "seconds", "quality", "diversity"),
        ),
        Study(
            name="steps",
            question="Do few sampling steps in training give the accuracy of many, in less time?",
            recipe="nano",
            common={**STEADY, "sample.eval_steps": 40},
            arms={f"T={steps}": {"sample.steps": steps} for steps in (5, 10, 20, 40)},
            images=9_600,
            panels=("seconds", "images"),
        ),
        Study(
            name="scouts",
            question="Do scouts, cheap previews of twice as many candidates, learn more in equal "
            "seconds?",
            recipe="nano",
            common=STEADY,
            # Half of the forwards of an image each. Everything else is the recipe's own.
            arms={
                "GRPO": {},
                "GRPO + scouts": SCOUTS,
                "AWM": ADVANTAGE_MATCHING,
                "AWM + scouts": {**ADVANTAGE_MATCHING, **SCOUTS},
            },
            seconds=80.0,
            evaluations=4,
            panels=("seconds", "images"),
        ),
    )
}
"""Name -> shipped study."""


def find_study(name: str) -> Study:
    """Find a shipped study by name, or read the YAML or JSON file `name`.

    Raises:
        ConfigError: there is none, or the file is no study.
    """
    if name in STUDIES:
        return STUDIES[name]
    path = Path(name).expanduser()
    is_path = path.suffix.lower() in (".yaml", ".yml", ".json")
    require(
        is_path,
        f"the study {name!r} is unknown{similar(name, STUDIES)}, but one of {', '.join(STUDIES)} "
        "or a .yaml or .json file is expected; name one.",
    )
    try:
        text = path.read_text(encoding="utf-8")
    # A ValueError: it is no UTF-8, or its path no path.
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"the study {name!r} cannot be read ({getattr(error, 'strerror', None) or error}), but "
            "a YAML or JSON file is expected; correct the path."
        ) from error
    return parse_study(text, path)


def parse_study(text: str, path: Path) -> Study:
    """Read a study from the text of the file `path`: YAML, or JSON by its ending.

    The study's name is by default the file's.

    Raises:
        ConfigError: the text is no study.
    """
    import yaml

    kind = "JSON" if path.suffix.lower() == ".json" else "YAML"
    try:
        values = json.loads(text) if kind == "JSON" else yaml.load(text, _loader())
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(
            f"the study {str(path)!r} is no {kind} ({' '.join(str(error).split())}), but recipe, "
            "arms and a budget are expected there; correct it."
        ) from error
    require(
        isinstance(values, dict),
        f"the study {str(path)!r} holds {shown(values)}, but an object with recipe, arms and a "
        "budget is expected; correct it.",
    )
    values = {"name": path.stem, **values}
    names = [f.name for f in dataclasses.fields(Study)]
    for name in values:
        require(
            name in names,
            f"the study {str(path)!r} has {shown(name)}{similar(str(name), names)}, but one of "
            f"{', '.join(names)} is expected; correct the name.",
        )
    for name in ("recipe", "arms"):
        require(
            name in values,
            f"the study {str(path)!r} has no {name}, but one is expected; add it.",
        )
    values["common"] = values.get("common") or {}
    if isinstance(values["arms"], dict):
        # `arm:` with nothing behind it is the base recipe.
        values["arms"] = {
            label: {} if changes is None else changes for label, changes in values["arms"].items()
        }
    if isinstance(values.get("panels"), list):
        values["panels"] = tuple(values["panels"])
    try:
        return Study(**values)
    except ConfigError as error:
        raise ConfigError(f"the study {str(path)!r}: {error}") from error


def _loader() -> Any:
    """Make a safe YAML loader that refuses a key twice in one object, and reads 1e-4 as a number,
    as YAML 1.2 does."""
    import yaml

    class Loader(yaml.SafeLoader):
        """A safe loader with these two differences."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict:
            """Build an object, each of whose keys is new."""
            keys = [key.value for key, _ in node.value]
            for number, key in enumerate(keys):
                if key in keys[:number]:
                    raise yaml.YAMLError(f"{key!r} stands there twice")
            return super().construct_mapping(node, deep)

    pattern = r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(pattern), list("-+.0123456789")
    )
    return Loader


def check_seeds(seeds: Sequence[int]) -> None:
    """Raise ConfigError unless there are seeds, each once and none below 0."""
    require(bool(seeds), "--seeds is empty, but at least one seed is expected; give one.")
    for number, seed in enumerate(seeds):
        require(
            0 <= seed < 2**63,
            f"--seeds has {seed}, but a seed is at least 0 and below 2^63; change it.",
        )
        require(
            seed not in seeds[:number],
            f"--seeds has {seed} twice, but equal seeds give equal runs; leave one out.",
        )


def select_arms(study: Study, labels: Iterable[str]) -> tuple[str, ...]:
    """Choose arms of a study by label, in the study's order; all if `labels` is empty.

    Raises:
        ConfigError: a label is unknown, or fewer than one is left.
    """
    labels = tuple(labels)
    for label in labels:
        require(
            label in study.arms,
            f"--arms has {label!r}{similar(label, study.arms)}, but arms of the study "
            f"{study.name} are {', '.join(map(repr, study.arms))}; name some of these.",
        )
    return tuple(label for label in study.arms if not labels or label in labels)
