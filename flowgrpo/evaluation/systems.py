"""Systems side by side, in the form of Flow-GRPO's tables (https://arxiv.org/abs/2505.05470):

    Model | task metric | Aesthetic | DeQA | ImgRwd | PickScore | UniRwd

The task's metric is measured on pictures of the task's prompts, the quality rewards on pictures of
another set, DrawBench in the paper. A task's metric that rises while these fall is being hacked.

The task's mean is over pictures within a sub-task, then over sub-tasks with equal weight, as
GenEval's overall score; a quality reward's is over all pictures, and its categories have means of
their own. Intervals are 95 % percentile bootstraps over prompts: pictures of one text stay
together.

evaluation.json holds systems with scores as the rewards give them; the table has them on the scale
of each model's authors (`COLUMNS`). Files of several systems make one table (`merge`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from flowgrpo import files, rewards
from flowgrpo.config import ConfigError
from flowgrpo.config.validation import check_types, require, shown, similar
from flowgrpo.evaluation.statistics import bootstrap, task_means
from flowgrpo.evaluation.table import print_whole
from flowgrpo.records import Prompts
from flowgrpo.rewards.pickscore import DIVISOR
from flowgrpo.rewards.table import REWARDS, is_address

PAPER = "paper"
PRESETS = {PAPER: ("aesthetic", "deqa", "imagereward", "pickscore", "unifiedreward")}
"""Name for `--quality` -> its rewards, in the order of the paper's columns."""

COLUMNS = {
    "aesthetic": ("Aesthetic", 1.0),
    "deqa": ("DeQA", 5.0),
    "imagereward": ("ImgRwd", 1.0),
    "pickscore": ("PickScore", DIVISOR),
    "unifiedreward": ("UniRwd", 5.0),
    "geneval_strict": ("GenEval", 1.0),
    "ocr": ("OCR", 1.0),
}
"""Reward -> its column, and what the reward's score is multiplied by there: DeQA and UnifiedReward
on their 1 ... 5, PickScore's logit."""

SETTINGS = ("model", "clip_model", "head", "tokenizer", "revision", "style", "engine", "edge")
"""Options of rewards that decide the score and are recorded; addresses and tokens are not."""

CATEGORIES = ("tag", "category", "Category")
"""Keys of a quality prompt's metadata that may hold its category; the first there is counts."""

NAME = "evaluation.json"
FORMAT = 1
TASK, QUALITY = "task", "quality"
NONE = "–"
"""Cell of what was not measured."""


@dataclass(frozen=True)
class Score:
    """One reward's figures over a set of pictures."""

    mean: float
    interval: tuple[float, float]
    """95 %, by prompt."""
    groups: dict[str, float] = field(default_factory=dict)
    """Sub-task or category -> mean."""
    failed: int = 0
    """Pictures that the reward gave no score."""


@dataclass(frozen=True)
class Measurement:
    """Pictures of one prompt set, and their scores."""

    prompt_set: str
    """Name or path."""
    fingerprint: str
    """SHA-256 of the texts, in part: equal for equal prompts."""
    prompts: int
    """Different texts."""
    images: int
    scores: dict[str, Score]
    """Reward -> figures; of a task the first is its metric."""
    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    """Reward -> the options that decide its score."""
    source: str = ""
    """How the pictures were sampled, or the layout of their files."""
    sizes: dict[str, int] = field(default_factory=dict)
    """Width x height -> pictures."""
    skipped: tuple[str, ...] = ()
    """Pictures that were left out, each with the reason."""


@dataclass(frozen=True)
class System:
    """A row of the table."""

    label: str
    task: Measurement | None = None
    quality: Measurement | None = None


