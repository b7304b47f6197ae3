"""Pictures that people look at: grids of images with captions, and the accuracy curve.

Small images are enlarged by nearest neighbour, so that every pixel of the model stays what it is.
A green bar under an image says that the verifier accepted it, a red one that it did not; other
scores than right or wrong are written there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, ImageDraw, ImageFont

from flowgrpo.config import ConfigError
from flowgrpo.files import replacing
from flowgrpo.rewards.frames import is_video

if TYPE_CHECKING:
    from flowgrpo.evaluation.evaluate import Evaluation
    from flowgrpo.evaluation.evaluation_set import EvaluationSet

INK, FAINT, PAPER = "#1f2328", "#6e7781", "#ffffff"
RIGHT, WRONG = "#2da44e", "#cf222e"
MAIN, GUIDED = "#0969da", "#bf8700"
# One colour for each task's thin line, distinct and calm.
LINES = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
TILE, GAP, TEXT = 112, 10, 13
_JPEG = ("JPEG", {"quality": 95, "subsampling": 0})
FORMATS = {".png": ("PNG", {"optimize": True}), ".jpg": _JPEG, ".jpeg": _JPEG}
"""Ending of a file -> Pillow's format and options."""
LONGEST_JPEG = 65500
"""Pixels on the longer side of a JPEG, by libjpeg."""


def evaluation_grid(
    evaluations: Mapping[str, Evaluation], evaluation_set: EvaluationSet
) -> Image.Image:
    """Draw the images of `evaluations` (by label), one row each: the same prompts and seeds.

    They are the first image of each of the first prompts. Where every score is right or wrong, the
    label says how many of a row are right.
    """
    # Runs that began with an earlier version have fewer.
    count = min(len(evaluation.shown) for evaluation in evaluations.values())
    rows, marks = {}, {}
    for label, evaluation in evaluations.items():
        scores = evaluation.marks[:count]
        if scores and all(score in (0, 1) for score in scores):
            label += f"\n{sum(map(int, scores))} of {len(scores)}"
        rows[label], marks[label] = evaluation.shown[:count], scores
    texts = evaluation_set.prompts.texts[:count]
    columns = 6 if count <= 12 else 8
    if any(is_video(images) for images in rows.values()):
        columns = 2
    return grid(rows, texts, marks, columns=columns)


