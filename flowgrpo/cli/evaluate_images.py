"""flowgrpo evaluate --images and --table: pictures of other systems, and many systems in one table.

No policy is loaded here: pictures are read from files, and rewards score them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console

from flowgrpo import rewards
from flowgrpo.cli.options import EvaluateOptions
from flowgrpo.cli.targets import check_numbers, check_writable
from flowgrpo.config.validation import require
from flowgrpo.evaluation import picture_sets, systems
from flowgrpo.evaluation.picture_sets import PictureSet
from flowgrpo.evaluation.systems import Measurement, System
from flowgrpo.records import Prompts
from flowgrpo.rewards.table import options_of
from flowgrpo.runs.display import EvaluationProgress, Terminal, mode_of
from flowgrpo.runs.process import versions

OUT = "runs/images/evaluation"
BATCH = 16
"""Pictures that are scored at once."""
FOR_IMAGES = (
    *("images", "quality_images", "label", "skip_unreadable", "rewards", "reward_options"),
    *("quality", "batch_size", "out", "device"),
)
"""Options that mean something with --images."""
FOR_TABLE = ("table", "label", "out")
"""Options that mean something with --table."""


@dataclass(frozen=True)
class Pictures:
    """One system's pictures: those of the task's prompts, those of the quality prompts."""

    label: str
    task: PictureSet
    quality: PictureSet
    """The same object, where there are no others."""


def evaluate_images(options: EvaluateOptions, console: Console | None = None) -> list[System]:
    """Score pictures of other systems; print and write the table."""
    console = console or Terminal(highlight=False)
    _check_options(options, "--images", FOR_IMAGES)
    check_numbers(options, "batch_size")
    collections = _find(options)
    task, quality = _scorers(options, collections)
    # The judges' addresses are tried before any weights are loaded.
    for scorer, sets in reversed(_pairs(task, quality, collections)):
        scorer.prepare(_all_prompts(sets))
    check_writable(Path(options.out or OUT))
    collections = [_read(entry, options, console) for entry in collections]
    for scorer, sets in _pairs(task, quality, collections):
        blank = torch.full((3, *sets[0].sizes[0]), 255, dtype=torch.uint8)
        scorer.try_out(_all_prompts(sets), blank)
    batch_size = options.batch_size or BATCH
    rows = []
    for entry in collections:
        measurements: dict[str, Measurement] = {}
        if task is not None:
            measurements[systems.TASK] = _measure(
                entry.label, entry.task, task, batch_size, console
            )
        if quality is not None:
            measurements[systems.QUALITY] = _measure(
                entry.label, entry.quality, quality, batch_size, console, balanced=False
            )
        rows.append(System(entry.label, **measurements))
    return _show(rows, Path(options.out or OUT), console)


def merge_tables(options: EvaluateOptions, console: Console | None = None) -> list[System]:
    """Put the rows of several evaluations into one table; print it, and write it with --out."""
    console = console or Terminal(highlight=False)
    _check_options(options, "--table", FOR_TABLE)
    rows = [row for path in options.table for row in systems.load(Path(path))]
    if options.label:
        rows = systems.relabel(rows, options.label)
    out = None if options.out is None else Path(options.out)
    if out is not None:
        check_writable(out)
    return _show(systems.merge(rows), out, console)


def _show(rows: list[System], out: Path | None, console: Console) -> list[System]:
    """Print the table and what to know about it; write both."""
    systems.show(rows, console)
    if out is not None:
        systems.write(out, rows, versions())
        text = f"Written to {out}: table.md, {systems.NAME}."
        console.print(text, soft_wrap=True, markup=False)
    return rows


def _check_options(options: EvaluateOptions, mode: str, names: Sequence[str]) -> None:
    """Raise ConfigError for an option that means nothing in this mode."""
    for field in dataclasses.fields(options):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        value = getattr(options, field.name)
        argument = f"--{field.name.replace('_', '-')}" if field.name != "target" else "a target"
        require(
            field.name in names or value == default,
            f"{argument} {value!r} was given with {mode}, which loads no model, but only "
            f"{', '.join('--' + name.replace('_', '-') for name in names)} are expected there; "
            "leave it out.",
        )


def _find(options: EvaluateOptions) -> list[Pictures]:
    """List the pictures of each system; none is opened yet."""
    count = len(options.images)
    require(
        bool(options.images),
        "--quality-images was given without --images, but these are the pictures of the same "
        "systems that --images has for the task; name the folders by --images.",
    )
    for name, values in (("label", options.label), ("quality-images", options.quality_images)):
        require(
            len(values) in (0, count),
            f"--{name} has {len(values)} values for {count} of --images, but one for each is "
            "expected; add or remove some.",
        )
    labels = options.label or tuple(_label(Path(path)) for path in options.images)
    twice = [label for number, label in enumerate(labels) if label in labels[:number]]
    require(
        not twice,
        f"two rows would be called {twice[0] if twice else ''!r}, but a row has a name of its own; "
        "name them by --label.",
    )
    collections = []
    for number, (label, path) in enumerate(zip(labels, options.images, strict=True)):
        task = picture_sets.find_pictures(Path(path))
        quality = task
        if options.quality_images:
            quality = picture_sets.find_pictures(
                Path(options.quality_images[number]), "--quality-images"
            )
        collections.append(Pictures(label, task, quality))
    return collections


def _label(path: Path) -> str:
    """Name a row by its folder or file."""
    path = path.resolve()
    return path.stem if path.is_file() else path.name


def _scorers(
    options: EvaluateOptions, collections: Sequence[Pictures]
) -> tuple[rewards.Scorer | None, rewards.Scorer | None]:
    """Build the scorers of the task and of the quality rewards; None without rewards."""
    quality = systems.quality_rewards(options.quality)
    require(
        bool(quality) or not options.quality_images,
        "--quality-images was given without --quality, but the rewards that score them are "
        "expected; add --quality paper.",
    )
    task = tuple(dict.fromkeys(options.rewards))
    if not task and all(_is_geneval(entry.task) for entry in collections):
        task = ("geneval_strict",)
    require(
        bool(task or quality),
        "neither --rewards nor --quality was given, but pictures are scored by rewards, and only "
        "GenEval's metadata (include) have one of their own; add --rewards NAME or --quality "
        "paper.",
    )
    require(
        bool(task) or not options.quality_images,
        "--quality-images was given, but no reward scores the pictures of --images; name the "
        "task's by --rewards, or leave --quality-images out and give its folders as --images.",
    )
    by_name = options_of(options.reward_options, dict.fromkeys((*task, *quality)))
    if options.device != "auto":
        for name, values in by_name.items():
            if "device" in getattr(rewards.load(name), "defaults", {}):
                values.setdefault("device", options.device)

    def scorer(names: Sequence[str]) -> rewards.Scorer | None:
        return rewards.Scorer(dict.fromkeys(names, 1.0), options=by_name) if names else None

    return scorer(task), scorer(quality)


def _is_geneval(pictures: PictureSet) -> bool:
    """Tell whether all prompts say what GenEval looks for."""
    metadata = pictures.prompts.metadata
    return bool(metadata) and all("include" in entry for entry in metadata)


def _read(entry: Pictures, options: EvaluateOptions, console: Console) -> Pictures:
    """Read the pictures of one system once, to know which can be."""
    task = _read_set(entry.label, entry.task, options, console)
    same = entry.quality is entry.task
    return Pictures(
        entry.label, task, task if same else _read_set(entry.label, entry.quality, options, console)
    )


def _read_set(
    label: str, pictures: PictureSet, options: EvaluateOptions, console: Console
) -> PictureSet:
    title = f"{label}: reading pictures"
    with EvaluationProgress(
        console, mode_of("auto", console), title, len(pictures), ()
    ) as progress:
        readable = picture_sets.read(pictures, options.skip_unreadable, progress)
    if readable.without:
        console.print(
            f"{label}: left out {len(readable.without)} of {len(pictures)} pictures "
            f"({picture_sets.named(readable.without)}).",
            soft_wrap=True,
            markup=False,
        )
    return readable


def _pairs(
    task: rewards.Scorer | None, quality: rewards.Scorer | None, collections: Sequence[Pictures]
) -> list[tuple[rewards.Scorer, list[PictureSet]]]:
    """List each scorer that there is with the pictures that it scores."""
    pairs = [
        (task, [entry.task for entry in collections]),
        (quality, [entry.quality for entry in collections]),
    ]
    return [(scorer, sets) for scorer, sets in pairs if scorer is not None]


def _all_prompts(sets: Sequence[PictureSet]) -> Prompts:
    """Put the prompts of several sets together."""
    return Prompts.of(
        [text for pictures in sets for text in pictures.prompts.texts],
        [entry for pictures in sets for entry in pictures.prompts.metadata],
    )


def _measure(
    label: str,
    pictures: PictureSet,
    scorer: rewards.Scorer,
    batch_size: int,
    console: Console,
    *,
    balanced: bool = True,
) -> Measurement:
    """Score one set of pictures."""
    title, mode = f"{label}: scoring by {', '.join(scorer.weights)}", mode_of("auto", console)
    with EvaluationProgress(console, mode, title, len(pictures), ()) as progress:
        scores = picture_sets.score(pictures, scorer, batch_size, progress)
    return systems.measurement(
        str(pictures.source),
        scores,
        pictures.prompts,
        scorer,
        balanced=balanced,
        source=pictures.layout,
        sizes=picture_sets.sizes_of(pictures),
        skipped=[f"{entry.path}: {entry.reason}" for entry in pictures.without],
    )