def quality_rewards(names: Iterable[str], argument: str = "--quality") -> tuple[str, ...]:
    """List the rewards that `names`, presets or rewards, stand for; each once, in their order.

    Raises:
        ConfigError: a name is neither.
    """
    names = list(names)
    for name in names:
        known = name in PRESETS or name in REWARDS or ":" in name or is_address(name)
        require(
            known,
            f"{argument} is {name!r}, but {', '.join(PRESETS)} or a reward is expected"
            f"{similar(name, [*PRESETS, *REWARDS])}; name one.",
        )
    return tuple(dict.fromkeys(reward for name in names for reward in PRESETS.get(name, (name,))))


def groups_of(prompts: Prompts, keys: Sequence[str] = ("tag",)) -> list[str]:
    """Read the sub-task or category of each prompt: the first of `keys` in its metadata, or ""."""
    return [
        str(next((entry[key] for key in keys if entry.get(key)), "")) for entry in prompts.metadata
    ]


def fingerprint(texts: Iterable[str]) -> str:
    """Compute a short SHA-256 of the different texts, in whatever order."""
    digest = hashlib.sha256(json.dumps(sorted(set(texts))).encode())
    return digest.hexdigest()[:16]


def settings_of(scorer: rewards.Scorer) -> dict[str, dict[str, str]]:
    """List the options that decide the scores, by reward, as text."""
    return {
        name: {k: str(v) for k, v in getattr(reward, "options", {}).items() if k in SETTINGS}
        for name, reward in scorer.rewards.items()
    }


def measure(
    rewards_of: Mapping[str, Tensor], prompts: Prompts, *, balanced: bool
) -> dict[str, Score]:
    """Compute the figures of each reward.

    Args:
        rewards_of: reward -> float64 [M] scores of the pictures, NaN where it failed.
        prompts: M entries, one a picture; pictures of one prompt have one index.
        balanced: weight the groups equally, as a task; otherwise the pictures.
    """
    groups = groups_of(prompts, ("tag",) if balanced else CATEGORIES)
    scores = {}
    for name, values in rewards_of.items():
        array = values.numpy()
        scored = np.flatnonzero(np.isfinite(array))
        # Without pictures that have no score, so that no group's mean is one of nothing.
        means = task_means(array[scored], [groups[row] for row in scored])
        by_group = balanced and bool(means)
        scores[name] = Score(
            mean=float(np.mean(list(means.values()) if by_group else array[scored])),
            interval=bootstrap(array, groups if by_group else [""] * len(groups), prompts.indices),
            groups=means,
            failed=len(array) - len(scored),
        )
    return scores


def measurement(
    prompt_set: str,
    rewards_of: Mapping[str, Tensor],
    prompts: Prompts,
    scorer: rewards.Scorer,
    *,
    balanced: bool,
    source: str,
    sizes: Mapping[str, int],
    skipped: Sequence[str] = (),
) -> Measurement:
    """Describe the scores of M pictures; arguments as `Measurement` and `measure` have them."""
    return Measurement(
        prompt_set=prompt_set,
        fingerprint=fingerprint(prompts.texts),
        prompts=len(set(prompts.texts)),
        images=len(prompts),
        scores=measure(rewards_of, prompts, balanced=balanced),
        settings=settings_of(scorer),
        source=source,
        sizes=dict(sizes),
        skipped=tuple(skipped),
    )


# Files


def write(out: Path, systems: Sequence[System], versions: Mapping[str, Any]) -> None:
    """Write evaluation.json and table.md into the folder `out`."""
    values = {
        "format": FORMAT,
        "systems": [_system_to_dict(system) for system in systems],
        "versions": dict(versions),
    }
    files.write_text(out / "table.md", markdown(systems))
    files.write_json(out / NAME, values)


def load(path: Path) -> list[System]:
    """Read the systems of an evaluation.json, or of a folder that holds one.

    Raises:
        ConfigError: there is none, or it is something else.
    """
    path = Path(path)
    file = path / NAME if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--table names {str(path)!r}, but {file} cannot be read ({reason}), and an {NAME} "
            "that `flowgrpo evaluate` wrote is expected; name its folder."
        ) from error
    try:
        if values["format"] != FORMAT:
            raise ValueError(f"format {shown(values['format'])}")
        return [_system_from_dict(entry) for entry in values["systems"]]
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise ConfigError(
            f"--table names {str(path)!r}, but {file} holds something else "
            f"({type(error).__name__}: {str(error)[:300].rstrip('.')}), and an {NAME} of format "
            f"{FORMAT} is expected; name what `flowgrpo evaluate` wrote."
        ) from error