def grid(
    rows: Mapping[str, torch.Tensor],
    captions: Sequence[str],
    marks: Mapping[str, Sequence[float]] | None = None,
    columns: int = 6,
) -> Image.Image:
    """Draw the images of each row label, one column a caption: `{"base": ..., "trained": ...}`.

    Args:
        rows: label -> uint8 [N, 3, H, W]; the rows of one caption stand above each other. A label
            may have several lines. Frames of videos [N, f, 3, H, W] stand side by side.
        captions: N texts, written under the columns.
        marks: label -> N scores, NaN where there is none. If all are in [0, 1], each draws a bar
            under the image, green for 1, else red; if one is neither 0 nor 1, all are written.
        columns: columns before the picture goes on in a new block of rows.
    """
    captions = list(captions)
    for label, images in rows.items():
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or len(images) != len(captions):
            raise ValueError(
                f"rows[{label!r}] is {images.dtype} {list(images.shape)}, but uint8 "
                f"[{len(captions)}, 3, H, W] or [{len(captions)}, f, 3, H, W] is expected, one "
                "image a caption, or one video."
            )
    first = next(iter(rows.values()))
    tiles = {
        label: [(_strip if is_video(images) else _tile)(image) for image in images]
        for label, images in rows.items()
    }
    width, height = tiles[next(iter(rows))][0].size if len(first) else (TILE, TILE)
    # A column is no narrower than words under a high image need.
    column_width = max(width, min(height, TILE))
    font = ImageFont.load_default(TEXT)
    lines = [_wrap(caption, font, column_width) for caption in captions]
    columns = min(columns, len(captions))
    labelled, margin = len(rows) > 1, GAP
    if labelled:
        lengths = [font.getlength(line) for label in rows for line in label.split("\n")]
        margin += math.ceil(max(lengths)) + GAP
    bar, number = _heights(marks or {})
    blocks = [range(i, min(i + columns, len(captions))) for i in range(0, len(captions), columns)]
    text_heights = [max(len(lines[i]) for i in block) * (TEXT + 4) + GAP for block in blocks]
    row_height = height + bar + number + 4
    total = GAP + sum(len(rows) * row_height + extra for extra in text_heights)
    canvas = Image.new("RGB", (margin + columns * (column_width + GAP), total), PAPER)
    draw, top = ImageDraw.Draw(canvas), GAP
    for block, extra in zip(blocks, text_heights, strict=True):
        for label, images in tiles.items():
            if labelled:
                draw.text((GAP, top + height // 2), label, FAINT, font, anchor="lm")
            for column, i in enumerate(block):
                left = margin + column * (column_width + GAP) + (column_width - width) // 2
                canvas.paste(images[i], (left, top))
                draw.rectangle((left, top, left + width - 1, top + height - 1), outline="#d0d7de")
                below = (left, top + height + 1, left + width - 1)
                if bar:
                    color = RIGHT if marks[label][i] >= 1 else WRONG
                    draw.rectangle((*below, top + height + 3), color)
                if number:
                    _write(draw, font, marks[label][i], below, bar)
            top += row_height
        for column, i in enumerate(block):
            center = margin + column * (column_width + GAP) + column_width // 2
            for line_number, line in enumerate(lines[i]):
                y = top + 2 + line_number * (TEXT + 4)
                draw.text((center, y), line, INK, font, anchor="ma")
        top += extra
    return canvas


def _heights(marks: Mapping[str, Sequence[float]]) -> tuple[int, int]:
    """Count the pixels under each image for the bar and for the number; 0 where there is none."""
    scores = [score for row in marks.values() for score in row if not math.isnan(score)]
    with_bar = bool(marks) and all(0 <= score <= 1 for score in scores)
    with_number = any(score not in (0, 1) for score in scores)
    return 5 if with_bar else 0, TEXT + 4 if with_number else 0


def _write(
    draw: ImageDraw.ImageDraw, font: Any, score: float, below: tuple[int, int, int], bar: int
) -> None:
    """Write `score` under the image and its bar; below: (left, top, right) of the space there."""
    left, top, right = below
    text = "failed" if math.isnan(score) else f"{score:.4g}"
    draw.text(((left + right) // 2, top + bar), text, FAINT, font, anchor="ma")


def _tile(image: torch.Tensor) -> Image.Image:
    """Make one image's tile: about TILE pixels on its longer side, enlarged by a whole factor, or
    its own, at most 3 TILE."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    longer = max(picture.size)
    factor = max(1, round(TILE / longer))
    if longer > 3 * TILE:
        width, height = (max(1, round(side * 3 * TILE / longer)) for side in picture.size)
        return picture.resize((width, height), Image.Resampling.LANCZOS)
    size = (picture.width * factor, picture.height * factor)
    return picture.resize(size, Image.Resampling.NEAREST)


def _strip(frames: torch.Tensor) -> Image.Image:
    """Make the tile of a video: frames, uint8 [f, 3, H, W], side by side."""
    tiles = [_tile(frame) for frame in frames]
    (width, height), gap = tiles[0].size, 2
    strip = Image.new("RGB", (len(tiles) * (width + gap) - gap, height), PAPER)
    for number, tile in enumerate(tiles):
        strip.paste(tile, (number * (width + gap), 0))
    return strip


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break `text` at spaces, and words that are too long at a letter, into lines no wider than
    `width` pixels, at most four."""
    lines = [""]
    # Four lines hold no more letters than this; an "i" takes two pixels or more.
    for word in text[: 4 * width].split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
            continue
        lines += [word] if lines[-1] else []
        lines[-1] = word
        while font.getlength(lines[-1]) > width and len(lines) <= 4:
            line, count = lines[-1], 1
            while font.getlength(line[: count + 1]) <= width:
                count += 1
            lines[-1:] = [line[:count], line[count:]]
    return lines if len(lines) <= 4 else [*lines[:3], lines[3] + " ..."]


def check_ending(path: Path) -> None:
    """Raise ConfigError if the ending of `path` is that of a format that `save` does not write."""
    ending = path.suffix.lower()
    if ending not in FORMATS and ending in {".svg", *Image.registered_extensions()}:
        raise ConfigError(
            f"the picture {str(path)!r} ends in {ending}, but one of {', '.join(FORMATS)} is "
            "expected; choose another name."
        )


def save(picture: Image.Image, path: Path) -> Path:
    """Write a picture so that a reader sees the old file or the new one: as a PNG, or as a JPEG
    where the name ends so.

    Returns:
        The path that was written: a PNG's, if the picture is too large for a JPEG.
    """
    path = Path(path)
    format, options = FORMATS.get(path.suffix.lower(), FORMATS[".png"])
    if format == "JPEG" and max(picture.size) > LONGEST_JPEG:
        path, (format, options) = path.with_suffix(".png"), FORMATS[".png"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        picture.save(temporary, format=format, **options)
    return path


def save_video(video: torch.Tensor, path: Path, frame_rate: int) -> Path:
    """Write a video, uint8 [F, 3, H, W], as an animated WebP that begins again at its end, so that
    a reader sees the old file or the new one.

    Args:
        frame_rate: frames a second.
    """
    frames = [Image.fromarray(f.numpy()) for f in video.permute(0, 2, 3, 1).contiguous().cpu()]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole milliseconds, whose rounding errors do not add up.
    ends = [round(1000 * (t + 1) / frame_rate) for t in range(len(frames))]
    durations = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    with replacing(path) as temporary:
        frames[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            quality=90,
        )
    return path


def curve(
    path: Path,
    evaluations: Sequence[Mapping[str, Any]],
    guided: Mapping[str, Any] | None = None,
    title: str = "",
    label: str = "accuracy",
) -> Path:
    """Draw the held-out accuracy against iterations, with a thin line for each task.

    Args:
        path: the PNG to write.
        evaluations: {"iteration", "accuracy", "interval", "tasks", "elapsed"} in order;
            "elapsed" is the training time in seconds so far and may be missing.
        guided: the base model with guidance: {"accuracy", "guidance_scale"}.
        title: a line above the plot.
        label: name of the score; "accuracy" is drawn in percent.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    # Names of tasks and rewards are text, in which a $ opens no formula.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False}):
        figure = _curve(evaluations, guided, title, label)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", facecolor=PAPER)
    return path


def _curve(
    evaluations: Sequence[Mapping[str, Any]],
    guided: Mapping[str, Any] | None,
    title: str,
    label: str,
) -> Any:
    """Draw the figure of `curve`."""
    from matplotlib.figure import Figure

    scale, unit, digits = (100, " %", 0) if label == "accuracy" else (1, "", 3)
    x = [entry["iteration"] for entry in evaluations]
    y = [scale * entry["accuracy"] for entry in evaluations]
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    _task_lines(axes, x, evaluations, scale)
    bounds = [entry.get("interval") for entry in evaluations]
    if all(bounds):
        low, high = ([scale * value for value in side] for side in zip(*bounds, strict=True))
        axes.fill_between(x, low, high, color=MAIN, alpha=0.12, lw=0)
    axes.plot(x, y, color=MAIN, lw=2.4, marker="o", ms=4, label="trained", zorder=5)
    base = f"base: {y[0]:.{digits}f}{unit}"
    axes.axhline(y[0], color=FAINT, lw=1.2, ls="--", label=base, zorder=3)
    if guided is not None:
        level = scale * guided["accuracy"]
        name = f"base, guidance {guided['guidance_scale']:g}: {level:.{digits}f}{unit}"
        axes.axhline(level, color=GUIDED, lw=1.2, ls="--", label=name, zorder=3)
    last = f"{y[-1]:.{max(digits, 1)}f}{unit}"
    axes.annotate(last, (x[-1], y[-1]), (6, 0), textcoords="offset points", va="center", color=INK)
    _style(axes, evaluations, title, f"held-out {label},{unit}" if unit else f"held-out {label}")
    return figure


def _task_lines(
    axes: Any, x: list[int], evaluations: Sequence[Mapping[str, Any]], scale: float
) -> None:
    """Draw a thin line for each task."""
    names = list(evaluations[0].get("tasks") or ())
    for number, name in enumerate(names):
        # A task whose rewards all failed is null.
        means = [entry["tasks"].get(name) for entry in evaluations]
        values = [math.nan if mean is None else scale * mean for mean in means]
        label = name.replace("_", " ")
        axes.plot(x, values, color=LINES[number % len(LINES)], lw=0.9, alpha=0.75, label=label)


def _style(axes: Any, evaluations: Sequence[Mapping[str, Any]], title: str, ylabel: str) -> None:
    """Set limits, ticks, legend and colours, and a second scale in minutes."""
    axes.set_xlabel("iteration", fontsize=9, color=INK)
    axes.set_ylabel(ylabel, fontsize=9, color=INK)
    if ylabel.endswith("%"):
        axes.set_ylim(0, 100)
    # Room on the right for the last value.
    axes.set_xlim(0, max(evaluations[-1]["iteration"], 1) * 1.15)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(axis="y", color="#eaeef2", lw=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#d0d7de")
    axes.tick_params(colors=FAINT, length=0, labelsize=8)
    handles, names = axes.get_legend_handles_labels()
    # The result and what it is measured against come first, the tasks below.
    order = sorted(range(len(names)), key=lambda i: handles[i].get_linewidth(), reverse=True)
    legend = {"frameon": False, "fontsize": 7.5, "labelcolor": INK}
    axes.legend(
        [handles[i] for i in order],
        [names[i] for i in order],
        loc="center left",
        bbox_to_anchor=(1.0, 0.5),
        **legend,
    )
    elapsed = evaluations[-1].get("elapsed")
    if elapsed and evaluations[-1]["iteration"]:
        minutes = elapsed / 60 / evaluations[-1]["iteration"]
        upper = axes.secondary_xaxis(
            "top", functions=(lambda i: i * minutes, lambda m: m / minutes)
        )
        upper.set_xlabel("minutes of training", fontsize=8, color=FAINT)
        upper.tick_params(colors=FAINT, length=0, labelsize=8)
        upper.spines["top"].set_visible(False)
