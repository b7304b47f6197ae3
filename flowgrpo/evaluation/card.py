"""The card of an evaluation: README.md with the results as the Hub reads them (model-index).

huggingface_hub writes the metadata, one `EvalResult` for each reward and each sub-task of the
first; the text below has the same figures beside the base's. A card that lies in a model's
repository shows its results there; `ModelCard.load(path).data.eval_results` reads
them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowgrpo import files
from flowgrpo.evaluation import systems

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

NAME = "card/README.md"
"""Place in the folder of the evaluation, which may have a README.md of its own."""
TASK = "text-to-image"


@dataclass(frozen=True)
class Subject:
    """The weights that were evaluated."""

    name: str
    """Name in the card: that of an adapter, a run, or the model itself."""
    base: str
    """Model that it is an adapter of, or itself: a Hub id, or the name of a folder."""
    adapter: bool = False
    base_on_hub: bool = False
    note: str = ""
    """A sentence about the weights, such as the adapter's format and revision."""


def results(
    prompt_set: str, split: str, values: Mapping[str, Any], quality: Sequence[EvalResult] = ()
) -> list[EvalResult]:
    """List the scores of one evaluation for a model-index; none of what was not measured.

    Args:
        prompt_set: name, path, or hub:OWNER/NAME of its prompts.
        split: part of the prompt set.
        values: of `Evaluation.to_dict`.
        quality: of `quality_results`, which follow.
    """
    arguments = {
        name: values[name]
        for name in ("prompts", "images", "steps", "guidance_scale", "size")
        if name in values
    }
    intervals = values.get("intervals", {})
    first = next(iter(values["scores"]), "")
    entries = [("", name, score) for name, score in values["scores"].items()]
    entries += [(task, first, score) for task, score in values["tasks"].items()]
    scored = []
    for task, name, score in entries:
        bounds = {} if task or name not in intervals else {"interval_95": list(intervals[name])}
        scored.append(_result(prompt_set, split, task, name, score, {**arguments, **bounds}))
    return [*filter(None, scored), *quality]


def quality_results(measurement: systems.Measurement) -> list[EvalResult]:
    """List the scores of the quality prompts for a model-index."""
    counts = {"prompts": measurement.prompts, "images": measurement.images}
    scored = (
        _result(
            measurement.prompt_set,
            "",
            "",
            name,
            score.mean,
            {**counts, "interval_95": list(score.interval)},
        )
        for name, score in measurement.scores.items()
    )
    return [*filter(None, scored)]


def _result(
    prompt_set: str, split: str, task: str, name: str, score: float, arguments: dict[str, Any]
) -> EvalResult | None:
    from huggingface_hub import EvalResult

    # null in report.json; a card's results are numbers.
    if score is None or not math.isfinite(score):
        return None
    identifier = prompt_set.removeprefix("hub:").split(":")[0]
    if not prompt_set.startswith("hub:"):
        # A folder's place says nothing elsewhere.
        identifier = Path(prompt_set).name
    column, factor = systems.COLUMNS.get(name, (name, 1.0))
    if factor != 1:
        # Another scale in the paper's table; here all are the rewards' own.
        column = name
    return EvalResult(
        task_type=TASK,
        dataset_type=identifier,
        dataset_name=identifier + (f", {task}" if task else ""),
        # With the name, what the Hub tells results of one data set apart by.
        dataset_config=task or None,
        dataset_split=split or None,
        metric_type=re.sub(r"\W+", "_", Path(name).name).strip("_"),
        metric_name=column,
        metric_value=score,
        metric_args=arguments,
    )


def metadata(subject: Subject, entries: Sequence[EvalResult], tags: Sequence[str] = ()) -> str:
    """Write the front matter of a card, from --- to ---."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        # The Hub knows repositories; a folder's name says nothing there.
        base_model=subject.base if subject.base_on_hub and subject.adapter else None,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=[*(["lora"] if subject.adapter else []), "flowgrpo", *tags],
        model_name=subject.name if entries else None,
        eval_results=list(entries) or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def write(
    folder: Path,
    subject: Subject,
    prompt_set: str,
    split: str,
    reports: Mapping[str, Mapping[str, Any]],
    quality: Mapping[str, systems.Measurement] | None = None,
    versions: Mapping[str, str] | None = None,
) -> Path:
    """Write the card of the evaluation in `folder`.

    Args:
        reports: label -> `Evaluation.to_dict`; the last, which the metadata have, is the subject's.
        quality: label -> the measurement on the quality prompts, where there is one.
    """
    quality = dict(quality or {})
    label, values = list(reports.items())[-1]
    extra = quality_results(quality[label]) if label in quality else []
    entries = results(prompt_set, split, values, extra)
    weights = f"LoRA weights on {subject.base}" if subject.adapter else "The model"
    size = f" of {values['size'][0]} x {values['size'][1]} pixels" if "size" in values else ""
    paragraphs = [
        metadata(subject, entries),
        f"# {subject.name}, evaluated",
        f"{weights}{'. ' + subject.note if subject.note else ''}. {values['images']} images{size} "
        f"of {values['prompts']} prompts ({Path(prompt_set).name}, {split}), the deterministic "
        f"sampler, {values['steps']} steps, guidance scale {values['guidance_scale']:g}. All "
        "columns are of the same prompts and seeds. Intervals are 95 %, a bootstrap over prompts.",
        _table(reports),
    ]
    if quality:
        paragraphs.append("## Quality prompts\n\n" + _quality_table(quality))
    software = ", ".join(f"{name} {version}" for name, version in (versions or {}).items())
    paragraphs.append(f"Measured by `flowgrpo evaluate` ({software}).")
    path = folder / NAME
    path.parent.mkdir(exist_ok=True)
    files.write_text(path, "\n\n".join(paragraphs) + "\n")
    return path


def _table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Set scores with their intervals, sub-tasks and quality figures side by side."""
    first = next(iter(reports.values()))
    lines = [["", *reports], ["---"] * (len(reports) + 1)]
    for name in first["scores"]:
        cells = []
        for values in reports.values():
            bounds = values.get("intervals", {}).get(name)
            interval = f" ({_number(bounds[0])} to {_number(bounds[1])})" if bounds else ""
            cells.append(_number(values["scores"].get(name)) + interval)
        lines.append([name, *cells])
    for group in ("tasks", "quality"):
        for name in first[group]:
            cells = [_number(values[group].get(name)) for values in reports.values()]
            lines.append([f"{group.removesuffix('s')}: {name}", *cells])
    return _markdown(lines)


def _quality_table(quality: Mapping[str, systems.Measurement]) -> str:
    first = next(iter(quality.values()))
    lines = [["", *quality], ["---"] * (len(quality) + 1)]
    for name in first.scores:
        scores = [measurement.scores[name] for measurement in quality.values()]
        cells = [
            f"{_number(s.mean)} ({_number(s.interval[0])} to {_number(s.interval[1])})"
            for s in scores
        ]
        lines.append([name, *cells])
    return _markdown(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.4g}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