def _system_to_dict(system: System) -> dict[str, Any]:
    return {
        "label": system.label,
        TASK: _measurement_to_dict(system.task),
        QUALITY: _measurement_to_dict(system.quality),
    }


def _measurement_to_dict(measurement: Measurement | None) -> dict[str, Any] | None:
    if measurement is None:
        return None
    scores = {name: dict(vars(score)) for name, score in measurement.scores.items()}
    return {**vars(measurement), "scores": scores}


def _system_from_dict(values: Mapping[str, Any]) -> System:
    measured = (_measurement_from_dict(values[kind]) for kind in (TASK, QUALITY))
    system = System(values["label"], *measured)
    check_types("", system)
    return system


def _measurement_from_dict(values: Mapping[str, Any] | None) -> Measurement | None:
    if values is None:
        return None
    scores = {}
    for name, score in values["scores"].items():
        numbers = {key: _number(score[key]) for key in ("mean", "failed")}
        groups = {group: _number(mean) for group, mean in score["groups"].items()}
        interval = tuple(map(_number, score["interval"]))
        scores[name] = Score(**{**score, **numbers, "interval": interval, "groups": groups})
        check_types(f"{name}.", scores[name])
    skipped = tuple(values["skipped"])
    measurement = Measurement(**{**values, "scores": scores, "skipped": skipped})
    check_types("", measurement)
    if not scores:
        raise ValueError("no scores")
    return measurement


def _number(value: Any) -> Any:
    # JSON has no NaN, so one was written as null.
    return math.nan if value is None else value


def merge(systems: Iterable[System]) -> list[System]:
    """Put rows of one label together: the task of one file with the quality of another.

    Rows that are the same in all figures become one.

    Raises:
        ConfigError: two rows of one label hold other figures of the same kind.
    """
    rows: dict[str, System] = {}
    for system in systems:
        before = rows.get(system.label, System(system.label))
        rows[system.label] = System(
            system.label,
            _one(system.label, TASK, before.task, system.task),
            _one(system.label, QUALITY, before.quality, system.quality),
        )
    return list(rows.values())


def _one(
    label: str, kind: str, first: Measurement | None, other: Measurement | None
) -> Measurement | None:
    """Choose the measurement that is there, of two that may be absent or equal."""
    if first is None or other is None:
        return other if first is None else first
    require(
        repr(_figures(first)) == repr(_figures(other)),
        f"two rows are called {label!r} and differ in their {kind} figures, but a row has one of a "
        "kind; name all rows by --label.",
    )
    return first


def _figures(measurement: Measurement) -> tuple[Any, ...]:
    return measurement.fingerprint, measurement.images, measurement.scores


def relabel(systems: Sequence[System], labels: Sequence[str]) -> list[System]:
    """Name the rows anew, in order.

    Raises:
        ConfigError: there are not as many labels as rows.
    """
    require(
        len(labels) == len(systems),
        f"--label has {len(labels)} names for {len(systems)} rows "
        f"({', '.join(system.label for system in systems)}), but one a row is expected; add or "
        "remove some.",
    )
    pairs = zip(systems, labels, strict=True)
    return [System(label, system.task, system.quality) for system, label in pairs]


# The table


@dataclass(frozen=True)
class Column:
    """A reward of one kind of measurement."""

    header: str
    kind: str
    """TASK or QUALITY."""
    reward: str
    digits: int

    def score(self, system: System) -> Score | None:
        """Find the figures of a row."""
        measurement = getattr(system, self.kind)
        return None if measurement is None else measurement.scores.get(self.reward)

    def cell(self, system: System) -> str:
        """Write a mean with its interval."""
        score = self.score(system)
        if score is None:
            return NONE
        low, high = (self.number(bound) for bound in score.interval)
        return f"{self.number(score.mean)} ({low} to {high})"

    def number(self, value: float) -> str:
        """Write a number on the column's scale."""
        scaled = value * COLUMNS.get(self.reward, ("", 1.0))[1]
        return NONE if math.isnan(scaled) else f"{scaled:.{self.digits}f}"


def columns(systems: Sequence[System]) -> list[Column]:
    """List the columns of `systems`: task metrics, quality rewards, then a task's other rewards."""
    tasks = [system.task for system in systems if system.task is not None]
    metrics = list(dict.fromkeys(next(iter(task.scores)) for task in tasks))
    others = dict.fromkeys(name for task in tasks for name in task.scores)
    qualities = dict.fromkeys(
        name for system in systems if system.quality for name in system.quality.scores
    )
    paper = [name for name in PRESETS[PAPER] if name in qualities]
    ordered = list(dict.fromkeys((*paper, *qualities)))
    listed = [Column(_header(name), QUALITY, name, _digits(name)) for name in ordered]

    def task_column(name: str) -> Column:
        header = _header(name) + (" (task)" if name in ordered else "")
        return Column(header, TASK, name, _digits(name))

    rest = [name for name in others if name not in metrics]
    return [*map(task_column, metrics), *listed, *map(task_column, rest)]


def _digits(reward: str) -> int:
    """Choose the decimals: two for the paper's quality rewards, three for shares and others."""
    return 2 if reward in PRESETS[PAPER] else 3


def _header(reward: str) -> str:
    return COLUMNS[reward][0] if reward in COLUMNS else reward


def table(systems: Sequence[System]) -> Table:
    """Draw the paper's table for a terminal."""
    drawn = Table(box=None, padding=(0, 1), header_style="bold")
    drawn.add_column("Model", no_wrap=True)
    listed = columns(systems)
    for column in listed:
        drawn.add_column(Text(column.header), justify="right", no_wrap=True)
    for system in systems:
        drawn.add_row(Text(system.label), *(column.cell(system) for column in listed))
    return drawn


def show(systems: Sequence[System], console: Console) -> None:
    """Print the table, and what to know about it."""
    print_whole(console, table(systems))
    for note in notes(systems):
        console.print(note, soft_wrap=True, markup=False)


def markdown(systems: Sequence[System]) -> str:
    """Write table.md: the paper's table, sub-tasks, categories, and what to know about them."""
    listed = columns(systems)
    rows = [[system.label, *(column.cell(system) for column in listed)] for system in systems]
    blocks = [
        _markdown_table(["Model", *(column.header for column in listed)], rows),
        "Means with 95 % intervals, by prompt.",
    ]
    blocks += [f"- {note}" for note in notes(systems)]
    for metric in dict.fromkeys(c.reward for c in listed if c.kind == TASK):
        column = next(c for c in listed if c.kind == TASK and c.reward == metric)
        blocks += _by_group(systems, column)
    blocks += _by_category(systems, [column for column in listed if column.kind == QUALITY])
    return "\n\n".join(blocks) + "\n"


def _by_group(systems: Sequence[System], column: Column) -> list[str]:
    """Write a task's score by sub-task, a row a system; nothing without sub-tasks."""
    scores = [(system.label, column.score(system)) for system in systems]
    rows = [(label, score) for label, score in scores if score is not None and score.groups]
    if not rows:
        return []
    names = list(dict.fromkeys(name for _, score in rows for name in score.groups))
    cells = [
        [
            label,
            column.number(score.mean),
            *(column.number(score.groups.get(name, math.nan)) for name in names),
        ]
        for label, score in rows
    ]
    header = ["Model", "overall", *map(_group_name, names)]
    return [f"## {column.header} by task", _markdown_table(header, cells)]


def _by_category(systems: Sequence[System], qualities: Sequence[Column]) -> list[str]:
    """Write the quality rewards by category, a row a system and category."""
    rows = []
    for system in systems:
        scores = [column.score(system) for column in qualities]
        names = dict.fromkeys(name for score in scores if score for name in score.groups)
        for name in names:
            numbers = [
                column.number(score.groups.get(name, math.nan)) if score else NONE
                for column, score in zip(qualities, scores, strict=True)
            ]
            rows.append([system.label, _group_name(name), *numbers])
    if not rows:
        return []
    header = ["Model", "category", *(column.header for column in qualities)]
    return ["## Quality by category", _markdown_table(header, rows)]


def _group_name(name: str) -> str:
    return name.replace("_", " ") or "without a tag"


def _markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    # A label is the user's: a | or a line break would end the cell.
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |"
        for line in lines
    )


def notes(systems: Sequence[System]) -> list[str]:
    """List what makes rows less comparable than they look: other prompts, other models of a
    reward, other sizes, pictures that were left out or have no score."""
    lines = []
    for kind, name in ((TASK, "task's"), (QUALITY, "quality")):
        measured = [(s.label, getattr(s, kind)) for s in systems if getattr(s, kind) is not None]
        lines += _differing_prompts(measured, name)
        lines += _differing_models(measured)
        lines += _differing_sizes(measured, name)
        for label, measurement in measured:
            lines += _of_one(label, measurement, name)
    return list(dict.fromkeys(lines))


def _differing_prompts(measured: Sequence[tuple[str, Measurement]], name: str) -> list[str]:
    # Rows of other tasks have other prompts by their nature.
    by_metric: dict[str, list[tuple[str, Measurement]]] = {}
    for label, measurement in measured:
        metric = next(iter(measurement.scores)) if name != QUALITY else ""
        by_metric.setdefault(metric, []).append((label, measurement))
    return [
        f"The rows differ in the {name} prompts: "
        + ", ".join(f"{label} has {m.prompts} of {m.prompt_set}" for label, m in group)
        + "."
        for group in by_metric.values()
        if len({m.fingerprint for _, m in group}) > 1
    ]


def _differing_models(measured: Sequence[tuple[str, Measurement]]) -> list[str]:
    names = dict.fromkeys(name for _, m in measured for name in m.settings)
    lines = []
    for name in names:
        settings = [(label, m.settings[name]) for label, m in measured if name in m.settings]
        keys = dict.fromkeys(key for _, values in settings for key in values)
        for key in keys:
            values = {str(options.get(key)) for _, options in settings}
            if len(values) > 1:
                listed = ", ".join(f"{label}: {o.get(key)}" for label, o in settings)
                lines.append(f"The rows differ in {name}.{key}: {listed}.")
    return lines


def _differing_sizes(measured: Sequence[tuple[str, Measurement]], name: str) -> list[str]:
    # A row with several sizes has a line of its own.
    sizes = [(label, next(iter(m.sizes))) for label, m in measured if len(m.sizes) == 1]
    if len({size for _, size in sizes}) < 2:
        return []
    listed = ", ".join(f"{label} has {size}" for label, size in sizes)
    return [f"The rows differ in the size of the pictures of the {name} prompts: {listed}."]


def _of_one(label: str, measurement: Measurement, name: str) -> list[str]:
    """List what to know about one row."""
    lines = []
    skipped, sizes = measurement.skipped, measurement.sizes
    if skipped:
        count = measurement.images + len(skipped)
        lines.append(
            f"{label}: {len(skipped)} of {count} pictures of the {name} prompts are left out, as "
            "they are missing or cannot be read."
        )
    if len(sizes) > 1:
        listed = ", ".join(f"{count} of {size}" for size, count in sizes.items())
        lines.append(f"{label}: pictures of the {name} prompts differ in size ({listed}).")
    for reward, score in measurement.scores.items():
        if score.failed:
            lines.append(
                f"{label}: {reward} gave no score to {score.failed} of {measurement.images} "
                f"pictures of the {name} prompts, which are left out of its mean."
            )
    return lines
